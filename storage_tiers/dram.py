"""G2: chunks in the host-memory arena, with leases and claims.

The manager and, through it, engines use the arena by slot: `reserve` a slot, fill it, `commit` it
as a chunk; `claim` a chunk while somebody reads its slot. The `Tier` methods do the same by copy.

Invariants: a slot is free, leased (reserved, not committed) or resident, never two of these; a
claimed chunk is not evicted, and leaves go before their parents (`storage_tiers.recency`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

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
from storage_tiers.codec import checksum
from storage_tiers.eviction import find_victims
from storage_tiers.recency import Recency, Record
from storage_tiers.slabs import SlabAllocator


@dataclass(slots=True)
class Resident(Record):
    """A chunk in host memory. `sealed` once its checksum is known; its pins are claims."""

    generation: int = 0  # of its slot
    sealed: bool = False

    @property
    def slot(self) -> Slot:
        return Slot(self.at, self.chunk.length, self.generation)


class DramTier:
    """Host memory. Not thread-safe: one event loop calls it."""

    name = TierName.DRAM

    def __init__(self, arena: Arena, listener: TierListener) -> None:
        self.arena = arena
        self._listener = listener
        self._slots = SlabAllocator(arena.capacity_bytes)
        self._residents: Recency[Resident] = Recency()
        self._key_at: dict[int, Key] = {}  # slot offset -> resident there
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
            victims = find_victims(self._slots, self._residents, self._key_at, length)
            self._remove(victims, RemovalReason.CAPACITY)
            offset = self._slots.allocate(length)
        if offset is None:
            return None
        slot = Slot(offset, length, self.arena.advance(offset))
        self._leased[offset] = slot
        self.leased_bytes += self._slots.size_of(offset)
        return slot

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
        if chunk.key in self._residents:
            self._free(slot.offset)
            return Known()
        self._residents.add(Resident(chunk, slot.offset, generation=slot.generation, sealed=sealed))
        self._key_at[slot.offset] = chunk.key
        self._stored_bytes += chunk.length
        return Stored()

    def is_leased(self, slot: Slot) -> bool:
        """Whether the slot is reserved and not committed, and has not changed hands."""
        return self._leased.get(slot.offset) == slot

    def seal(self, key: Key, digest: int) -> None:
        """Record the checksum of a resident chunk, once it is computed."""
        resident = self._residents.get(key)
        if resident is not None and not resident.sealed:
            resident.chunk = replace(resident.chunk, checksum=digest)
            resident.sealed = True

    def claim(self, key: Key) -> Resident | None:
        """Promise not to evict the chunk until `unclaim`; None if it is not here."""
        resident = self._residents.get(key)
        if resident is not None:
            resident.pins += 1
            self.claims += 1
        return resident

    def unclaim(self, resident: Resident) -> None:
        """End one claim. A chunk that was removed meanwhile is freed with its last claim."""
        assert resident.pins > 0, "unclaim without claim"
        resident.pins -= 1
        self.claims -= 1
        if resident.gone and resident.pins == 0:
            self._free(resident.at)

    def view(self, slot: Slot) -> memoryview:
        """The slot's bytes, `length` long."""
        return self.arena.view(slot.offset, slot.length)

    def __contains__(self, key: Key) -> bool:
        return key in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def oldest(self, count: int) -> list[Key]:
        """The first keys in eviction order; what the scrubber walks and tests look at."""
        return [r.chunk.key for r in islice(self._residents.records(), count)]

    # -- Tier ----------------------------------------------------------------------------

    async def open(self) -> RecoveryReport:
        return RecoveryReport(self.name)

    async def close(self) -> None:
        return None

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        residents = self._residents
        return [r.chunk if (r := residents.get(key)) is not None else None for key in keys]

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        outcomes = [self._store_one(item) for item in items]
        self.touch([item.chunk.key for item in items])
        return outcomes

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        return [self._load_one(item) for item in items]

    async def remove(self, keys: Sequence[Key]) -> None:
        self._remove(keys, RemovalReason.REQUESTED)

    def touch(self, keys: Sequence[Key]) -> None:
        self._residents.touch(keys)

    def usage(self) -> TierUsage:
        return TierUsage(
            tier=self.name,
            mover="shared-memory",
            capacity_bytes=self.arena.capacity_bytes,
            used_bytes=self._slots.used_bytes,
            chunks=len(self._residents),
            stored_bytes_total=self._stored_bytes,
            loaded_bytes_total=self._loaded_bytes,
            evictions_total=dict(self._evictions),
            corrupt_total=self._corrupt,
        )

    def quarantine(self, key: Key) -> None:
        """Drop a chunk whose bytes are wrong; the slot's generation tells readers."""
        self._corrupt += 1
        self._remove([key], RemovalReason.CORRUPT)

    def count_loaded(self, length: int) -> None:
        """An engine loaded this many bytes out of a slot by itself."""
        self._loaded_bytes += length

    def check_integrity(self) -> None:
        """Assert the invariants of this module. Cost: linear in residents."""
        self._slots.check_integrity()
        self._residents.check_integrity()
        assert self._key_at == {r.at: r.chunk.key for r in self._residents.records()}
        assert not self._key_at.keys() & self._leased.keys()
        assert self.leased_bytes == sum(self._slots.size_of(o) for o in self._leased)
        for resident in self._residents.records():
            assert self.arena.generation(resident.at) == resident.generation

    # -- below ---------------------------------------------------------------------------

    def _store_one(self, item: StoreItem) -> StoreOutcome:
        chunk = item.chunk
        if chunk.key in self._residents:
            return Known()
        slot = self.reserve(chunk.length)
        if slot is None:
            return Full("host memory holds no chunk that can be evicted for this one")
        _copy(item.data, self.view(slot))
        return self.commit(slot, chunk, sealed=True)

    def _load_one(self, item: LoadItem) -> LoadOutcome:
        resident = self.claim(item.key)
        if resident is None:
            return Missing()
        try:
            _copy(self.view(resident.slot), item.into)
            if resident.sealed and checksum(self.view(resident.slot)) != resident.chunk.checksum:
                self.quarantine(item.key)
                return Corrupt("host memory no longer matches its checksum")
        finally:
            self.unclaim(resident)
        self._loaded_bytes += resident.chunk.length
        return Loaded(resident.chunk)

    def _remove(self, keys: Iterable[Key], reason: RemovalReason) -> None:
        removed: list[Key] = []
        for key in keys:
            resident = self._residents.pop(key)
            if resident is None:
                continue
            del self._key_at[resident.at]
            resident.gone = True
            self.arena.advance(resident.at)
            if not resident.pins:
                self._free(resident.at)
            removed.append(key)
        if removed:
            self._evictions[reason.value] += len(removed)
            self._listener.removed(self.name, removed, reason)

    def _end_lease(self, slot: Slot) -> None:
        if self._leased.get(slot.offset) != slot:
            raise ValueError(f"slot at {slot.offset} is not leased with this generation")
        del self._leased[slot.offset]
        self.leased_bytes -= self._slots.size_of(slot.offset)

    def _free(self, offset: int) -> None:
        self.arena.advance(offset)
        self._slots.free(offset)


def _copy(source: memoryview, target: memoryview) -> None:
    target[: len(source)] = source
