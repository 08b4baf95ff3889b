"""Eviction by value: the chance of reuse x seconds saved / bytes, per second for which it is kept.

What comes back is a request's whole path, or none of it, so value belongs to the request that
used a chunk last: its span. A span is the chunks of one path that no later request has used; they
go from its end upwards. Spans, not chunks, are ranked, and a use moves a whole path at once.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from math import log2
from typing import Final

from storage_tiers.leaves import NONE, Rings, check_family, grown_by, left_behind, orphan
from storage_tiers.survival import (
    AGES,
    PATHS,
    TURNS,
    Survival,
    age_index,
    class_of,
    shared_class,
    turn_of,
)

COSTS: Final = 32
"""Classes of seconds per byte, half octaves around the first arrival's; the outer ones are open."""
REQUESTS_MAX: Final = 1024
"""Requests that are remembered as unfinished, so that their next chunk continues them."""
RANKED_PER: Final = 64
"""All queues are compared anew after this part of the residents was evicted."""
USES_MAX: Final = 255
APART: Final = 2
"""A chunk used this many times more than its child: the requests went different ways there."""


class Request:
    """One request's way through the tree: what it used and then added."""

    __slots__ = ("added", "fresh", "gap_s", "previous", "span", "tail", "tick", "turn")

    def __init__(self, span: int, turn: int, gap_s: int, tick: int) -> None:
        self.span = span
        self.turn = turn
        self.gap_s = gap_s
        self.tick = tick
        self.fresh = 0
        self.tail = self.previous = 0  # keys of its last two chunks; 0: none
        self.added = 0  # 1 if the last was new

    def kind(self) -> int:
        """Its class. How long ago others began in the same way says nothing of a new path."""
        gap_s = self.gap_s if self.turn > 1 or not self.fresh else -1
        return class_of(self.turn, self.fresh, gap_s, self.added)


class ValuePolicy(Rings):
    """What is worth least goes first. How long until reuse is learnt while running (`Survival`).

    In each queue the oldest and the newest are compared: where reuse takes its time, the newest
    may be worth less. 15 bytes for each record and 18 for each span, of which there are never more
    than records; columns are indexed by record, those of `Rings` and `_end` by span.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parent = array("i")
        self._children = array("i")  # how many are resident; NONE: the record is not
        self._span = array("i")
        self._uses = array("B")  # by how many requests, since it arrived
        self._turn = array("B")  # of the request with which it arrived
        self._cost = array("B")
        self._end = array("i")  # a span's last record; NONE: no such span
        self._idle = array("i")  # spans that can be given out
        self._count = 0
        self._survival = Survival()
        self._requests: dict[int, Request] = {}  # its span -> a request that may go on
        self._open = Request(NONE, 1, -1, 0)  # the request of the last call, not probed yet
        self._hit_last = NONE
        self._hit_key = 0
        self._ranked: list[tuple[float, int]] = []  # heap of (worth when ranked, queue)
        self._rank_at = 0
        self._removals = 0
        self._now = 0
        self._cost_log2: float | None = None  # of the first arrival, per byte

    def __len__(self) -> int:
        return self._count

    def used_s(self, record: int) -> int:
        """The second of a resident record's last use, which is that of the path it is on."""
        return self._tick[self._span[record]]

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
        tick = self._now = int(now_s)
        if record >= len(self._parent):
            self._grow(record)
        assert self._children[record] == NONE, "a record is given out once"
        request = self._continued(parent) or self._begin(parent, tick)
        if request is not self._open:
            self._switch(request)
        request.fresh += 1
        ghost = self._survival.seen(key, tick)
        if ghost is not None:  # it was here before: what this request really adds comes after it
            kind, request.gap_s = ghost
            request.turn = max(request.turn, turn_of(kind) + 1)
            request.fresh = 0
        request.tick = tick
        request.previous, request.tail, request.added = request.tail, key, 1
        if request.fresh == 1 and parent >= 0 and self._uses[parent] > APART:
            self._survival.probe(request.previous, tick, shared_class(self._uses[parent]))
            request.previous = 0
        self._parent[record] = parent
        self._uses[record] = 1
        self._turn[record] = min(request.turn, TURNS)
        self._cost[record] = self._cost_class(cost_s / size_bytes)
        self._count += 1
        linked = parent >= 0 and not self._children[parent]
        if parent >= 0:
            self._children[parent] += 1
        self._children[record] = 0
        self._span[record] = request.span
        self._end[request.span] = record
        self._settle(request.span, tick, request.kind(), linked=linked)
        if not self._count & 255:
            self._survival.fit_to(self._count)

    def hit(self, record: int, key: int, now_s: float) -> None:
        tick = self._now = int(now_s)
        last, request = self._hit_last, self._open
        self._survival.seen(key, tick)
        if last != NONE and request.tick == tick and not request.added:
            if self._parent[last] == record:
                request.previous = request.previous or key
                if self._uses[record] - self._uses[last] >= APART:
                    self._survival.probe(key, tick, shared_class(self._uses[record]))
                self._hit_last = record
                return
            if self._parent[record] == last == self._end[request.span]:
                request.turn, request.gap_s = self._standing(record, tick)
                request.previous, request.tail = request.tail, key
                self._adopt(record, request.span)
                if self._uses[last] - self._uses[record] >= APART:
                    self._survival.probe(self._hit_key, tick, shared_class(self._uses[last]))
                self._settle(request.span, tick, request.kind())
                self._hit_last, self._hit_key = record, key
                return
        request = self._begin(record, tick)
        self._switch(request)
        request.tail = key
        self._hit_last, self._hit_key = record, key

    def removed(self, record: int, key: int) -> None:
        children, parent = self._children[record], self._parent[record]
        assert children >= 0, "only a resident chunk is removed"
        span = self._span[record]
        self._removals += 1
        self._count -= 1
        if self._hit_last == record:
            self._hit_last = NONE
        if not children:
            self._unlink(span)
        else:
            orphan(record, self._parent, self._children)
        self._children[record] = NONE
        if self._end[span] == record:
            if parent >= 0 and self._span[parent] == span:
                self._recede(span, record, parent)
            else:
                self._retire(span)
        elif parent >= 0 and self._span[parent] == span:
            self._divide(span, parent)
        if parent >= 0:
            self._children[parent] -= 1
            if not self._children[parent]:
                self._link(self._span[parent], first=True)

    def detach(self, records: Sequence[int]) -> None:
        for record in left_behind(records, self._parent, self._children):
            parent, self._parent[record] = self._parent[record], NONE
            if self._span[parent] == self._span[record]:
                self._divide(self._span[record], parent)
            self._children[parent] -= 1
            if not self._children[parent]:
                self._link(self._span[parent], first=True)

    def restore(
        self,
        parents: Sequence[int],
        used_s: Sequence[float],
        *,
        costs_s: Sequence[float],
        sizes_bytes: Sequence[int],
    ) -> None:
        """Each path is taken for that of a request that came once; what follows moves it on."""
        assert not self._count, "restore comes first"
        self._grow(len(parents))
        self._count = len(parents)
        for record, parent in enumerate(parents):
            self._parent[record] = parent
            self._children[record] = 0
            self._uses[record] = self._turn[record] = 1
            self._cost[record] = self._cost_class(costs_s[record] / sizes_bytes[record])
        for parent in parents:
            if parent >= 0:
                self._children[parent] += 1
        kind = class_of(1, 1, -1, 0)
        for end in reversed(range(len(parents))):  # the latest use of a path is its owner
            if self._span[end] != NONE:
                continue
            span = self._idle.pop() if self._idle else self._grow_spans()
            self._end[span] = record = end
            while record != NONE and self._span[record] == NONE:
                self._span[record] = span
                record = self._parent[record]
            self._queue[span] = kind * COSTS + self._cost[end]
            self._tick[span] = int(used_s[end])
        for span in reversed(range(len(self._end))):
            end = self._end[span]
            if end != NONE and not self._children[end]:
                self._link(span)

    def victims(self) -> Iterator[int]:
        passed = NONE
        while (record := self._least()[1]) != NONE:
            yield record
            if self._children[record] == 0:
                passed = record
                break
        for _, queue in sorted(self._ranked):
            for span in self._walk(queue):
                record = NONE
                while self._end[span] not in (NONE, record, passed):
                    record = self._end[span]
                    if self._children[record]:
                        break
                    yield record

    def arrival_worth(self, now_s: float, parent: int, cost_s: float, size_bytes: int) -> float:
        """What a chunk would be worth if it arrived after this parent; relative to others only."""
        tick = self._now = int(now_s)
        request = self._continued(parent)
        turn, gap_s = (request.turn, request.gap_s) if request else self._standing(parent, tick)
        fresh = request.fresh + 1 if request else 1
        kind = class_of(turn, fresh, gap_s if turn > 1 else -1, 0)
        return self._worth(kind * COSTS + self._cost_class(cost_s / size_bytes), 0)

    def victim_worth(self, now_s: float) -> float:
        """What the next victim is worth, on the same scale."""
        self._now = int(now_s)
        return self._least()[0]

    def check_integrity(self) -> None:
        """Assert the class's invariants: a leaf is the end of its span. Cost: linear."""
        resident = check_family(self._parent, self._children)
        assert len(resident) == self._count
        of_span: dict[int, int] = {}
        for record in resident:
            of_span[self._span[record]] = of_span.get(self._span[record], 0) + 1
        for span, count in of_span.items():
            record = self._end[span]
            for _ in range(count):
                assert self._children[record] != NONE and self._span[record] == span
                record = self._parent[record]
        assert of_span.keys().isdisjoint(self._idle)
        leaves = {self._span[record] for record in resident if not self._children[record]}
        assert all(not self._children[self._end[span]] for span in leaves)
        self._check_rings(leaves)

    def _continued(self, parent: int) -> Request | None:
        """The unfinished request whose last chunk this is."""
        if parent < 0:
            return None
        span = self._span[parent]
        return self._requests.get(span) if self._end[span] == parent else None

    def _standing(self, record: int, tick: int) -> tuple[int, int]:
        """Turn of a request that goes on from this chunk, and seconds since the one before.

        It is a further turn unless others went on from here before, as after a system prompt.
        """
        if record < 0:
            return 1, -1
        gap_s = max(tick - self._tick[self._span[record]], 0)
        return self._turn[record] + (self._uses[record] < APART), gap_s

    def _begin(self, deepest: int, tick: int) -> Request:
        """A request comes that uses the path to this chunk, which may be none."""
        span = self._idle.pop() if self._idle else self._grow_spans()
        request = Request(span, *self._standing(deepest, tick), tick)
        self._end[span] = NONE
        if deepest >= 0:
            self._adopt(deepest, span)
            self._settle(span, tick, request.kind())
        self._requests[span] = request
        if len(self._requests) > REQUESTS_MAX:
            del self._requests[next(iter(self._requests))]
        return request

    def _adopt(self, deepest: int, span: int) -> None:
        """A span takes the path to this chunk from those that had it. Linear in what they had."""
        self._end[span] = record = deepest
        while record >= 0 and self._span[record] != span:
            former = self._span[record]
            if self._end[former] == record:
                if not self._children[record]:
                    self._unlink(former)
                self._retire(former)
            self._span[record] = span
            if self._uses[record] < USES_MAX:
                self._uses[record] += 1
            record = self._parent[record]

    def _settle(self, span: int, tick: int, kind: int, *, linked: bool = False) -> None:
        """Give a span its place by its kind and end; `linked`: it has one already."""
        queue = kind * COSTS + self._cost[self._end[span]]
        if linked:
            if self._queue[span] == queue and self._tick[span] == tick:
                return
            self._unlink(span)
        self._queue[span], self._tick[span] = queue, tick
        if not self._children[self._end[span]]:
            self._link(span)

    def _recede(self, span: int, record: int, parent: int) -> None:
        """A span's last chunk has left: the one before it is the last now."""
        kind = self._queue[span] // COSTS
        if self._uses[parent] - self._uses[record] >= APART:
            kind = shared_class(self._uses[parent])
        elif kind < PATHS:
            kind &= ~1  # the request's class, but no tail
        self._end[span] = parent
        self._queue[span] = kind * COSTS + self._cost[parent]
        if self._requests:
            self._requests.pop(span, None)

    def _divide(self, span: int, end: int) -> None:
        """A chunk has left from amid a span: what was above it becomes one of its own."""
        upper = self._idle.pop() if self._idle else self._grow_spans()
        self._queue[upper], self._tick[upper] = self._queue[span], self._tick[span]
        self._end[upper] = record = end
        while record >= 0 and self._span[record] == span:
            self._span[record] = upper
            record = self._parent[record]

    def _retire(self, span: int) -> None:
        self._end[span] = NONE
        self._idle.append(span)
        self._requests.pop(span, None)
        if self._open.span == span:
            self._hit_last = NONE

    def _cost_class(self, seconds_per_byte: float) -> int:
        if seconds_per_byte <= 0:
            return 0
        exact = log2(seconds_per_byte)
        if self._cost_log2 is None:
            self._cost_log2 = exact
        return max(0, min(COSTS - 1, COSTS // 2 + round(2 * (exact - self._cost_log2))))

    def _worth(self, queue: int, age_s: int) -> float:
        return (
            self._survival.worth[queue // COSTS * AGES + age_index(age_s)] * _SCALE[queue % COSTS]
        )

    def _least(self) -> tuple[float, int]:
        """The leaf worth least, and what it is worth. O(log QUEUES) amortised.

        Worth falls slowly with age and rises when a queue's head leaves: the first is noticed
        when all queues are ranked anew, the second at once.
        """
        if self._removals >= self._rank_at:
            self._rank_at = self._removals + max(16, self._count // RANKED_PER)
            ends = [(self._ends(queue), queue) for queue in list(self._ticks)]
            self._ranked = [(worth, queue) for (worth, record), queue in ends if record != NONE]
            heapq.heapify(self._ranked)
        while self._ranked:
            ranked, queue = self._ranked[0]
            worth, record = self._ends(queue)
            if record == NONE:
                heapq.heappop(self._ranked)
            elif worth > ranked:
                heapq.heapreplace(self._ranked, (worth, queue))
            else:
                return worth, record
        return 0.0, NONE

    def _ends(self, queue: int) -> tuple[float, int]:
        """Of a queue's oldest and newest end the one worth less. This second's are not judged."""
        oldest = self._head(queue)
        if oldest == NONE:
            return 0.0, NONE
        worth = self._worth(queue, self._now - self._tick[oldest])
        newest = self._head(queue, -1)
        age_s = self._now - self._tick[newest]
        if age_s > 0 and newest != oldest:
            other = self._worth(queue, age_s)
            if other < worth:
                return other, self._end[newest]
        return worth, self._end[oldest]

    def _opened(self, queue: int) -> None:
        heapq.heappush(self._ranked, (0.0, queue))

    def _switch(self, request: Request) -> None:
        """Another request goes on: probe what the last one left, and withdraw this one's."""
        left, self._open = self._open, request
        survival = self._survival
        kind = left.kind()
        if left.previous:
            survival.probe(left.previous, left.tick, kind & ~1)
        if left.tail:
            survival.probe(left.tail, left.tick, kind)
        for key in (request.tail, request.previous):
            if key:
                survival.forget(key)

    def _grow(self, record: int) -> None:
        more = grown_by(len(self._parent), record)
        for signed in (self._parent, self._children, self._span):
            signed.extend(array("i", [NONE]) * more)
        for small in (self._uses, self._turn, self._cost):
            small.frombytes(bytes(more))

    def _grow_spans(self) -> int:
        """More spans to give out. The first of them."""
        size = len(self._end)
        more = grown_by(size, size)
        self._end.extend(array("i", [NONE]) * more)
        self._grow_rings(more)
        self._idle.extend(range(size + more - 1, size, -1))
        return size


_SCALE: Final = [2 ** ((cost - COSTS // 2) / 2) for cost in range(COSTS)]
