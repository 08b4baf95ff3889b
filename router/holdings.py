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

from router.index import WORKERS_MAX, Hashes, Tier, WorkerId
from router.index_writer import TIER_OF, IndexWriter
from runtime.events.envelope import U64_MAX, WireError
from runtime.events.node_stream import Rows, Worker
from runtime.events.router_event import Cleared, Removed, RouterEvent, Stored

SLICE_BLOCKS: Final = 4096
"""Of many blocks, so many are worked on in one turn of the event loop."""

RANKS_MAX: Final = 1 << 32
OWNER: Final = 1 << 40
"""An owner's rank in the index, which no worker has."""
STAGED: Final = 1 << 41
"""Added to the rank of what is gathered beside what is held."""

LOWER: Final = (Tier.G2, Tier.G3, Tier.G4)
_OWNED: Final = "cache_owner"


class Holdings:
    """All methods are called from one event loop."""

    def __init__(self, writer: IndexWriter) -> None:
        self._writer = writer
        self.readers: dict[Worker, int] = {}
        self.told: set[WorkerId] = set()  # whose own memory the node spoke of
        self.owners: set[int] = set()
        self.refused_total = 0  # events and rows of one more worker or owner than a node may have
        self._fans: dict[WorkerId, tuple[WorkerId, ...]] = {}

    @property
    def workers(self) -> set[WorkerId]:
        """That hold something, or may."""
        return self.told | {WorkerId(*reader) for reader in self.readers}

    def speaks_for(self, worker: WorkerId) -> bool:
        return worker in self.told or (worker.instance, worker.dp_rank) in self.readers

    def lacks(self, worker: WorkerId) -> bool:
        """The index has nothing of it, and may have had more: somebody else removed it."""
        held = self._writer.settled().held_blocks
        if sum(held(worker)):
            return False
        owner = self.readers.get((worker.instance, worker.dp_rank))
        return worker in self.told or (owner is not None and sum(held(_owner(owner))) > 0)

    @property
    def blocks(self) -> int:
        """Counted once for each owner, and for each worker's own memory."""
        held = self._writer.settled().held_blocks
        owned = sum(sum(held(_owner(owner))) for owner in self.owners)
        return owned + sum(held(worker)[Tier.G1] for worker in self.told)

    def gather(self, event: RouterEvent) -> int:
        """Put an event down with those to be applied next; how many blocks it is about."""
        owned = event.residency_domain == _OWNED
        fan = self._fan(event.worker_id, event.event.dp_rank, owned=owned)
        if fan is None:
            self.refused_total += 1
            return 0
        tier, changes = TIER_OF[event.storage_tier], self._writer.changes
        match event.event.data:
            case Stored() as stored:
                names, tokens = stored.block_hashes, stored.tokens_hashes
                changes.stored(fan, tier, stored.parent_hash, names, tokens)
                return len(names)
            case Removed(names):
                changes.removed(fan, tier, names)
                return len(names)
            case Cleared():
                return self._clear(fan, LOWER if owned else (Tier.G1,))

    def _clear(self, fan: tuple[WorkerId, ...], tiers: Iterable[Tier]) -> int:
        """Those that read an owner hold what it holds, so its list is theirs."""
        count = 0
        for tier in tiers:
            names = self._writer.settled().held(fan[0], tier)
            self._writer.changes.removed(fan, tier, names)
            count += len(names)
        return count

    async def follow(self, readers: Mapping[Worker, int]) -> None:
        """Other workers read the owners now. No event may be applied meanwhile."""
        before, self.readers = self.readers, dict(readers)
        self._fans.clear()
        for reader, owner in before.items():
            if readers.get(reader) != owner:
                for tier in LOWER:
                    for names in _sliced(self._writer.settled().held(WorkerId(*reader), tier)):
                        self._writer.settled().removed(WorkerId(*reader), tier, names)
                        await asyncio.sleep(0)
        for reader, owner in readers.items():
            if before.get(reader) != owner:
                for tier in LOWER:
                    for names in _sliced(self._writer.settled().held(_owner(owner), tier)):
                        # A block by its sequence hash is a first block of that tokens' hash.
                        none = np.zeros(len(names), np.uint64)
                        self._writer.settled().stored_rows([WorkerId(*reader)], tier, none, names)
                        await asyncio.sleep(0)

    async def forget(self) -> None:
        """Nothing is held any more."""
        gone = [*self.workers, *map(_owner, self.owners)]
        self.became(set(), set())
        for worker in gone:
            self._writer.settled().remove_worker(worker)
            await asyncio.sleep(0)

    def became(self, told: set[WorkerId], owners: set[int]) -> None:
        """Whom the node speaks of now, besides those that read."""
        self._fans.clear()
        self.told, self.owners = told, owners

    @asynccontextmanager
    async def stage(self) -> AsyncIterator[Staged]:
        """Room for everything the node holds, beside what is held now; what is not taken over by
        the end is dropped."""
        staged = Staged(self._writer, self)
        try:
            yield staged
        finally:
            await staged.drop()

    def _fan(self, worker_id: int, dp_rank: int, *, owned: bool) -> tuple[WorkerId, ...] | None:
        """Whom an event is put down for; None for one worker or owner too many."""
        key = _owner(worker_id) if owned else WorkerId(worker_id, dp_rank)
        fan = self._fans.get(key)
        if fan is None:
            if len(self._fans) >= WORKERS_MAX:
                return None
            fan = self._fans[key] = self.fan(key)
        if owned:
            self.owners.add(worker_id)
        else:
            self.told.add(key)
        return fan

    def fan(self, key: WorkerId) -> tuple[WorkerId, ...]:
        """A worker, or an owner and those that read it."""
        if key.dp_rank != OWNER:
            return (key,)
        return (key, *(WorkerId(*r) for r, read in self.readers.items() if read == key.instance))


class Staged:
    """A node's snapshot while it comes."""

    def __init__(self, writer: IndexWriter, holdings: Holdings) -> None:
        self._writer = writer
        self._holdings = holdings
        self._workers: set[WorkerId] = set()  # all that something is staged for
        self._told: set[WorkerId] = set()
        self._owners: set[int] = set()

    async def add(self, rows: Rows) -> None:
        """Raises WireError for a worker that cannot be one."""
        if not (0 <= rows.worker_id <= U64_MAX and 0 <= rows.dp_rank < RANKS_MAX):
            raise WireError(f"rows of a worker {rows.worker_id}.{rows.dp_rank}")
        owned = rows.residency_domain == _OWNED
        key = _owner(rows.worker_id) if owned else WorkerId(rows.worker_id, rows.dp_rank)
        if key not in self._workers and len(self._workers) >= WORKERS_MAX:
            self._holdings.refused_total += 1
            return
        if owned:
            self._owners.add(rows.worker_id)
        else:
            self._told.add(key)
        workers = self._holdings.fan(key)
        self._workers.update(workers)
        staged = [_staged(worker) for worker in workers]
        tier = TIER_OF[rows.storage_tier]
        parents, tokens = _words(rows.parents), _words(rows.tokens)
        for first in range(0, len(tokens), SLICE_BLOCKS):
            some = slice(first, first + SLICE_BLOCKS)
            self._writer.settled().stored_rows(staged, tier, parents[some], tokens[some])
            await asyncio.sleep(0)

    def take_over(self) -> None:
        """This is what the node holds, and nothing else is; in one step."""
        holdings = self._holdings
        self._workers |= holdings.workers | set(map(_owner, holdings.owners))
        for worker in self._workers:
            self._writer.settled().exchange(worker, _staged(worker))
        holdings.became(self._told, self._owners)

    async def drop(self) -> None:
        """What is staged, which after `take_over` is what was held before."""
        for worker in self._workers:
            self._writer.settled().remove_worker(_staged(worker))
            await asyncio.sleep(0)


def _owner(owner: int) -> WorkerId:
    return WorkerId(owner, OWNER)


def _staged(worker: WorkerId) -> WorkerId:
    return WorkerId(worker.instance, worker.dp_rank + STAGED)


def _words(data: bytes) -> Hashes:
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)


def _sliced(names: Hashes) -> Iterable[Hashes]:
    return (names[first : first + SLICE_BLOCKS] for first in range(0, len(names), SLICE_BLOCKS))
