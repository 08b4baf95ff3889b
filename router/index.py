"""Which worker holds which block in which tier: what a router asks before it sends a request.

Fed by block events, exact with respect to them. A block is what its tokens and all tokens before
it are, by sequence hash; the hashes that an engine gives its blocks are only names, its own, by
which its events refer to them. Two engines may use one name for different blocks. An engine has
one name for a block: when it stores a block again under another, the other replaces it, and a name
given to a second block is the first one's no more.

No event raises: what cannot be applied is an `Outcome`, counted. Memory is bounded by `capacity`,
about 35 bytes a block however many workers hold it, and as much again for each worker that calls
it by another name. One thread at a time uses an index; a call holds no lock of the interpreter
while it works. Making the first index of a process compiles its kernels: a second or so from the
cache on disk, half a minute without.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from router.index_memory import IndexMemory

WORKERS_MAX: Final = 1024
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


@dataclass(frozen=True, slots=True)
class Matches:
    """How far each worker holds a chain: row `tier`, column `n` belong to `workers[n]`.

    `reach[Tier.G1]` counts leading blocks in G1, `reach[Tier.G2]` leading blocks each in G1 or G2,
    and so on: a row is never below the one before. Columns of None are workers that have left.
    """

    workers: tuple[WorkerId | None, ...]
    reach: NDArray[np.int32]


class Index:
    """At most `capacity` distinct blocks, held by at most `workers_max` workers."""

    def __init__(self, capacity: int, workers_max: int = WORKERS_MAX) -> None:
        # numba takes a while to import and more to compile: only who has an index pays for it.
        from router import index_changes, index_search
        from router.index_memory import IndexMemory

        self._changes = index_changes
        self._find = index_search.find
        self._capacity = capacity
        self._workers_max = workers_max
        self._workers: tuple[WorkerId | None, ...] = ()
        self._lanes: dict[WorkerId, int] = {}
        self._take(IndexMemory(capacity), [])
        self._done_total = 0
        self._failed_total: Counter[Outcome] = Counter()
        self.stored_blocks_total = 0
        self.removed_blocks_total = 0

    def __len__(self) -> int:
        """Distinct blocks."""
        return self._memory.live

    @property
    def workers(self) -> tuple[WorkerId | None, ...]:
        """By their columns in `Matches`."""
        return self._workers

    @property
    def outcomes_total(self) -> dict[Outcome, int]:
        """Events by what came of them."""
        counts = {outcome: self._failed_total[outcome] for outcome in Outcome}
        counts[Outcome.DONE] = self._done_total
        return counts

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
        lane = self._lanes.get(worker)
        start, count, previous = 0, len(names), parent is not None
        if count != len(tokens):
            return self._failed(Outcome.MALFORMED)
        if lane is None:
            lane = self._new_lane(worker)
            if lane is None:
                return self._failed(Outcome.WORKERS)
        level = int(tier)  # an enumeration's member would cost the call 20 us
        name = 0 if parent is None else parent & _WORD
        while True:
            start = self._store(self._state, lane, level, previous, name, names, tokens, start)
            if start == count:
                self.stored_blocks_total += count
                self._done_total += 1
                return Outcome.DONE
            stopped = int(self._state[self._stopped_at])
            if stopped == self._changes.NO_PARENT:
                return self._failed(Outcome.PARENT_NOT_FOUND)
            if stopped == self._changes.FULL:
                self.stored_blocks_total += start
                return self._failed(Outcome.CAPACITY)
            self._memory.make_room(stopped)

    def removed(self, worker: WorkerId, tier: Tier, names: Hashes) -> Outcome:
        """Blocks have left a worker's tier; in other tiers they stay."""
        lane = self._lanes.get(worker)
        if lane is None:
            return self._failed(Outcome.BLOCK_NOT_FOUND) if len(names) else self._done()
        before = int(self._state[self._missing_at])
        start = 0
        while (start := self._remove(self._state, lane, int(tier), names, start)) < len(names):
            self._memory.make_room(int(self._state[self._stopped_at]))
        self._memory.give_back()
        missing = int(self._state[self._missing_at]) - before
        self.removed_blocks_total += len(names) - missing
        return self._failed(Outcome.BLOCK_NOT_FOUND) if missing else self._done()

    def cleared(self, worker: WorkerId) -> Outcome:
        """A worker holds nothing any more, in no tier. Costs a pass over all blocks."""
        lane = self._lanes.get(worker)
        if lane is not None:
            before = sum(self.held_blocks(worker))
            start = 0
            while (start := self._drop(self._state, lane, start)) < len(self._memory.sequences):
                self._memory.make_room(int(self._state[self._stopped_at]))
            self._memory.give_back()
            self.removed_blocks_total += before
        return self._done()

    def remove_worker(self, worker: WorkerId) -> Outcome:
        """A worker is gone; its column is given to the next that comes."""
        outcome = self.cleared(worker)
        lane = self._lanes.pop(worker, None)
        if lane is not None:
            workers = list(self._workers)
            workers[lane] = None
            self._workers = tuple(workers)
        return outcome

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
        self._take(memory, workers)

    def check_integrity(self) -> None:
        """Assert that all parts agree. Costs a pass over everything."""
        from router.index_integrity import check

        check(self._memory, self._workers)

    def _take(self, memory: IndexMemory, workers: list[WorkerId | None]) -> None:
        from router import index_tables

        self._memory = memory
        self._workers = tuple(workers)
        self._lanes = {w: n for n, w in enumerate(workers) if w is not None}
        self._state = memory.state
        self._stopped_at = index_tables.STOPPED
        self._missing_at = index_tables.MISSING
        self._store = self._changes.store
        self._remove = self._changes.remove
        self._drop = self._changes.drop_lane

    def _new_lane(self, worker: WorkerId) -> int | None:
        if len(self._lanes) >= self._workers_max:
            return None
        workers = list(self._workers)
        if None in workers:
            lane = workers.index(None)
            workers[lane] = worker
        else:
            lane = len(workers)
            workers.append(worker)
            self._memory.widen(len(workers))
        self._workers = tuple(workers)
        self._lanes[worker] = lane
        return lane

    def _done(self) -> Outcome:
        self._done_total += 1
        return Outcome.DONE

    def _failed(self, outcome: Outcome) -> Outcome:
        self._failed_total[outcome] += 1
        return outcome
