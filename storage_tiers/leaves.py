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

from storage_tiers.admission import CLASSES

NONE: Final = -1
"""No record: the parent of a chunk whose parent is not resident."""
COSTS: Final = 32
"""Classes of seconds per byte, half octaves around the first arrival's; the outer ones are open."""
QUEUES: Final = CLASSES * COSTS


class Leaves:
    """Parents, and the leaves in rings by queue and second; 23 bytes for each record.

    A parent counts as used when its last descendant was, so it enters its ring at the head: it is
    the next to go there. Columns are indexed by record.
    """

    def __init__(self) -> None:
        self._parent = array("i")
        self._children = array("i")  # how many are resident; NONE: the record is not
        self._after = array("i")
        self._before = array("i")
        self._tick = array("I")
        self._queue = array("H")
        self._mark = array("B")
        self._ring: dict[int, int] = {}  # tick * QUEUES + queue -> head, or NONE
        self._ticks: dict[int, list[int]] = {}  # queue -> ticks of its rings, ascending
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def used_s(self, record: int) -> int:
        """The second of a resident record's last use; of one with children, of its own."""
        return self._tick[record]

    def state_bytes(self) -> int:
        """Of the columns, for all records ever in use at once. The rings' heads come on top."""
        columns = (self._parent, self._children, self._after, self._before, self._tick)
        return sum(c.itemsize * len(c) for c in (*columns, self._queue, self._mark))

    def removed(self, record: int, key: int) -> None:
        children = self._children[record]
        assert children >= 0, "only a resident chunk is removed"
        if children:
            self._orphan(record)
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
        leaving = np.zeros(len(self._parent) + 1, dtype=bool)  # NONE is the last entry
        leaving[np.asarray(records, dtype=np.int64)] = True
        parents = np.frombuffer(self._parent, dtype=np.int32)
        resident = np.frombuffer(self._children, dtype=np.int32) != NONE
        staying = np.flatnonzero(leaving[parents] & resident & ~leaving[:-1]).tolist()
        for record in staying:
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
        resident = [r for r, children in enumerate(self._children) if children != NONE]
        assert len(resident) == self._count
        children = [0] * len(self._children)
        for record in resident:
            if self._parent[record] >= 0:
                children[self._parent[record]] += 1
        assert all(children[r] == self._children[r] for r in resident)
        linked = 0
        for at, head in self._ring.items():
            assert at // QUEUES in self._ticks[at % QUEUES]
            for record in self._around(head):
                linked += 1
                assert self._before[self._after[record]] == record
                assert self._children[record] == 0
                assert self._tick[record] * QUEUES + self._queue[record] == at
        assert linked == sum(self._children[r] == 0 for r in resident)

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

    def _opened(self, queue: int) -> None:
        """A queue that had no ring has one."""

    def _link(self, record: int, *, first: bool = False) -> None:
        queue, tick = self._queue[record], self._tick[record]
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
            self._ring[at] = after[record] = before[record] = record
            return
        last = before[head]
        after[last] = before[head] = record
        before[record], after[record] = last, head
        if first:
            self._ring[at] = record

    def _unlink(self, record: int) -> None:
        at = self._tick[record] * QUEUES + self._queue[record]
        after, before = self._after[record], self._before[record]
        if after == record:
            self._ring[at] = NONE  # stays known to _ticks until the walk comes by
            return
        self._after[before] = after
        self._before[after] = before
        if self._ring[at] == record:
            self._ring[at] = after

    def _head(self, queue: int, end: int = 0) -> int:
        """The first leaf of a queue's oldest second, or with end -1 of its newest."""
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

    def _walk(self, queue: int, passed: int) -> Iterator[int]:
        """All leaves of a queue from the oldest, without the one that was passed over."""
        for tick in list(self._ticks.get(queue, ())):
            at = tick * QUEUES + queue
            left = NONE
            while True:
                head = self._ring.get(at, NONE)
                record = head if left == NONE else self._after[left]
                if head == NONE or (left != NONE and record == head):
                    break
                if record != passed:
                    yield record
                if self._children[record] == 0:
                    left = record

    def _around(self, head: int) -> Iterator[int]:
        record = head
        while record != NONE:
            yield record
            record = self._after[record]
            if record == head:
                return

    def _orphan(self, record: int) -> None:
        parents = np.frombuffer(self._parent, dtype=np.int32)
        resident = np.frombuffer(self._children, dtype=np.int32) != NONE
        parents[(parents == record) & resident] = NONE

    def _grow(self, record: int) -> None:
        more = max(len(self._parent) // 16, record + 1 - len(self._parent), 64)
        for signed in (self._parent, self._children, self._after, self._before):
            signed.extend(array("i", [NONE]) * more)
        for column in (self._tick, self._queue, self._mark):
            column.frombytes(bytes(column.itemsize * more))
