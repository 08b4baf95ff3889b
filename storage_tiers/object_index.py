"""What the S3 tier knows of the objects in its bucket: its own and those other nodes wrote.

Objects are kept in the order of their names, which is the order of their creation. A key may be in
several objects (two nodes stored it at a time); it is here as long as one of them is.
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from storage_tiers.base import Chunk, Key, tenant_of
from storage_tiers.objects import ObjectName

_DELETED_MAX: Final = 4096  # names remembered, so that a listing made before does not bring back


@dataclass(slots=True, eq=False)
class StoredObject:
    """An object and its chunks; those of other nodes are known in full once loaded."""

    name: str
    created_ms: int
    size_bytes: int
    chunks: list[Chunk]  # without their notes
    tail_bytes: int = 0  # of their notes, behind the records
    is_tail_read: bool = False
    pins: int = 0  # loads under way
    ignored: set[Key] = field(default_factory=set)  # damaged or removed here

    @property
    def tail_at(self) -> int:
        return self.size_bytes - self.tail_bytes

    @property
    def tenant(self) -> int:
        """The tag of the tenant whose chunks it holds: those of one sequence."""
        return tenant_of(self.chunks[0].key)

    def index_of(self, key: Key) -> int:
        return next(index for index, chunk in enumerate(self.chunks) if chunk.key == key)


class ObjectIndex:
    """Objects by name and by key."""

    def __init__(self) -> None:
        self._objects: dict[str, StoredObject] = {}
        self._names: list[str] = []  # sorted
        self._holders: dict[Key, tuple[StoredObject, ...]] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self.used_bytes = 0
        self.tenant_bytes: Counter[int] = Counter()  # by tag of each object's first key

    def __len__(self) -> int:
        return len(self._holders)

    def __contains__(self, name: str) -> bool:
        return name in self._objects

    def get(self, name: str) -> StoredObject | None:
        return self._objects.get(name)

    def names(self) -> list[str]:
        return list(self._names)

    def holder(self, key: Key) -> StoredObject | None:
        """An object that has the key."""
        holders = self._holders.get(key)
        return holders[0] if holders is not None else None

    def chunk(self, key: Key) -> Chunk | None:
        holder = self.holder(key)
        return holder.chunks[holder.index_of(key)] if holder is not None else None

    def add(self, name: str, parts: ObjectName, chunks: Iterable[Chunk] | None = None) -> list[Key]:
        """Add an object; returns the keys that were not here before.

        Without `chunks`, as for another node's object, they have only key and length.
        """
        if name in self._objects or name in self._deleted:
            return []
        known = (
            (_named(key, parts) for key in parts.keys)
            if chunks is None
            else (replace(chunk, note=b"") for chunk in chunks)
        )
        added = StoredObject(
            name,
            parts.created_ms,
            parts.size_bytes,
            list(known),
            parts.tail_bytes,
            is_tail_read=chunks is not None,
        )
        self._objects[name] = added
        bisect.insort(self._names, name)
        self.used_bytes += added.size_bytes
        self.tenant_bytes[added.tenant] += added.size_bytes
        fresh: list[Key] = []
        for chunk in added.chunks:
            holders = self._holders.get(chunk.key, ())
            if not holders:
                fresh.append(chunk.key)
            if added not in holders:
                self._holders[chunk.key] = (*holders, added)
        return fresh

    def drop(self, name: str) -> list[Key]:
        """Forget an object; returns the keys that are nowhere any more."""
        dropped = self._objects.pop(name, None)
        if dropped is None:
            return []
        del self._names[bisect.bisect_left(self._names, name)]
        self.used_bytes -= dropped.size_bytes
        self.tenant_bytes[dropped.tenant] -= dropped.size_bytes
        self._deleted[name] = None
        if len(self._deleted) > _DELETED_MAX:
            self._deleted.popitem(last=False)
        return [
            chunk.key
            for chunk in dropped.chunks
            if chunk.key not in dropped.ignored and self._release(chunk.key, dropped)
        ]

    def ignore(self, stored: StoredObject, key: Key) -> bool:
        """Forget one key of an object; whether it is nowhere any more."""
        if key in stored.ignored or self._objects.get(stored.name) is not stored:
            return False
        stored.ignored.add(key)
        return self._release(key, stored)

    def holders(self, key: Key) -> tuple[StoredObject, ...]:
        return self._holders.get(key, ())

    def oldest(self) -> Iterator[StoredObject]:
        """Objects in the order of creation, but those that are being loaded."""
        for name in self._names:
            stored = self._objects[name]
            if stored.pins == 0:
                yield stored

    def check_integrity(self) -> None:
        """Assert that the tables agree. Cost: linear."""
        assert self._names == sorted(self._objects)
        assert self.used_bytes == sum(o.size_bytes for o in self._objects.values())
        holders: dict[Key, set[str]] = {}
        for stored in self._objects.values():
            for chunk in stored.chunks:
                if chunk.key not in stored.ignored:
                    holders.setdefault(chunk.key, set()).add(stored.name)
        assert holders == {key: {o.name for o in found} for key, found in self._holders.items()}

    def _release(self, key: Key, stored: StoredObject) -> bool:
        left = tuple(holder for holder in self._holders.get(key, ()) if holder is not stored)
        if left:
            self._holders[key] = left
            return False
        return self._holders.pop(key, None) is not None


def _named(key: Key, parts: ObjectName) -> Chunk:
    return Chunk(key, parts.length, 0, None, 0)
