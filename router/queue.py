"""Requests that wait until a worker has room, most urgent first; bounded.

A strict priority goes before any lower one. Among equals the order decides: `fcfs`, first come
first served, where `priority` is a head start in seconds; `lcfs`, the last first; `wspt`, weighted
shortest processing time, where a request counts as `(1 + priority) / tokens`.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

QUEUE_MAX: Final = 4096

Order = Literal["fcfs", "lcfs", "wspt"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Urgency:
    priority: float = 0.0
    strict_priority: int = 0


class WaitingLine(Generic[T]):
    """One thread calls it."""

    def __init__(self, order: Order = "fcfs", limit: int = QUEUE_MAX) -> None:
        assert limit > 0
        self._order = order
        self._limit = limit
        self._heap: list[tuple[int, float, int]] = []
        self._items: dict[int, T] = {}
        self._numbers = itertools.count()
        self.refused_total = 0  # because it was full

    def __len__(self) -> int:
        return len(self._items)

    @property
    def limit(self) -> int:
        return self._limit

    def put(self, item: T, urgency: Urgency, *, tokens: int, now: float) -> int | None:
        """A number to take it out by; None if the line is full."""
        if len(self._items) >= self._limit:
            self.refused_total += 1
            return None
        number = next(self._numbers)
        self._items[number] = item
        key = self._key(urgency, tokens, now)
        heapq.heappush(self._heap, (-urgency.strict_priority, key, number))
        return number

    def first(self) -> T | None:
        """The most urgent; None if nobody waits."""
        self._drop_taken()
        return self._items[self._heap[0][2]] if self._heap else None

    def foremost(self, count: int) -> list[tuple[int, T]]:
        """The most urgent with their numbers, in order. Costs a pass over the line."""
        there = (entry for entry in self._heap if entry[2] in self._items)
        return [(n, self._items[n]) for _, _, n in heapq.nsmallest(count, there)]

    def pop(self) -> T | None:
        self._drop_taken()
        return self._items.pop(heapq.heappop(self._heap)[2]) if self._heap else None

    def take(self, number: int) -> T | None:
        """Out of the line, wherever it is; None if it is not in it any more."""
        item = self._items.pop(number, None)
        if len(self._heap) > 2 * len(self._items) + 16:
            self._heap = [entry for entry in self._heap if entry[2] in self._items]
            heapq.heapify(self._heap)
        return item

    def _key(self, urgency: Urgency, tokens: int, now: float) -> float:
        match self._order:
            case "fcfs":
                return now - urgency.priority
            case "lcfs":
                return -(now + urgency.priority)
            case "wspt":
                return -(1.0 + max(urgency.priority, 0.0)) / max(tokens, 1)

    def _drop_taken(self) -> None:
        while self._heap and self._heap[0][2] not in self._items:
            heapq.heappop(self._heap)
