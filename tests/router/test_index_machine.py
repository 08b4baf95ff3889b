"""The index against dictionaries: any events in any order, and every answer compared.

Few tokens and few names, so that prefixes are shared, chains have holes, names clash between
workers and are given to other blocks, and blocks come under other names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router import index_tables
from router.index import Index, Outcome, Tier, WorkerId

PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
WORKERS = st.sampled_from([WorkerId(n // 2, n % 2) for n in range(5)])
TIERS = st.sampled_from([Tier.G1, Tier.G1, Tier.G1, *Tier])
NAMES = st.integers(0, 40)
TOKENS = np.array([11, 2**64 - 5, 3 << 40], dtype=np.uint64)

Path = tuple[int, ...]


def names_of(path: Sequence[int], shift: int) -> list[int]:
    """The same names for the same blocks, as engines with one hash function give them."""
    return [hash((tuple(path[: n + 1]), shift)) % 2**64 for n in range(len(path))]


class Model:
    """What the contract of `Index` says, in dictionaries."""

    def __init__(self) -> None:
        self.by_name: dict[tuple[WorkerId, int], Path] = {}
        self.names: dict[tuple[WorkerId, Path], int] = {}
        self.tiers: dict[tuple[WorkerId, Path], set[Tier]] = {}

    def store(self, worker: WorkerId, tier: Tier, name: int, path: Path) -> None:
        named = self.by_name.get((worker, name))
        if named is not None and named != path:
            self.drop(worker, named)
        other = self.names.get((worker, path))
        if other is not None and other != name:
            del self.by_name[worker, other]
        self.by_name[worker, name] = path
        self.names[worker, path] = name
        self.tiers.setdefault((worker, path), set()).add(tier)

    def remove(self, worker: WorkerId, tier: Tier, name: int) -> bool:
        path = self.by_name.get((worker, name))
        if path is None or tier not in self.tiers[worker, path]:
            return False
        self.tiers[worker, path].remove(tier)
        if not self.tiers[worker, path]:
            self.drop(worker, path)
        return True

    def drop(self, worker: WorkerId, path: Path) -> None:
        del self.by_name[worker, self.names.pop((worker, path))]
        del self.tiers[worker, path]

    def clear(self, worker: WorkerId) -> None:
        for holder, path in list(self.tiers):
            if holder == worker:
                self.drop(worker, path)

    def reach(self, worker: WorkerId, path: Sequence[int], tier: Tier) -> int:
        for count in range(len(path)):
            held = self.tiers.get((worker, tuple(path[: count + 1])), set())
            if not any(better <= tier for better in held):
                return count
        return len(path)


class IndexMachine(RuleBasedStateMachine):
    """Room for everything."""

    capacity = 100_000

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(self.capacity)
        self.model = Model()

    @initialize(crowd=st.sampled_from([0, 0, 62, 130]))
    def crowd(self, crowd: int) -> None:
        """Other workers, so that those of the rules are on both sides of a word's border."""
        for n in range(crowd):
            self._store(WorkerId(1000 + n), Tier.G1, (n % 3,), [7])

    @rule(worker=WORKERS, tier=TIERS, path=PATHS, shift=st.integers(0, 1))
    def store_whole(self, worker: WorkerId, tier: Tier, path: list[int], shift: int) -> None:
        self._store(worker, tier, tuple(path), names_of(path, shift))

    @rule(worker=WORKERS, tier=TIERS, path=PATHS, first=NAMES)
    def store_numbered(self, worker: WorkerId, tier: Tier, path: list[int], first: int) -> None:
        self._store(worker, tier, tuple(path), [first + n for n in range(len(path))])

    @rule(worker=WORKERS, tier=TIERS, path=PATHS, data=st.data())
    def store_after(self, worker: WorkerId, tier: Tier, path: list[int], data: Any) -> None:
        known = [name for holder, name in self.model.by_name if holder == worker]
        parent = data.draw(st.sampled_from([*known, 5, 2**63]))
        shift = data.draw(st.integers(0, 1))
        before = self.model.by_name.get((worker, parent))
        names = names_of([*(before or ()), *path], shift)[len(before or ()) :]
        self._store(worker, tier, (*(before or ()), *path), names, parent)

    @rule(worker=WORKERS, tier=TIERS, data=st.data())
    def remove(self, worker: WorkerId, tier: Tier, data: Any) -> None:
        known = [name for holder, name in self.model.by_name if holder == worker]
        names = data.draw(st.lists(st.sampled_from([*known, 3, 5, 2**64 - 1]), max_size=8))
        removed = [self.model.remove(worker, tier, name) for name in names]
        outcome = self.index.removed(worker, tier, np.array(names, dtype=np.uint64))
        assert outcome is (Outcome.DONE if all(removed) else Outcome.BLOCK_NOT_FOUND)

    @rule(worker=WORKERS)
    def clear(self, worker: WorkerId) -> None:
        self.model.clear(worker)
        assert self.index.cleared(worker) is Outcome.DONE

    @rule(worker=WORKERS)
    def remove_worker(self, worker: WorkerId) -> None:
        self.model.clear(worker)
        assert self.index.remove_worker(worker) is Outcome.DONE
        assert worker not in self.index.workers

    @rule()
    def hand_over(self) -> None:
        snapshot = self.index.snapshot()
        other = Index(self.capacity)
        other.restore(snapshot)
        assert other.snapshot() == snapshot
        self.index = other

    @rule(path=st.lists(st.integers(0, 2), max_size=12))
    def find(self, path: list[int]) -> None:
        self._compare(path)

    @invariant()
    def sizes_and_all_that_is_held(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len({path for _, path in self.model.tiers})
        for worker in self.index.workers:
            if worker is not None:
                held = [
                    tiers for (holder, _), tiers in self.model.tiers.items() if holder == worker
                ]
                counts = tuple(sum(tier in tiers for tiers in held) for tier in Tier)
                assert self.index.held_blocks(worker) == counts
        for path in list({path for _, path in self.model.tiers})[:6]:
            self._compare([*path, 0])

    def _compare(self, path: Sequence[int]) -> None:
        matches = self.index.find(TOKENS[list(path)])
        assert matches.workers == self.index.workers
        for lane, worker in enumerate(matches.workers):
            expected = [0 if worker is None else self.model.reach(worker, path, t) for t in Tier]
            assert matches.reach[:, lane].tolist() == expected, (worker, path)

    def _store(
        self,
        worker: WorkerId,
        tier: Tier,
        path: Path,
        names: Sequence[int],
        parent: int | None = None,
    ) -> None:
        """`path` from the first block on; the last `len(names)` of it are stored."""
        before = self.index.stored_blocks_total
        outcome = self.index.stored(
            worker,
            tier,
            parent,
            np.array(names, dtype=np.uint64),
            TOKENS[list(path[len(path) - len(names) :])],
        )
        stored = self.index.stored_blocks_total - before
        if parent is not None and (worker, parent) not in self.model.by_name:
            assert outcome is Outcome.PARENT_NOT_FOUND and stored == 0
            return
        if stored < len(names):
            assert outcome is Outcome.CAPACITY
            state = self.index._memory.state
            used = state[index_tables.LIVE] + state[index_tables.ALIASES_LIVE]
            assert used >= self.capacity - 1  # a new block by another's name takes two
        else:
            assert outcome is Outcome.DONE
        for n, name in enumerate(names[:stored]):
            self.model.store(worker, tier, name, path[: len(path) - len(names) + n + 1])


class FullIndexMachine(IndexMachine):
    """Room for less than is stored."""

    capacity = 12


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFullIndex = FullIndexMachine.TestCase
TestFullIndex.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
