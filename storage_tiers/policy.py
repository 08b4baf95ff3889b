"""Which chunk goes first: eviction policies that know neither tier nor medium.

An index gives each resident chunk a small number, its record, and tells the policy of every
arrival, use and removal. Invariant: `victims` offers only leaves, chunks without resident
children, so a parent never goes before its children and no chunk is kept that nothing reaches.
Calls are O(log n) at most, amortised, but where they say otherwise. Nothing is random; time comes
from the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from storage_tiers.admission import Ghosts
from storage_tiers.leaves import NONE, Leaves

SMALL_PART: Final = 0.1
"""Of S3-FIFO's residents, in the queue that one-hit chunks do not leave; the paper's value."""


class EvictionPolicy(Protocol):
    """The seam. `key` is a 64-bit fingerprint of the chunk's key, evenly distributed, not 0.

    The caller guarantees: a record is used again only after `removed`; an arrival's parent is
    resident; `now_s` does not fall. The use of a sequence is one `hit` for each of its resident
    chunks, one after the other along it, deepest first or last, before its new chunks arrive.
    """

    def inserted(
        self,
        record: int,
        key: int,
        now_s: float,
        *,
        parent: int,
        cost_s: float,
        size_bytes: int,
    ) -> None:
        """A chunk has arrived. `cost_s`: seconds that an engine needs to compute it again."""
        ...

    def hit(self, record: int, key: int, now_s: float) -> None: ...

    def removed(self, record: int, key: int) -> None:
        """The chunk has left, evicted or not. Linear if it leaves resident children behind."""
        ...

    def victims(self) -> Iterator[int]:
        """Records in the order in which to evict them.

        The caller removes what was yielded last, or leaves it (pinned) and takes the next. Any
        other call ends the walk. A parent may come up once its last child was removed.
        """
        ...

    def detach(self, records: Sequence[int]) -> None:
        """These are about to leave: children that stay have no parent any more. Linear."""
        ...

    def restore(
        self,
        parents: Sequence[int],
        used_s: Sequence[float],
        *,
        costs_s: Sequence[float],
        sizes_bytes: Sequence[int],
    ) -> None:
        """Fill an empty policy with records 0, 1, ... from the least to the most recently used.

        `used_s`, when each was used last, does not fall. Parents may have any number, or NONE.
        """
        ...

    def used_s(self, record: int) -> int:
        """The second of a resident record's last use; of one with children, of its own."""
        ...

    def check_integrity(self) -> None:
        """Assert the module's invariants. Cost: linear."""
        ...


class LruPolicy(Leaves):
    """The least recently used goes first, by the second and then by the order of calls."""

    def inserted(
        self,
        record: int,
        key: int,
        now_s: float,
        *,
        parent: int,
        cost_s: float,
        size_bytes: int,
    ) -> None:
        self._place(record, int(now_s), 0, parent)

    def hit(self, record: int, key: int, now_s: float) -> None:
        self._move(record, int(now_s), 0)

    def victims(self) -> Iterator[int]:
        record = NONE
        while (record := self._head(0)) != NONE:
            yield record
            if self._children[record] == 0:
                break
        yield from self._rest(0, record)


class S3FifoPolicy(Leaves):
    """Three queues that one-hit chunks cannot flush (S3-FIFO, SOSP'23).

    New chunks wait in the small queue and go to the main one if used twice meanwhile, or if a
    ghost says that they left the small queue lately. Use is counted to 3, never reordered.
    """

    _SMALL: Final = 0
    _MAIN: Final = 1

    def __init__(self) -> None:
        super().__init__()
        self._ghosts = Ghosts()
        self._members = [0, 0]  # with those that are not leaves

    def inserted(
        self,
        record: int,
        key: int,
        now_s: float,
        *,
        parent: int,
        cost_s: float,
        size_bytes: int,
    ) -> None:
        queue = self._MAIN if key in self._ghosts else self._SMALL
        self._place(record, 0, queue, parent)
        self._mark[record] = 0
        self._members[queue] += 1
        if not self._count & 255:
            self._ghosts.fit_to(self._count)

    def hit(self, record: int, key: int, now_s: float) -> None:
        if self._mark[record] < 3:
            self._mark[record] += 1

    def removed(self, record: int, key: int) -> None:
        queue = self._queue[record]
        self._members[queue] -= 1
        if queue == self._SMALL:
            self._ghosts.add(key)
        super().removed(record, key)

    def victims(self) -> Iterator[int]:
        passed = NONE
        while (record := self._next()) != NONE:
            yield record
            if self._children[record] == 0:
                passed = record
                break
        yield from self._rest(self._SMALL, passed)
        yield from self._rest(self._MAIN, passed)

    def restore(
        self,
        parents: Sequence[int],
        used_s: Sequence[float],
        *,
        costs_s: Sequence[float],
        sizes_bytes: Sequence[int],
    ) -> None:
        """All of it into the main queue, in that order; time means nothing here."""
        super().restore(parents, [0.0] * len(parents), costs_s=costs_s, sizes_bytes=sizes_bytes)
        self._members[self._MAIN] = len(parents)

    def _restored_queue(self, cost_per_byte: float) -> int:
        return self._MAIN

    def _next(self) -> int:
        """Move what is in use until one is found that is not. Each move uses up a use."""
        while True:
            small, main = self._head(self._SMALL), self._head(self._MAIN)
            over = self._members[self._SMALL] > SMALL_PART * self._count
            if small != NONE and (over or main == NONE):
                if self._mark[small] < 2:
                    return small
                self._mark[small] = 0
                self._members[self._SMALL] -= 1
                self._members[self._MAIN] += 1
                self._move(small, 0, self._MAIN)
            elif main != NONE:
                if not self._mark[main]:
                    return main
                self._mark[main] -= 1
                self._move(main, 0, self._MAIN)
            else:
                return NONE

    def _inherited(self, parent: int, child: int) -> int:
        return self._queue[parent]
