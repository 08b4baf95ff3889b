"""The index against dictionaries: any events in any order, and every answer compared.

Few tokens and few names, so that prefixes are shared, chains have holes, names clash between
workers and are given to other blocks, and blocks come under other names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router import index_tables
from router.changes import Changes
from router.index import OUTCOMES, Index, Outcome, Tier, WorkerId
from runtime.hashing import sequence_hashes

PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
WORKERS = st.sampled_from([WorkerId(n // 2, n % 2) for n in range(5)])
TIERS = st.sampled_from([Tier.G1, Tier.G1, Tier.G1, *Tier])
NAMES = st.integers(0, 40)
TOKENS = np.array([11, 2**64 - 5, 3 << 40], dtype=np.uint64)

Path = tuple[int, ...]
GROUPS = st.lists(WORKERS, min_size=1, max_size=4, unique=True).map(tuple)


def names_of(path: Sequence[int], shift: int) -> list[int]:
    """The same names for the same blocks, as engines with one hash function give them."""
    return [hash((tuple(path[: n + 1]), shift)) % 2**64 for n in range(len(path))]


def chain_of(path: Sequence[int]) -> np.ndarray:
    """The names that engines give which call blocks by their sequence hashes."""
    return sequence_hashes(TOKENS[list(path)])


class LazyIndex(Index):
    """Puts off as much as it can."""

    _swept_at_once = 0
    _upkeep_blocks = 1


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
        self.index: Index = LazyIndex(self.capacity)
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
        self._store(worker, tier, (*(before or (0, 0)), *path), names, parent)

    @rule(worker=WORKERS, tier=TIERS, path=PATHS, lost=st.integers(0, 8))
    def store_evident(self, worker: WorkerId, tier: Tier, path: list[int], lost: int) -> None:
        """By sequence hashes, whether or not the block before was ever stored."""
        names = chain_of(path)
        lost = min(lost, len(path) - 1)
        parent = int(names[lost - 1]) if lost else None
        self._store(worker, tier, tuple(path), names[lost:].tolist(), parent)

    @rule(worker=WORKERS, tier=TIERS, length=st.integers(60, 150), token=st.integers(0, 2))
    def store_long(self, worker: WorkerId, tier: Tier, length: int, token: int) -> None:
        path = tuple(token * (n % 2) for n in range(length))
        self._store(worker, tier, path, chain_of(path).tolist())

    @rule(worker=WORKERS, tier=TIERS, length=st.integers(60, 150), token=st.integers(0, 2))
    def remove_long(self, worker: WorkerId, tier: Tier, length: int, token: int) -> None:
        names = chain_of([token * (n % 2) for n in range(length)]).tolist()
        removed = [self.model.remove(worker, tier, name) for name in names]
        outcome = self.index.removed(worker, tier, np.array(names, dtype=np.uint64))
        assert outcome is (Outcome.DONE if all(removed) else Outcome.BLOCK_NOT_FOUND)

    @rule(group=GROUPS, tier=TIERS, paths=st.lists(PATHS, min_size=1, max_size=4), data=st.data())
    def store_rows(
        self, group: tuple[WorkerId, ...], tier: Tier, paths: list[list[int]], data: Any
    ) -> None:
        """Blocks of several chains, in any order, some of them in between left out."""
        whole = [tuple(path[: n + 1]) for path in paths for n in range(len(path))]
        rows = data.draw(st.lists(st.sampled_from(whole), max_size=12))
        if self.capacity < 1000:
            group = group[:1]  # which worker's blocks found room could not be told
        parents = [int(chain_of(path)[-2]) if len(path) > 1 else 0 for path in rows]
        before = self.index.stored_blocks_total
        outcome = self.index.stored_rows(
            group,
            tier,
            np.array(parents, dtype=np.uint64),
            TOKENS[[path[-1] for path in rows]],
        )
        stored = self.index.stored_blocks_total - before
        assert (outcome is Outcome.DONE) == (stored == len(group) * len(rows))
        for worker in group:
            for path in rows[: stored // len(group)]:
                self.model.store(worker, tier, int(chain_of(path)[-1]), path)

    @rule(group=GROUPS, tier=TIERS, path=PATHS, data=st.data())
    def apply_many(
        self, group: tuple[WorkerId, ...], tier: Tier, path: list[int], data: Any
    ) -> None:
        """Blocks stored for several workers, then some of them removed, then a worker cleared."""
        if self.capacity < 1000:
            return
        names = chain_of(path) if data.draw(st.booleans()) else names_of(path, 0)
        named = np.array(names, dtype=np.uint64)
        gone = data.draw(st.lists(st.sampled_from([*named.tolist(), 3]), max_size=5))
        others = data.draw(GROUPS)
        changes = Changes()
        changes.stored(group, tier, None, named, TOKENS[path])
        changes.removed(others, tier, np.array(gone, dtype=np.uint64))
        cleared = data.draw(st.booleans())
        if cleared:
            changes.cleared(others[:1])
        changes.stored(others, Tier.G1, None, named[:1], TOKENS[path[:2]])
        changes.stored(others, Tier.G1, 2**63 + 5, named, TOKENS[path])
        for worker in group:
            for n, name in enumerate(named.tolist()):
                self.model.store(worker, tier, name, tuple(path[: n + 1]))
        removed = [self.model.remove(worker, tier, name) for worker in others for name in gone]
        if cleared:
            self.model.clear(others[0])
        outcomes = [OUTCOMES[code] for code in self.index.apply(changes)]
        assert outcomes[0] is Outcome.DONE
        assert outcomes[1] is (Outcome.DONE if all(removed) else Outcome.BLOCK_NOT_FOUND)
        assert outcomes[2] is Outcome.DONE or not cleared
        one = len(path) == 1
        if one:
            for worker in others:
                self.model.store(worker, Tier.G1, int(named[0]), (path[0],))
        assert outcomes[-2] is (Outcome.DONE if one else Outcome.MALFORMED)
        assert outcomes[-1] is Outcome.PARENT_NOT_FOUND

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
        other = LazyIndex(self.capacity)
        other.restore(snapshot)
        assert other.snapshot() == snapshot
        self.index = other

    @rule()
    def put_off_nothing(self) -> None:
        assert any(not self.index.upkeep() for _ in range(100_000))

    @rule(path=st.lists(st.integers(0, 2), max_size=12))
    def find(self, path: list[int]) -> None:
        self._compare(path)

    @invariant()
    def sizes_and_all_that_is_held(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len({path for _, path in self.model.tiers})
        held = Counter((w, tier) for (w, _), tiers in self.model.tiers.items() for tier in tiers)
        for worker in self.index.workers:
            if worker is not None:
                counts = tuple(held[worker, tier] for tier in Tier)
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
        if parent is not None:
            before_it = self.model.by_name.get((worker, parent))
            path = (*before_it, *path[len(path) - len(names) :]) if before_it else path
            if before_it is None and names != chain_of(path)[len(path) - len(names) :].tolist():
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
TestIndex.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestFullIndex = FullIndexMachine.TestCase
TestFullIndex.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
