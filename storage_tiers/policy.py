"""Which chunk goes first: eviction policies that know neither tier nor medium.

An index gives each resident chunk a small number, its record, and tells the policy of every
arrival, use and removal. Invariant: `victims` offers only leaves, chunks without resident
children, so a parent never goes before its children and no chunk is kept that nothing reaches.
Calls are O(log n) at most, amortised, but where they say otherwise. Nothing is random; time comes
from the caller.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from math import log2
from typing import Final, Protocol

from storage_tiers.admission import (
    AGES,
    TURNS,
    Ghosts,
    Survival,
    age_index,
    class_of,
    turn_of,
)
from storage_tiers.leaves import COSTS, NONE, Leaves

RUNS_MAX: Final = 1024
"""Requests whose last chunk is remembered so that the next one continues the same request."""
PROBED_ONE_IN: Final = 64
"""Of the chunks within a request; its last two are always probed. A power of two, at most 64."""
RANKED_PER: Final = 64
"""All queues are compared anew after this part of the residents was evicted."""
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
        yield from self._walk(0, record)


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
        yield from self._walk(self._SMALL, passed)
        yield from self._walk(self._MAIN, passed)

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


class Run:
    """One request's way through the tree: what it used and then added."""

    __slots__ = ("added", "fresh", "previous", "sampled", "tail", "tick", "turn")

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.fresh = self.tick = 0
        self.tail = self.previous = 0  # keys of its last two chunks; 0: none
        self.added = 0  # 1 if the last was new
        self.sampled: list[int] = []


class ValuePolicy(Leaves):
    """What is worth least goes first: chance of reuse x seconds saved / bytes, per second kept.

    The chance is learnt while running, by class of the last request on the path and by age (see
    `Survival`). A chunk's class is that of the request that used it last. In each queue the
    oldest and the newest are compared: where reuse takes its time, the newest may be worth less.
    """

    def __init__(self) -> None:
        super().__init__()
        self._survival = Survival()
        self._runs: dict[int, Run] = {}  # its last record -> run
        self._open: Run | None = None  # the run of the last call, not probed yet
        self._hit_last = NONE
        self._ranked: list[tuple[float, int]] = []  # heap of (worth when ranked, queue)
        self._rank_at = 0
        self._removals = 0
        self._now = 0
        self._cost_log2: float | None = None  # of the first arrival, per byte

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
        run = self._runs.pop(parent, None)
        if run is None:
            run = Run(self._mark[parent] + 1 if parent >= 0 else 1)
        if run is not self._open:
            self._switch(run)
        run.fresh += 1
        ghost = self._survival.seen(key, tick)
        if ghost >= 0:  # it was here before: what this request really adds comes after it
            run.turn = max(run.turn, turn_of(ghost) + 1)
            run.fresh = 0
        run.tick = tick
        run.previous, run.tail, run.added = run.tail, key, 1
        if not key % PROBED_ONE_IN:
            run.sampled.append(key)
        self._remember(record, run)
        kind = class_of(run.turn, run.fresh, 1)
        self._place(record, tick, kind * COSTS + self._cost(cost_s / size_bytes), parent)
        self._mark[record] = min(TURNS, run.turn)
        if not self._count & 255:
            self._survival.fit_to(self._count)

    def hit(self, record: int, key: int, now_s: float) -> None:
        tick = self._now = int(now_s)
        last, run = self._hit_last, self._open
        self._survival.seen(key, tick)
        if last == NONE or run is None or self._tick[last] != tick or run.added:
            run = None
        elif self._parent[last] == record:
            run.previous = run.previous or key
        elif self._parent[record] == last:
            self._runs.pop(last, None)
            run.turn = max(run.turn, self._mark[record] + 1)
            run.previous, run.tail = run.tail, key
            self._remember(record, run)
        else:
            run = None
        if run is None:
            run = Run(self._mark[record] + 1)
            self._switch(run)
            run.tail = key
            self._remember(record, run)
        run.tick = tick
        if not key % PROBED_ONE_IN:
            run.sampled.append(key)
        self._hit_last = record
        self._move(record, tick, class_of(run.turn, 0, 0) * COSTS + self._queue[record] % COSTS)

    def removed(self, record: int, key: int) -> None:
        self._runs.pop(record, None)
        self._removals += 1
        if self._hit_last == record:
            self._hit_last = NONE
        super().removed(record, key)

    def victims(self) -> Iterator[int]:
        passed = NONE
        while (record := self._least()[1]) != NONE:
            yield record
            if self._children[record] == 0:
                passed = record
                break
        for _, queue in sorted(self._ranked):
            yield from self._walk(queue, passed)

    def arrival_worth(self, now_s: float, parent: int, cost_s: float, size_bytes: int) -> float:
        """What a chunk would be worth if it arrived after this parent; relative to others only."""
        self._now = int(now_s)
        run = self._runs.get(parent)
        if run is None:
            run = Run(self._mark[parent] + 1 if parent >= 0 else 1)
        queue = class_of(run.turn, run.fresh + 1, 0) * COSTS + self._cost(cost_s / size_bytes)
        return self._worth(queue, 0)

    def victim_worth(self, now_s: float) -> float:
        """What the next victim is worth, on the same scale."""
        self._now = int(now_s)
        return self._least()[0]

    def _restored_queue(self, cost_per_byte: float) -> int:
        """That of a sequence used once; what is learnt of it later moves it on."""
        return class_of(1, 1, 0) * COSTS + self._cost(cost_per_byte)

    def _cost(self, seconds_per_byte: float) -> int:
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
            ends = [(self._end(queue), queue) for queue in list(self._ticks)]
            self._ranked = [(worth, queue) for (worth, record), queue in ends if record != NONE]
            heapq.heapify(self._ranked)
        while self._ranked:
            ranked, queue = self._ranked[0]
            worth, record = self._end(queue)
            if record == NONE:
                heapq.heappop(self._ranked)
            elif worth > ranked:
                heapq.heapreplace(self._ranked, (worth, queue))
            else:
                return worth, record
        return 0.0, NONE

    def _end(self, queue: int) -> tuple[float, int]:
        """Of a queue's oldest and newest leaf the one worth less. This second's are not judged."""
        oldest = self._head(queue)
        if oldest == NONE:
            return 0.0, NONE
        worth = self._worth(queue, self._now - self._tick[oldest])
        newest = self._head(queue, -1)
        age_s = self._now - self._tick[newest]
        if age_s > 0 and newest != oldest:
            other = self._worth(queue, age_s)
            if other < worth:
                return other, newest
        return worth, oldest

    def _opened(self, queue: int) -> None:
        heapq.heappush(self._ranked, (0.0, queue))

    def _inherited(self, parent: int, child: int) -> int:
        kind = self._queue[child] // COSTS & ~1  # the request's class, but no tail
        return kind * COSTS + self._queue[parent] % COSTS

    def _remember(self, record: int, run: Run) -> None:
        self._runs[record] = run
        if len(self._runs) > RUNS_MAX:
            del self._runs[next(iter(self._runs))]

    def _switch(self, run: Run) -> None:
        """Another request goes on: probe what the last one left, and withdraw this one's."""
        left, self._open = self._open, run
        survival = self._survival
        if left is not None:
            kind = class_of(left.turn, left.fresh, 0)
            for key in left.sampled:
                survival.probe(key, left.tick, kind)
            if left.previous:
                survival.probe(left.previous, left.tick, kind)
            survival.probe(left.tail, left.tick, kind + left.added)
        for key in (run.tail, run.previous):
            if key:
                survival.forget(key)


_SCALE: Final = [2 ** ((cost - COSTS // 2) / 2) for cost in range(COSTS)]
