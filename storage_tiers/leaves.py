"""What every eviction policy keeps: a tree of records, and its leaves in queues by time.

Only leaves, chunks without resident children, are offered for eviction, so a parent never goes
before its children and no chunk is kept that nothing reaches.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

NONE: Final = -1
"""No record: the parent of a chunk whose parent is not resident."""
QUEUES: Final = 1 << 16


class Rings:
    """Numbered things in rings by queue and second, the oldest at the head; 14 bytes for each."""

    def __init__(self) -> None:
        self._after = array("i")
        self._before = array("i")
        self._tick = array("I")
        self._queue = array("H")
        self._ring: dict[int, int] = {}  # tick * QUEUES + queue -> head, or NONE
        self._ticks: dict[int, list[int]] = {}  # queue -> ticks of its rings, ascending

    def state_bytes(self) -> int:
        """Of the columns, for all that was ever in use at once. The rings' heads come on top."""
        columns = (column for column in vars(self).values() if isinstance(column, array))
        return sum(column.itemsize * len(column) for column in columns)

    def _opened(self, queue: int) -> None:
        """A queue that had no ring has one."""

    def _link(self, thing: int, *, first: bool = False) -> None:
        queue, tick = self._queue[thing], self._tick[thing]
        at = tick * QUEUES + queue
        head = self._ring.get(at)
        after, before = self._after, self._before
        if head is None or head == NONE:
            if head is None:
                ticks = self._ticks.get(queue)
                if ticks is None:
                    self._ticks[queue] = [tick]
                    self._opened(queue)
                elif tick > ticks[-1]:
                    ticks.append(tick)
                else:
                    insort(ticks, tick)
            self._ring[at] = after[thing] = before[thing] = thing
            return
        last = before[head]
        after[last] = before[head] = thing
        before[thing], after[thing] = last, head
        if first:
            self._ring[at] = thing

    def _unlink(self, thing: int) -> None:
        at = self._tick[thing] * QUEUES + self._queue[thing]
        after, before = self._after[thing], self._before[thing]
        if after == thing:
            self._ring[at] = NONE  # stays known to _ticks until the walk comes by
            return
        self._after[before] = after
        self._before[after] = before
        if self._ring[at] == thing:
            self._ring[at] = after

    def _head(self, queue: int, end: int = 0) -> int:
        """The first thing of a queue's oldest second, or with end -1 of its newest."""
        ticks = self._ticks.get(queue)
        while ticks:
            at = ticks[end] * QUEUES + queue
            head = self._ring[at]
            if head != NONE:
                return head
            ticks.pop(end)
            del self._ring[at]
        self._ticks.pop(queue, None)
        return NONE

    def _walk(self, queue: int) -> Iterator[int]:
        """All of a queue from the oldest. Whoever walks may unlink what was yielded last."""
        for tick in list(self._ticks.get(queue, ())):
            yield from list(self._around(self._ring.get(tick * QUEUES + queue, NONE)))

    def _around(self, head: int) -> Iterator[int]:
        thing = head
        while thing != NONE:
            yield thing
            thing = self._after[thing]
            if thing == head:
                return

    def _check_rings(self, linked: set[int]) -> None:
        """Assert that the rings hold these, each where its second and queue say."""
        found = []
        for at, head in self._ring.items():
            assert at // QUEUES in self._ticks[at % QUEUES]
            for thing in self._around(head):
                found.append(thing)
                assert self._before[self._after[thing]] == thing
                assert self._tick[thing] * QUEUES + self._queue[thing] == at
        assert len(found) == len(linked) and set(found) == linked

    def _grow_rings(self, more: int) -> None:
        for column in (self._after, self._before, self._tick, self._queue):
            column.frombytes(bytes(column.itemsize * more))


class Leaves(Rings):
    """Parents, and the leaves in rings; 23 bytes for each record.

    A parent counts as used when its last descendant was, so it enters its ring at the head: it is
    the next to go there. Columns are indexed by record.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parent = array("i")
        self._children = array("i")  # how many are resident; NONE: the record is not
        self._mark = array("B")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def used_s(self, record: int) -> int:
        """The second of a resident record's last use; of one with children, of its own."""
        return self._tick[record]

    def removed(self, record: int, key: int) -> None:
        children = self._children[record]
        assert children >= 0, "only a resident chunk is removed"
        if children:
            orphan(record, self._parent, self._children)
        else:
            self._unlink(record)
        self._children[record] = NONE
        self._count -= 1
        parent = self._parent[record]
        if parent >= 0:
            self._children[parent] -= 1
            if self._tick[parent] <= self._tick[record]:
                self._tick[parent] = self._tick[record]
                self._queue[parent] = self._inherited(parent, record)
            if not self._children[parent]:
                self._link(parent, first=True)

    def detach(self, records: Sequence[int]) -> None:
        """These are about to leave: children that stay have no parent any more. Linear."""
        for record in left_behind(records, self._parent, self._children):
            parent, self._parent[record] = self._parent[record], NONE
            self._children[parent] -= 1
            if not self._children[parent]:
                self._link(parent, first=True)

    def restore(
        self,
        parents: Sequence[int],
        used_s: Sequence[float],
        *,
        costs_s: Sequence[float],
        sizes_bytes: Sequence[int],
    ) -> None:
        assert not self._count, "restore comes first"
        self._grow(len(parents))
        self._count = len(parents)
        links = np.asarray(parents, dtype=np.int64)
        above = np.bincount(links[links != NONE], minlength=len(parents))
        for record, parent in enumerate(parents):
            self._parent[record] = parent
            self._children[record] = int(above[record])
            self._tick[record] = int(used_s[record])
            self._queue[record] = self._restored_queue(costs_s[record] / sizes_bytes[record])
            if not above[record]:
                self._link(record)

    def check_integrity(self) -> None:
        """Assert the class's invariants. Cost: linear."""
        resident = check_family(self._parent, self._children)
        assert len(resident) == self._count
        self._check_rings({record for record in resident if not self._children[record]})

    def _place(self, record: int, tick: int, queue: int, parent: int) -> None:
        """Make a record resident, as a leaf. Its parent is one no longer."""
        if record >= len(self._parent):
            self._grow(record)
        assert self._children[record] == NONE, "a record is given out once"
        self._parent[record] = parent
        self._children[record] = 0
        self._tick[record] = tick
        self._queue[record] = queue
        self._count += 1
        if parent >= 0:
            if not self._children[parent]:
                self._unlink(parent)
            self._children[parent] += 1
        self._link(record)

    def _move(self, record: int, tick: int, queue: int) -> None:
        """Make a record the newest of a queue's second; one with children has no place yet."""
        leaf = not self._children[record]
        if leaf:
            self._unlink(record)
        self._tick[record] = tick
        self._queue[record] = queue
        if leaf:
            self._link(record)

    def _inherited(self, parent: int, child: int) -> int:
        """The queue of a parent whose child, used as lately as itself, leaves."""
        return self._queue[child]

    def _restored_queue(self, cost_per_byte: float) -> int:
        """The queue of a record that was here before the policy."""
        return 0

    def _rest(self, queue: int, passed: int) -> Iterator[int]:
        """All leaves of a queue from the oldest, and their parents, without the one passed over."""
        for leaf in self._walk(queue):
            record = leaf
            while record != passed:
                yield record
                parent = self._parent[record]
                if self._children[record] == 0 or parent == NONE or self._children[parent]:
                    break
                record = parent

    def _grow(self, record: int) -> None:
        more = grown_by(len(self._parent), record)
        for signed in (self._parent, self._children):
            signed.extend(array("i", [NONE]) * more)
        self._mark.frombytes(bytes(more))
        self._grow_rings(more)


def grown_by(size: int, record: int) -> int:
    """By how many entries columns of this size grow for a record: a sixteenth at least."""
    return max(size // 16, record + 1 - size, 64)


def orphan(record: int, parent: array[int], children: array[int]) -> None:
    """Leave a record's resident children without a parent. Cost: linear."""
    parents = np.frombuffer(parent, dtype=np.int32)
    resident = np.frombuffer(children, dtype=np.int32) != NONE
    parents[(parents == record) & resident] = NONE


def left_behind(records: Sequence[int], parent: array[int], children: array[int]) -> list[int]:
    """The resident children of these that are not among them. Cost: linear."""
    leaving = np.zeros(len(parent) + 1, dtype=bool)  # NONE is the last entry
    leaving[np.asarray(records, dtype=np.int64)] = True
    parents = np.frombuffer(parent, dtype=np.int32)
    resident = np.frombuffer(children, dtype=np.int32) != NONE
    staying: list[int] = np.flatnonzero(leaving[parents] & resident & ~leaving[:-1]).tolist()
    return staying


def check_family(parent: array[int], children: array[int]) -> list[int]:
    """Assert that the counts of children are true. All resident records."""
    resident = [record for record, count in enumerate(children) if count != NONE]
    counted = [0] * len(children)
    for record in resident:
        if parent[record] >= 0:
            counted[parent[record]] += 1
    assert all(counted[record] == children[record] for record in resident)
    return resident
