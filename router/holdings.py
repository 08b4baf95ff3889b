"""What one node's engines and tiers hold, in the router's index.

Blocks in an engine's own memory are its worker's. Blocks in host memory, on the SSD and in S3 are
an owner's: they are put down for each worker that reads that owner, and for the owner itself under
a `WorkerId` that no request can go to. So a worker that joins an owner gets its blocks from the
index, without a question. Sets of holders are kept once each, so an owner costs no memory a block.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import numpy as np

from router.index import Hashes, Index, Tier, WorkerId
from router.worker_feed import TIER_OF
from runtime.events.node_stream import Rows, Worker
from runtime.events.router_event import Cleared, Removed, RouterEvent, Stored
from runtime.hashing import sequence_hashes

SLICE_BLOCKS: Final = 16384
"""Of many blocks, so many are worked on in one turn of the event loop."""

OWNER: Final = 1 << 40
"""An owner's rank in the index; those of workers have 32 bits."""
STAGED: Final = 1 << 41
"""Added to the rank of what is gathered beside what is held."""

LOWER: Final = (Tier.G2, Tier.G3, Tier.G4)
_OWNED: Final = "cache_owner"


class Holdings:
    """All methods are called from one event loop."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.readers: dict[Worker, int] = {}
        self.workers: set[WorkerId] = set()  # that hold, or held, or read something
        self.owners: set[int] = set()

    @property
    def blocks(self) -> int:
        """Counted once for each owner, and for each worker's own memory."""
        held = self._index.held_blocks
        owned = sum(sum(held(_owner(owner))) for owner in self.owners)
        return owned + sum(held(worker)[Tier.G1] for worker in self.workers)

    def apply(self, event: RouterEvent) -> int:
        """How many blocks changed hands, or were to."""
        owned = event.residency_domain == _OWNED
        workers = self._held_by(event.worker_id, event.event.dp_rank, owned=owned)
        tier = TIER_OF[event.storage_tier]
        match event.event.data:
            case Stored() as stored:
                store(self._index, workers, tier, stored)
                return len(stored.tokens_hashes)
            case Removed(names):
                for worker in workers:
                    self._index.removed(worker, tier, names)
                return len(names)
            case Cleared():
                for worker in workers:
                    for one in LOWER if owned else (Tier.G1,):
                        self._index.removed(worker, one, self._index.held(worker, one))
                return 0

    async def follow(self, readers: Mapping[Worker, int]) -> None:
        """Other workers read the owners now. No event may be applied meanwhile."""
        before, self.readers = self.readers, dict(readers)
        for reader, owner in before.items():
            if readers.get(reader) != owner:
                worker = WorkerId(*reader)
                for tier in LOWER:
                    for names in _sliced(self._index.held(worker, tier)):
                        self._index.removed(worker, tier, names)
                        await asyncio.sleep(0)
        for reader, owner in readers.items():
            self.workers.add(WorkerId(*reader))
            if before.get(reader) != owner:
                for tier in LOWER:
                    for names in _sliced(self._index.held(_owner(owner), tier)):
                        add(self._index, [WorkerId(*reader)], tier, names)
                        await asyncio.sleep(0)

    async def forget(self) -> None:
        """Nothing is held any more."""
        gone = [*self.workers, *map(_owner, self.owners)]
        self.workers, self.owners = {WorkerId(*reader) for reader in self.readers}, set()
        for worker in gone:
            self._index.remove_worker(worker)
            await asyncio.sleep(0)

    @asynccontextmanager
    async def stage(self) -> AsyncIterator[Staged]:
        """Room for everything the node holds, beside what is held now; what is not taken over by
        the end is dropped."""
        staged = Staged(self._index, self)
        try:
            yield staged
        finally:
            await staged.drop()

    def _held_by(self, worker_id: int, dp_rank: int, *, owned: bool) -> list[WorkerId]:
        """Whom an event is put down for."""
        if not owned:
            worker = WorkerId(worker_id, dp_rank)
            self.workers.add(worker)
            return [worker]
        self.owners.add(worker_id)
        return [_owner(worker_id), *self.reading(worker_id)]

    def reading(self, owner: int) -> list[WorkerId]:
        return [WorkerId(*reader) for reader, read in self.readers.items() if read == owner]


class Staged:
    """A node's snapshot while it comes."""

    def __init__(self, index: Index, holdings: Holdings) -> None:
        self._index = index
        self._holdings = holdings
        self._workers: set[WorkerId] = set()
        self._owners: set[int] = set()

    async def add(self, rows: Rows) -> None:
        workers = [WorkerId(rows.worker_id, rows.dp_rank)]
        if rows.residency_domain == _OWNED:
            self._owners.add(rows.worker_id)
            workers = [_owner(rows.worker_id), *self._holdings.reading(rows.worker_id)]
        self._workers.update(workers)
        tier = TIER_OF[rows.storage_tier]
        parents, tokens = _words(rows.parents), _words(rows.tokens)
        staged = [_staged(worker) for worker in workers]
        for first in range(0, len(tokens), SLICE_BLOCKS):
            some = slice(first, first + SLICE_BLOCKS)
            add_rows(self._index, staged, tier, parents[some], tokens[some])
            await asyncio.sleep(0)

    def take_over(self) -> None:
        """This is what the node holds, and nothing else is; in one step."""
        holdings = self._holdings
        found = {worker for worker in self._workers if worker.dp_rank < OWNER}
        self._workers |= holdings.workers | set(map(_owner, holdings.owners))
        for worker in self._workers:
            self._index.exchange(worker, _staged(worker))
        holdings.owners = self._owners
        holdings.workers = found | {WorkerId(*reader) for reader in holdings.readers}

    async def drop(self) -> None:
        """What is staged, which after `take_over` is what was held before."""
        for worker in self._workers:
            self._index.remove_worker(_staged(worker))
            await asyncio.sleep(0)


def store(index: Index, workers: list[WorkerId], tier: Tier, stored: Stored) -> None:
    parent = [] if stored.parent_hash is None else [stored.parent_hash]
    chain = sequence_hashes(np.array([*parent, *stored.tokens_hashes.tolist()], np.uint64))
    add(index, workers, tier, chain[len(parent) :])


def add_rows(
    index: Index, workers: list[WorkerId], tier: Tier, parents: Hashes, tokens: Hashes
) -> None:
    names = [
        sequence_hashes(np.array([p, t] if p else [t], np.uint64))[-1]
        for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)
    ]
    add(index, workers, tier, np.array(names, np.uint64))


def add(index: Index, workers: list[WorkerId], tier: Tier, names: Hashes) -> None:
    for worker in workers:
        for n in range(len(names)):
            index.stored(worker, tier, None, names[n : n + 1], names[n : n + 1])


def _owner(owner: int) -> WorkerId:
    return WorkerId(owner, OWNER)


def _staged(worker: WorkerId) -> WorkerId:
    return WorkerId(worker.instance, worker.dp_rank + STAGED)


def _words(data: bytes) -> Hashes:
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)


def _sliced(names: Hashes) -> Iterable[Hashes]:
    return (names[first : first + SLICE_BLOCKS] for first in range(0, len(names), SLICE_BLOCKS))
