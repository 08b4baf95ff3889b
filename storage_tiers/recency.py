"""The in-memory index of a tier that evicts: keys to records, in order of use.

Invariant: among resident chunks a parent is always more recently used than its children, so
walking from the oldest meets leaves before their parents. `touch` keeps it whatever order it is
called in. A parent link counts only if it points to a lower position, so that no input can make
a cycle.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from storage_tiers.base import Chunk, Key


@dataclass(slots=True)
class Record:
    """A resident chunk, where it lies, and who keeps it from being evicted."""

    chunk: Chunk
    at: int = 0  # the medium's own address
    stamp: int = 0  # larger is more recent
    pins: int = 0
    gone: bool = False  # removed while pinned: its place is freed with the last pin


R = TypeVar("R", bound=Record)


class Recency(Generic[R]):
    """Records by key, oldest first. All calls are O(1) per key and resident ancestor.

    With `persistent`, `restamped` gathers the stamps that the medium has not been told of.
    """

    def __init__(self, *, persistent: bool = False) -> None:
        self._records: OrderedDict[Key, R] = OrderedDict()
        self._children: dict[Key, set[Key]] = {}
        self._stamp = 0
        self._persistent = persistent
        self.restamped: dict[Key, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: Key) -> R | None:
        return self._records.get(key)

    def records(self) -> Iterable[R]:
        """Every record, oldest first; not to be changed while iterating."""
        return self._records.values()

    def add(self, record: R) -> None:
        """Insert as most recently used. The caller touches the batch's keys afterwards."""
        chunk = record.chunk
        assert chunk.key not in self._records, "a key has one residency"
        self._records[chunk.key] = record
        if chunk.parent is not None:
            self._children.setdefault(chunk.parent, set()).add(chunk.key)

    def restore(self, records: Sequence[R]) -> None:
        """Fill an empty index from stamps that survived a crash, perhaps not all the latest.

        A parent counts as used when its last descendant was.
        """
        assert not self._records, "restore comes first"
        by_key = {record.chunk.key: record for record in records}
        used = {key: record.stamp for key, record in by_key.items()}
        deepest_first = sorted(records, key=lambda record: -record.chunk.position)
        for record in deepest_first:
            parent = record.chunk.parent
            if parent in by_key and by_key[parent].chunk.position < record.chunk.position:
                used[parent] = max(used[parent], used[record.chunk.key])
        for record in sorted(deepest_first, key=lambda record: used[record.chunk.key]):
            self.add(record)
        self._stamp = max(used.values(), default=0)

    def reserve(self, count: int) -> int:
        """The first of `count` consecutive stamps for chunks about to be added."""
        first = self._stamp + 1
        self._stamp += count
        return first

    def pop(self, key: Key) -> R | None:
        record = self._records.pop(key, None)
        if record is None:
            return None
        self.restamped.pop(key, None)
        parent = record.chunk.parent
        if parent is not None:
            siblings = self._children[parent]
            siblings.discard(key)
            if not siblings:
                del self._children[parent]
        return record

    def touch(self, keys: Sequence[Key]) -> None:
        """Mark as used, later keys more recently, and every resident ancestor after them."""
        newest_first: dict[Key, None] = {}
        for key in reversed(keys):
            line: list[Key] = []
            at: Key | None = key if key in self._records else None
            while at is not None and at not in newest_first:
                line.append(at)
                at = self.parent(at)
            newest_first.update(dict.fromkeys(reversed(line)))
        for key in reversed(newest_first):
            self._stamp += 1
            self._records.move_to_end(key)
            self._records[key].stamp = self._stamp
            if self._persistent:
                self.restamped[key] = self._stamp

    def parent(self, key: Key) -> Key | None:
        """The resident parent of a resident chunk."""
        chunk = self._records[key].chunk
        above = self._records.get(chunk.parent) if chunk.parent is not None else None
        if above is None or above.chunk.position >= chunk.position:
            return None
        return above.chunk.key

    def ancestors(self, chunk: Chunk) -> list[R]:
        """Resident ancestors, nearest first, of a chunk that need not be resident itself."""
        found: list[R] = []
        position = chunk.position
        above = self._records.get(chunk.parent) if chunk.parent is not None else None
        while above is not None and above.chunk.position < position:
            found.append(above)
            position = above.chunk.position
            parent = above.chunk.parent
            above = self._records.get(parent) if parent is not None else None
        return found

    def evictable(self, tried_max: int | None = None) -> Iterator[Key]:
        """Keys from the oldest, without pinned chunks and their ancestors. Cost: one walk.

        The walk ends after `tried_max` records.
        """
        needed: set[Key] = set()
        for key, record in islice(self._records.items(), tried_max):
            if record.pins == 0 and key not in needed:
                yield key
                continue
            parent = self.parent(key)
            if parent is not None:
                needed.add(parent)

    def with_descendants(self, keys: Iterable[Key]) -> list[Key]:
        """These keys and all resident descendants, leaves before their parents."""
        found: dict[Key, None] = {}
        waiting = [key for key in keys if key in self._records]
        while waiting:
            key = waiting.pop()
            if key in found:
                continue
            found[key] = None
            waiting.extend(self._children.get(key, ()))
        return sorted(found, key=lambda key: -self._records[key].chunk.position)

    def check_integrity(self) -> None:
        """Assert the module's invariants. Cost: linear."""
        order = {key: index for index, key in enumerate(self._records)}
        linked = 0
        for key, record in self._records.items():
            assert key == record.chunk.key and not record.gone and record.pins >= 0
            parent = self.parent(key)
            assert parent is None or order[parent] > order[key], "a parent is older than its child"
            if record.chunk.parent is not None:
                linked += 1
                assert key in self._children[record.chunk.parent]
        assert linked == sum(len(children) for children in self._children.values())
