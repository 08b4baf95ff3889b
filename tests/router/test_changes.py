"""Events applied together, for many workers at once, against the same ones by one and one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.changes import Changes
from router.index import OUTCOMES, Index, Outcome, Tier, WorkerId
from runtime.hashing import sequence_hashes

TOKENS = np.array([11, 2**64 - 5, 3 << 40], dtype=np.uint64)
WORKERS = [WorkerId(n // 2, n % 2) for n in range(4)]


class Event(NamedTuple):
    kind: str
    workers: tuple[WorkerId, ...]
    tier: Tier
    path: list[int]
    own: int  # 0: called by sequence hashes
    lost: int  # leading blocks that the event does not have

    @property
    def names(self) -> np.ndarray:
        return sequence_hashes(TOKENS[self.path]) ^ np.uint64(self.own)

    @property
    def parent(self) -> int | None:
        return int(self.names[self.lost - 1]) if self.lost else None


EVENTS = st.builds(
    Event,
    st.sampled_from(["stored", "stored", "stored", "removed", "cleared"]),
    st.lists(st.sampled_from(WORKERS), min_size=1, unique=True).map(tuple),
    st.sampled_from([Tier.G1, Tier.G1, Tier.G3]),
    st.lists(st.integers(0, 2), min_size=4, max_size=7),
    st.sampled_from([0, 0, 0, 1, 2]),
    st.integers(0, 3),
)


def gathered(events: list[Event]) -> Changes:
    changes = Changes()
    for event in events:
        names, tokens = event.names[event.lost :], TOKENS[event.path[event.lost :]]
        if event.kind == "stored":
            changes.stored(event.workers, event.tier, event.parent, names, tokens)
        elif event.kind == "removed":
            changes.removed(event.workers, event.tier, names)
        else:
            changes.cleared(event.workers)
    return changes


def one_by_one(index: Index, event: Event) -> Outcome:
    outcomes = []
    names, tokens = event.names[event.lost :], TOKENS[event.path[event.lost :]]
    for worker in event.workers:
        if event.kind == "stored":
            outcomes.append(index.stored(worker, event.tier, event.parent, names, tokens))
        elif event.kind == "removed":
            outcomes.append(index.removed(worker, event.tier, names))
        else:
            outcomes.append(index.cleared(worker))
    return next((outcome for outcome in outcomes if outcome is not Outcome.DONE), Outcome.DONE)


def reach(index: Index, path: list[int]) -> dict[WorkerId, list[int]]:
    """Of workers that hold the first block: their columns need not be the same."""
    matches = index.find(TOKENS[path])
    columns = {w: matches.reach[:, n].tolist() for n, w in enumerate(matches.workers) if w}
    return {worker: column for worker, column in columns.items() if any(column)}


@given(st.lists(EVENTS, max_size=12), st.sampled_from([8, 20, 10_000]))
@settings(max_examples=200, deadline=None)
def test_together_is_as_one_by_one(events: list[Event], capacity: int) -> None:
    together, single = Index(capacity), Index(capacity)
    outcomes = [OUTCOMES[code] for code in together.apply(gathered(events))]
    assert outcomes == [one_by_one(single, event) for event in events]
    assert len(together) == len(single)
    assert together.stored_blocks_total == single.stored_blocks_total
    assert together.removed_blocks_total == single.removed_blocks_total
    for worker in WORKERS:
        assert together.held_blocks(worker) == single.held_blocks(worker)
    together.check_integrity()
    for event in events:
        assert reach(together, event.path) == reach(single, event.path)


def test_arrays_of_other_types_are_refused_and_nothing_is_applied() -> None:
    index, changes = Index(100), Changes()
    good = np.arange(1, 4, dtype=np.uint64)
    changes.stored((WORKERS[0],), Tier.G1, None, good, good)
    changes.removed((WORKERS[0],), Tier.G1, good.astype(np.int64))
    with pytest.raises(TypeError):
        index.apply(changes)
    assert len(index) == 0
    changes.forget()
    assert len(changes) == 0 and not len(index.apply(changes))


def test_blocks_of_one_owner_on_many_workers_take_no_memory_of_their_own() -> None:
    tokens = np.random.default_rng(1).integers(0, 2**63, 50_000, dtype=np.uint64)
    sizes = []
    for workers in (1, 8):
        index, changes = Index(1 << 20), Changes()
        group = tuple(WorkerId(n) for n in range(workers))
        changes.stored(group, Tier.G2, None, sequence_hashes(tokens), tokens)
        assert not index.apply(changes).any()
        assert index.find(tokens).reach[Tier.G2].tolist() == [50_000] * workers
        sizes.append(index.allocated_bytes)
    assert sizes[0] == sizes[1]
