"""Which worker holds which block in which tier: what a router asks before it sends a request.

Fed by block events, exact with respect to them. A block is what its tokens and all tokens before
it are, by sequence hash; the hashes that an engine gives its blocks are only names, its own, by
which its events refer to them. Two engines may use one name for different blocks. An engine has
one name for a block: when it stores a block again under another, the other replaces it, and a name
given to a second block is the first one's no more.

An engine may as well call blocks by their sequence hashes. Its events then say by themselves where
their blocks belong, whatever was lost before them: if the parent is not there, but the names are
what follows from the parent taken for a sequence hash (`runtime.hashing.sequence_hashes`), they
are stored. That is exact: such a name *is* the block's sequence hash, computed here from the
tokens and the hash before, and `find`, which follows sequence hashes from a prompt's first block
on, counts the block when all before it are there and not sooner. Names of another kind pass the
test by a chance of 2^-64. A name that the engine gave to a block itself goes before.

No event raises: what cannot be applied is an `Outcome`, counted. Memory is bounded by `capacity`,
about 20 bytes a block however many workers hold it, 16 more where its holders' name for it is not
its sequence hash, and about 36 for each worker that calls it by yet another. No call waits for a
table to be built anew or for a cleared worker's blocks to be taken out one by one.

One thread at a time uses an index; a call holds no lock of the interpreter while it works. Making
the first index of a process compiles its kernels: a second or so from the cache on disk, half a
minute without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from router.changes import Changes
    from router.index_memory import IndexMemory

WORKERS_MAX: Final = 1024
UPKEEP_BLOCKS: Final = 256
UPKEEP_MAX: Final = 1 << 14
_WORD: Final = (1 << 64) - 1

Hashes = NDArray[np.uint64]


class Tier(IntEnum):
    """Best first."""

    G1 = 0
    G2 = 1
    G3 = 2
    G4 = 3


class WorkerId(NamedTuple):
    """What a request can be sent to: one data-parallel rank of an engine instance."""

    instance: int  # as in discovery, unsigned 64 bit
    dp_rank: int = 0

    def __str__(self) -> str:
        return f"{self.instance:x}.{self.dp_rank}"


class Outcome(Enum):
    """What came of an event."""

    DONE = "done"
    PARENT_NOT_FOUND = "parent_not_found"  # nothing stored
    BLOCK_NOT_FOUND = "block_not_found"  # some of those to be removed; the others were
    CAPACITY = "capacity"  # only blocks before the first that had no room are stored
    WORKERS = "workers"  # one more worker than there is room for; nothing stored
    MALFORMED = "malformed"  # as many names as tokens' hashes are needed; nothing stored


OUTCOMES: Final = (
    *(Outcome.DONE, Outcome.PARENT_NOT_FOUND, Outcome.CAPACITY),
    *(Outcome.WORKERS, Outcome.MALFORMED, Outcome.BLOCK_NOT_FOUND),
)
"""By the numbers that kernels and `Index.apply` give them."""


@dataclass(frozen=True, slots=True)
class Matches:
    """How far each worker holds a chain: row `tier`, column `n` belong to `workers[n]`.

    `reach[Tier.G1]` counts leading blocks in G1, `reach[Tier.G2]` leading blocks each in G1 or G2,
    and so on: a row is never below the one before. Columns of None are workers that have left.
    """

    workers: tuple[WorkerId | None, ...]
    reach: NDArray[np.int32]


KERNELS: Final = (
    *("router.index_apply", "router.index_build", "router.index_removal", "router.index_search"),
    *("router.index_store", "router.index_upkeep", "runtime.xxh3"),
)
"""Modules whose import compiles what an index needs (`runtime.kernels`)."""


class Index:
    """At most `capacity` distinct blocks, held by at most `workers_max` workers."""

    _swept_at_once = UPKEEP_MAX  # records; tests take fewer
    _upkeep_blocks = UPKEEP_BLOCKS

    def __init__(self, capacity: int, workers_max: int = WORKERS_MAX) -> None:
        # numba takes a while to import and more to compile: only who has an index pays for it.
        from router import index_apply, index_removal, index_search, index_store, index_tables
        from router.index_memory import IndexMemory

        self._store, self._remove = index_store.store, index_removal.remove
        self._apply = index_apply.apply
        self._name_rows, self._store_rows = index_store.name_rows, index_store.store_rows
        self._find = index_search.find
        self._words = index_tables
        self._capacity = capacity
        self._workers_max = workers_max
        self._workers: tuple[WorkerId | None, ...] = ()
        self._lanes: dict[WorkerId, int] = {}
        self._take(IndexMemory(capacity), [])
        self._outcomes = np.zeros(len(OUTCOMES), dtype=np.int64)

    def __len__(self) -> int:
        """Distinct blocks."""
        return self._memory.held

    @property
    def workers(self) -> tuple[WorkerId | None, ...]:
        """By their columns in `Matches`."""
        return self._workers

    @property
    def outcomes_total(self) -> dict[Outcome, int]:
        """Events by what came of them."""
        return {outcome: int(self._outcomes[n]) for n, outcome in enumerate(OUTCOMES)}

    @property
    def stored_blocks_total(self) -> int:
        """Each counted for every worker; those it had already as well."""
        return int(self._state[self._words.STORED])

    @property
    def removed_blocks_total(self) -> int:
        return int(self._state[self._words.REMOVED])

    @property
    def allocated_bytes(self) -> int:
        return self._memory.allocated_bytes

    def held_blocks(self, worker: WorkerId) -> tuple[int, ...]:
        """How many blocks a worker holds, by tier."""
        lane = self._lanes.get(worker)
        if lane is None:
            return (0,) * len(Tier)
        counts = self._memory.lane_blocks.reshape(-1, len(Tier))[lane]
        return tuple(int(count) for count in counts)

    def stored(
        self, worker: WorkerId, tier: Tier, parent: int | None, names: Hashes, tokens: Hashes
    ) -> Outcome:
        """A chain of blocks is in a worker's tier, following the block it calls `parent`.

        `names` are the engine's hashes, `tokens` the local hashes of the blocks' tokens.
        Arrays given to an index are contiguous and of uint64; others raise TypeError.
        """
        if len(names) != len(tokens):
            return self._counted(self._words.BROKEN)
        lane = self._lanes.get(worker)
        if lane is None:
            if not self._add_lanes((worker,)):
                return self._counted(self._words.NO_LANE)
            lane = self._lanes[worker]
        level = int(tier)  # an enumeration's member would cost the call 20 us
        known, name = parent is not None, 0 if parent is None else parent & _WORD
        while True:
            result = self._store(self._state, lane, level, known, name, names, tokens)
            if result < self._words.NEEDS_RECORDS:
                return self._counted(result, len(names))
            self._memory.make_room(result)

    def stored_rows(
        self, workers: Sequence[WorkerId], tier: Tier, parents: Hashes, tokens: Hashes
    ) -> Outcome:
        """Blocks are in a tier of each of these workers; they need not follow each other.

        `parents` are the sequence hashes of the blocks before them (0: none), `tokens` the local
        hashes. They are called by their sequence hashes. As one event for each worker.
        """
        if len(parents) != len(tokens):
            return self._counted(self._words.BROKEN)
        if not self._add_lanes(workers):
            return self._counted(self._words.NO_LANE)
        lanes = np.array([self._lanes[worker] for worker in workers], dtype=np.uint32)
        names = np.empty(len(tokens), dtype=np.uint64)
        self._name_rows(parents, tokens, names)
        while True:
            result = self._store_rows(self._state, lanes, int(tier), names)
            if result < self._words.NEEDS_RECORDS:
                return self._counted(result, len(names))
            self._memory.make_room(result)

    def removed(self, worker: WorkerId, tier: Tier, names: Hashes) -> Outcome:
        """Blocks have left a worker's tier; in other tiers they stay."""
        lane = self._lanes.get(worker)
        if lane is None:
            return self._counted(self._words.NOT_FOUND if len(names) else self._words.DONE)
        while True:
            result = self._remove(self._state, lane, int(tier), names)
            if result < self._words.NEEDS_RECORDS:
                return self._counted(result, len(names))
            self._memory.make_room(result)

    def cleared(self, worker: WorkerId) -> Outcome:
        """A worker holds nothing any more, in no tier. Its column in `Matches` is another now.

        What its blocks took is given back a little at a time, by later calls that change the
        index and by `upkeep`.
        """
        if self._bury(worker):
            self._add_lanes((worker,))
        return self._counted(self._words.DONE)

    def apply(self, changes: Changes) -> NDArray[np.uint8]:
        """What came of each event, by its place in `OUTCOMES`: zeros where all were applied.

        Of an event for several workers it is what came of it for the first that it was not DONE
        for. Raises TypeError, and applies nothing, if an array is not of uint64.
        """
        outcomes = np.zeros(len(changes), dtype=np.uint8)
        heads, names, tokens = changes.columns()
        state, words = self._state, self._words
        state[words.AT_EVENT] = state[words.AT_NAME] = state[words.AT_TOKEN] = 0
        for workers, stores in changes.groups:
            if stores:
                self._add_lanes(workers)
        groups, lanes = self._lanes_of(changes)
        while (lacking := self._apply(state, heads, names, tokens, groups, lanes, outcomes)) != 0:
            if lacking == words.CLEARING:
                for worker in changes.workers_of(int(state[words.AT_EVENT])):
                    if self._bury(worker):
                        self._add_lanes((worker,))
                state[words.AT_EVENT] += 1
                groups, lanes = self._lanes_of(changes)
            else:
                self._memory.make_room(lacking)
        self._outcomes += np.bincount(outcomes, minlength=len(OUTCOMES))
        if state[words.UPKEEP]:
            self.upkeep(len(names))
        return outcomes

    def remove_worker(self, worker: WorkerId) -> Outcome:
        """A worker is gone, as if cleared; its column is given to another that comes, later."""
        if not self._bury(worker) and worker in self._lanes:
            self._leave(worker)
        return self._counted(self._words.DONE)

    def upkeep(self, blocks: int = 0) -> bool:
        """Give back some of what cleared workers and removed blocks took; whether there is more.

        Every call that changes the index does some, in proportion to its blocks; nothing is wrong
        without. Bounded: well below a millisecond by itself.
        """
        self._memory.upkeep(min(self._upkeep_blocks + 8 * blocks, UPKEEP_MAX))
        return bool(self._state[self._words.UPKEEP])

    def held(self, worker: WorkerId, tier: Tier) -> Hashes:
        """Sequence hashes of what a worker holds in a tier. Costs a pass over all blocks."""
        from router.index_listing import held

        lane = self._lanes.get(worker)
        return np.empty(0, np.uint64) if lane is None else held(self._memory, lane, int(tier))

    def exchange(self, worker: WorkerId, other: WorkerId) -> None:
        """Each holds what the other held, either of them perhaps nothing. Costs next to nothing."""
        workers = list(self._workers)
        lanes = self._lanes.pop(worker, None), self._lanes.pop(other, None)
        for lane, taker in zip(lanes, (other, worker), strict=True):
            if lane is not None:
                workers[lane] = taker
                self._lanes[taker] = lane
        self._workers = tuple(workers)

    def find(self, tokens: Hashes) -> Matches:
        """How far each worker holds the chain of blocks with these local hashes."""
        reach = np.zeros((len(Tier), len(self._workers)), dtype=np.int32)
        self._find(self._state, tokens, reach)
        if self._memory.dying:
            reach[:, list(self._memory.dying)] = 0
        return Matches(self._workers, reach)

    def snapshot(self) -> bytes:
        """Everything held, for `restore` of this version."""
        from router.index_snapshot import pack

        return pack(self._memory, self._workers)

    def restore(self, snapshot: bytes) -> None:
        """Hold what the snapshot's index held, instead of what is held now.

        Raises `SnapshotError`, and changes nothing, where the bytes are no such snapshot or hold
        more than there is room for.
        """
        from router.index_snapshot import unpack

        memory, workers = unpack(snapshot, self._capacity, self._workers_max)
        for word in (self._words.STORED, self._words.REMOVED, self._words.MISSING):
            memory.state[word] = self._state[word]
        self._take(memory, workers)

    def check_integrity(self) -> None:
        """Assert that all parts agree. Costs a pass over everything."""
        from router.index_integrity import check

        check(self._memory, self._workers)

    def _take(self, memory: IndexMemory, workers: list[WorkerId | None]) -> None:
        self._memory = memory
        self._workers = tuple(workers)
        self._lanes = {w: n for n, w in enumerate(workers) if w is not None}
        self._state = memory.state

    def _bury(self, worker: WorkerId) -> bool:
        """Leave what a worker holds behind, with the lane it had; whether it held anything."""
        held = sum(self.held_blocks(worker))
        if held:
            self._state[self._words.REMOVED] += held
            self._memory.bury(self._leave(worker))
            if len(self._memory.sequences) <= self._swept_at_once or self._memory.is_crowded:
                self._memory.finish_sweeps()
        return held > 0

    def _leave(self, worker: WorkerId) -> int:
        lane = self._lanes.pop(worker)
        workers = list(self._workers)
        workers[lane] = None
        self._workers = tuple(workers)
        return lane

    def _add_lanes(self, added: Sequence[WorkerId]) -> bool:
        """Give all of these a lane that have none, or, if there is no room, none of them."""
        new = [worker for worker in added if worker not in self._lanes]
        if not new:
            return True
        if len(self._lanes) + len(new) > self._workers_max:
            return False
        workers = list(self._workers)
        dying = self._memory.dying
        free = [n for n, worker in enumerate(workers) if worker is None and n not in dying]
        for worker in new:
            if free:
                lane = free.pop(0)
                workers[lane] = worker
            else:
                lane = len(workers)
                workers.append(worker)
            self._lanes[worker] = lane
        self._memory.widen(len(workers))
        self._workers = tuple(workers)
        return True

    def _lanes_of(self, changes: Changes) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """For each group where its lanes begin, how many, and whether all workers have one."""
        groups: list[int] = []
        lanes: list[int] = []
        for workers, _ in changes.groups:
            known = [self._lanes[worker] for worker in workers if worker in self._lanes]
            groups += (len(lanes), len(known), len(known) == len(workers))
            lanes += known
        return np.array(groups, dtype=np.int64), np.array(lanes, dtype=np.uint32)

    def _counted(self, result: int, blocks: int = 0) -> Outcome:
        self._outcomes[result] += 1
        if self._state[self._words.UPKEEP]:
            self.upkeep(blocks)
        return OUTCOMES[result]
