"""A tier in a dictionary: the reference the conformance suite and the manager's tests run on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

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
from storage_tiers.leaves import NONE
from storage_tiers.policy import LruPolicy


class MemoryTier:
    """Keeps copies of chunks under any tier name. Nothing survives it."""

    def __init__(
        self, capacity_bytes: int, listener: TierListener, *, name: TierName = TierName.DRAM
    ) -> None:
        self._name = name
        self._capacity_bytes = capacity_bytes
        self._listener = listener
        self._index = ChunkIndex(LruPolicy(), lambda _: None)
        self.refuse: Callable[[Chunk], str | None] = lambda _: None  # tests have their own
        self.contents: dict[Key, bytearray] = {}  # tests corrupt chunks here
        self.notes: dict[Key, bytes] = {}
        self._used_bytes = self._stored_bytes = self._loaded_bytes = self._corrupt = 0
        self._evictions: Counter[str] = Counter()

    @property
    def name(self) -> TierName:
        return self._name

    async def open(self) -> RecoveryReport:
        return RecoveryReport(self._name)

    async def close(self) -> None:
        return None

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        return self._index.find(keys)

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        return [self._store_one(item) for item in items]

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        return [self._load_one(item) for item in items]

    async def remove(self, keys: Sequence[Key]) -> None:
        self._drop(keys, RemovalReason.REQUESTED)

    def refusal(self, chunk: Chunk) -> str | None:
        return self.refuse(chunk)

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        return self._index.touch(keys)[1]

    def usage(self) -> TierUsage:
        return TierUsage(
            tier=self._name,
            mover="memory",
            capacity_bytes=self._capacity_bytes,
            used_bytes=self._used_bytes,
            chunks=len(self._index),
            stored_bytes_total=self._stored_bytes,
            loaded_bytes_total=self._loaded_bytes,
            evictions_total=dict(self._evictions),
            corrupt_total=self._corrupt,
        )

    def check_integrity(self) -> None:
        self._index.check_integrity()
        assert set(self._index.all_keys()) == self.contents.keys()
        assert self._used_bytes == sum(map(len, self.contents.values())) <= self._capacity_bytes

    def _store_one(self, item: StoreItem) -> StoreOutcome:
        chunk = item.chunk
        if chunk.key in self._index:
            return Known()
        if not self._make_room(chunk):
            return Full("nothing but the chunk's own ancestors could be evicted for it")
        self.contents[chunk.key] = bytearray(item.data)
        self.notes[chunk.key] = chunk.note
        self._used_bytes += chunk.length
        self._stored_bytes += chunk.length
        self._index.add(chunk, 0)
        return Stored()

    def _make_room(self, chunk: Chunk) -> bool:
        """Evict until the chunk fits, but not its parent, and with it none of its ancestors."""
        if chunk.length > self._capacity_bytes:
            return False
        parent = self._index.parent(chunk)
        while self._used_bytes + chunk.length > self._capacity_bytes:
            victim = next((r for r in self._index.evictable() if r != parent), NONE)
            if victim == NONE:
                return False
            self._drop([self._index.key(victim)], RemovalReason.CAPACITY)
        return True

    def _load_one(self, item: LoadItem) -> LoadOutcome:
        (chunk,) = self._index.find([item.key])
        if chunk is None:
            return Missing()
        data = self.contents[item.key]
        if checksum(data) != chunk.checksum:
            self._corrupt += 1
            self._drop([item.key], RemovalReason.CORRUPT)
            return Corrupt("the bytes do not match the checksum")
        item.into[: len(data)] = data
        self._loaded_bytes += len(data)
        return Loaded(replace(chunk, note=self.notes[item.key]))

    def _drop(self, keys: Iterable[Key], reason: RemovalReason) -> None:
        removed = [key for key in dict.fromkeys(keys) if key in self._index]
        self._index.remove_all([self._index.record(key) for key in removed])
        for key in removed:
            self._used_bytes -= len(self.contents.pop(key))
            del self.notes[key]
        if removed:
            self._evictions[reason.value] += len(removed)
            self._listener.removed(self._name, removed, reason)
