"""G2: chunks in the host-memory arena, with leases and claims.

The manager and, through it, engines use the arena by slot: `reserve` a slot, fill it, `commit` it
as a chunk; `claim` a chunk while somebody reads its slot. A claim is answered with the chunk's
record, by which everything else is asked for. The `Tier` methods do the same by copy.

Invariants: a slot is free, leased (reserved, not committed) or resident, never two of these; a
claimed chunk is not evicted, and its slot's generation is the one in its row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from storage_tiers.admission import Admission
from storage_tiers.arena import Arena, Slot
from storage_tiers.base import (
    Chunk,
    Corrupt,
    Full,
    Key,
    Known,
    Loaded,
    LoadItem,
    LoadOutcome,
    Missing,
    RecoveryReport,
    RemovalReason,
    Stored,
    StoreItem,
    StoreOutcome,
    TierListener,
    TierName,
    TierUsage,
)
from storage_tiers.chunk_index import ChunkIndex
from storage_tiers.codec import checksum
from storage_tiers.eviction import Quotas, find_own_victim, find_victims, within_quota
from storage_tiers.leaves import NONE
from storage_tiers.policy import EvictionPolicy, LruPolicy
from storage_tiers.slabs import SlabAllocator


class DramTier:
    """Host memory. Not thread-safe: one event loop calls it."""

    name = TierName.DRAM

    def __init__(
        self,
        arena: Arena,
        listener: TierListener,
        *,
        policy: EvictionPolicy | None = None,
        admission: Admission | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self.arena = arena
        self._listener = listener
        self._slots = SlabAllocator(arena.capacity_bytes)
        self._index = ChunkIndex(LruPolicy() if policy is None else policy, self._free)
        self._admission = admission
        self._quotas = quotas or {}
        self._leased: dict[int, Slot] = {}  # slot offset -> slot reserved, not committed
        self._evictions: Counter[str] = Counter()
        self._stored_bytes = self._loaded_bytes = self._corrupt = 0
        self.leased_bytes = 0
        self.claims = 0

    # -- slots ---------------------------------------------------------------------------

    def reserve(self, length: int) -> Slot | None:
        """A slot to fill, evicting unclaimed chunks if need be. None: no room can be made."""
        offset = self._slots.allocate(length)
        if offset is None and self._slots.fits(length):
            self._remove(find_victims(self._slots, self._index, length), RemovalReason.CAPACITY)
            offset = self._slots.allocate(length)
        if offset is None:
            return None
        slot = Slot(offset, length, self.arena.advance(offset))
        self._leased[offset] = slot
        self.leased_bytes += self._slots.slot_bytes(length)
        return slot

    def adopt(self, slot: Slot) -> None:
        """Reserve exactly this slot of an adopted arena, as the daemon before had it.

        Raises ValueError if it is not as described: another generation, or it overlaps another.
        """
        self._slots.place(slot.offset, slot.length)
        if self.arena.generation(slot.offset) != slot.generation:
            self._slots.free(slot.offset)
            raise ValueError(f"slot at {slot.offset} has changed hands")
        self._leased[slot.offset] = slot
        self.leased_bytes += self._slots.slot_bytes(slot.length)

    def snapshot(self) -> list[tuple[Chunk, Slot]]:
        """Every chunk whose checksum is known and where it lies, coldest first."""
        return [
            (self._index.chunk(record), self.slot(record))
            for record in self._index.coldest_first(self.all_keys())
            if self._index.is_sealed(record)
        ]

    def slot_bytes(self, length: int) -> int:
        """Host memory that a slot of this length takes, padding included."""
        return self._slots.slot_bytes(length)

    def release(self, slot: Slot) -> None:
        """Give back a reserved slot unused. The caller guarantees that nobody writes to it."""
        self._end_lease(slot)
        self._free(slot.offset)

    def commit(self, slot: Slot, chunk: Chunk, *, sealed: bool = False) -> Stored | Known:
        """Make a reserved, filled slot the chunk's residency; if it has one, free the slot."""
        self._end_lease(slot)
        if chunk.key in self._index:
            self._free(slot.offset)
            return Known()
        record = self._index.add(chunk, slot.offset, slot.generation, sealed=sealed)
        self._slots.set_owner(slot.offset, record)
        self._stored_bytes += chunk.length
        return Stored()

    def is_leased(self, slot: Slot) -> bool:
        """Whether the slot is reserved and not committed, and has not changed hands."""
        return self._leased.get(slot.offset) == slot

    def view(self, slot: Slot) -> memoryview:
        """The slot's bytes, `length` long."""
        return self.arena.view(slot.offset, slot.length)

    # -- claims --------------------------------------------------------------------------

    def records(self, keys: Sequence[Key]) -> NDArray[np.int64]:
        """The record of each key, or NONE; valid until anything else is done to the tier."""
        return self._index.records(keys)

    def claim(self, key: Key) -> int | None:
        """Promise not to evict the chunk until `unclaim`; None if it is not here."""
        record = self._index.record(key)
        if record == NONE:
            return None
        self._index.pin(record)
        self.claims += 1
        return record

    def unclaim(self, record: int) -> None:
        """End one claim. A chunk that was removed meanwhile is freed with its last claim."""
        self._index.unpin(record)
        self.claims -= 1

    def claim_all(self, records: NDArray[np.int64]) -> None:
        """Claim each of these different records."""
        self._index.pin_all(records)
        self.claims += len(records)

    def unclaim_all(self, records: NDArray[np.int64]) -> None:
        """End one claim of each of these different records."""
        self._index.unpin_all(records)
        self.claims -= len(records)

    def rows(self, records: NDArray[np.int64]) -> tuple[NDArray[np.uint64], ...]:
        """Of claimed records: offset, length and generation of their slots."""
        return self._index.rows(records)

    def chunk(self, record: int) -> Chunk:
        """The chunk of a claimed record; its checksum is 0 while it is not sealed."""
        return self._index.chunk(record)

    def slot(self, record: int) -> Slot:
        """The slot of a claimed record."""
        index = self._index
        return Slot(index.place(record), index.length(record), index.tag(record))

    def claims_on(self, record: int) -> int:
        """How many claims a claimed record has."""
        return self._index.pins(record)

    def is_resident(self, record: int) -> bool:
        """Whether a claimed record's chunk is still here, not only its bytes."""
        return self._index.is_resident(record)

    def is_sealed(self, record: int) -> bool:
        """Whether the checksum of a claimed record's chunk is known."""
        return self._index.is_sealed(record)

    def seal(self, record: int, digest: int) -> None:
        """Record the checksum of a claimed record's chunk, once it is computed."""
        if not self._index.is_sealed(record):
            self._index.seal(record, digest)

    # -- Tier ----------------------------------------------------------------------------

    def __contains__(self, key: Key) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def some(self, start: int, count: int) -> tuple[list[Key], int]:
        """Some of the keys, from a position on, and the next position; 0: that was the end."""
        return self._index.some(start, count)

    def hottest_first(self, keys: Sequence[Key]) -> list[Key]:
        """Those here, the latest used first, and none before its parent."""
        return [self._index.key(r) for r in reversed(self._index.coldest_first(keys))]

    def all_keys(self) -> list[Key]:
        """All keys, in no order."""
        return self._index.all_keys()

    async def open(self) -> RecoveryReport:
        return RecoveryReport(self.name)

    async def close(self) -> None:
        return None

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        return self._index.find(keys)

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        return [self._store_one(item) for item in items]

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        return [self._load_one(item) for item in items]

    async def remove(self, keys: Sequence[Key]) -> None:
        found = [record for key in keys if (record := self._index.record(key)) != NONE]
        self._remove(list(dict.fromkeys(found)), RemovalReason.REQUESTED)

    def refusal(self, chunk: Chunk) -> str | None:
        """A tenant beyond its quota gives up chunks of its own, as far as they can go."""
        admission = self._admission
        if admission is not None and not self._index.admits(admission, chunk, full=False):
            return "admission"
        while not within_quota(self._index, self._quotas, chunk):
            victim = find_own_victim(self._index, chunk)
            if victim == NONE:
                return "quota"
            self._remove([victim], RemovalReason.QUOTA)
        return None

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        return self._index.touch(keys)[1]

    def usage(self) -> TierUsage:
        return TierUsage(
            tier=self.name,
            mover="shared-memory",
            capacity_bytes=self.arena.capacity_bytes,
            used_bytes=self._slots.used_bytes,
            chunks=len(self._index),
            stored_bytes_total=self._stored_bytes,
            loaded_bytes_total=self._loaded_bytes,
            evictions_total=dict(self._evictions),
            corrupt_total=self._corrupt,
        )

    def quarantine(self, key: Key) -> None:
        """Drop a chunk whose bytes are wrong; the slot's generation tells readers."""
        self._corrupt += 1
        record = self._index.record(key)
        if record != NONE:
            self._remove([record], RemovalReason.CORRUPT)

    def count_loaded(self, length: int) -> None:
        """An engine loaded this many bytes out of a slot by itself."""
        self._loaded_bytes += length

    def check_integrity(self) -> None:
        """Assert the invariants of this module. Cost: linear in residents."""
        self._slots.check_integrity()
        self._index.check_integrity()
        for record in self._index.records(self.all_keys()).tolist():
            place = self._index.place(record)
            assert self._slots.owner(place) == record and place not in self._leased
            assert self.arena.generation(place) == self._index.tag(record)
        assert self.leased_bytes == sum(self._slots.size_of(o) for o in self._leased)

    # -- below ---------------------------------------------------------------------------

    def _store_one(self, item: StoreItem) -> StoreOutcome:
        chunk = item.chunk
        if chunk.key in self._index:
            return Known()
        parent = self._index.parent(chunk)
        if parent != NONE:
            self._index.pin(parent)  # it must not go to make room for its own child
        slot = self.reserve(chunk.length)
        if parent != NONE:
            self._index.unpin(parent)
        if slot is None:
            return Full("host memory holds no chunk that can be evicted for this one")
        _copy(item.data, self.view(slot))
        return self.commit(slot, chunk, sealed=True)

    def _load_one(self, item: LoadItem) -> LoadOutcome:
        record = self.claim(item.key)
        if record is None:
            return Missing()
        try:
            chunk, data = self.chunk(record), self.view(self.slot(record))
            _copy(data, item.into)
            if self.is_sealed(record) and checksum(data) != chunk.checksum:
                self.quarantine(item.key)
                return Corrupt("host memory no longer matches its checksum")
        finally:
            self.unclaim(record)
        self._loaded_bytes += chunk.length
        return Loaded(chunk)

    def _remove(self, records: Sequence[int], reason: RemovalReason) -> None:
        if not records:
            return
        removed = [self._index.key(record) for record in records]
        for record in records:
            self.arena.advance(self._index.place(record))
        self._index.remove_all(records)
        self._evictions[reason.value] += len(removed)
        self._listener.removed(self.name, removed, reason)

    def _end_lease(self, slot: Slot) -> None:
        if self._leased.get(slot.offset) != slot:
            raise ValueError(f"slot at {slot.offset} is not leased with this generation")
        del self._leased[slot.offset]
        self.leased_bytes -= self._slots.slot_bytes(slot.length)

    def _free(self, offset: int) -> None:
        self.arena.advance(offset)
        self._slots.free(offset)


def _copy(source: memoryview, target: memoryview) -> None:
    target[: len(source)] = source
