"""Requests that callers elsewhere have been given a worker for, until they say that they ended.

Whoever falls silent is not waited for: nothing heard of a request for its lease is its end.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from router.model import Ending, Placed

SWEEP_S: Final = 1.0
SWEPT_MAX: Final = 4096  # in one turn of the event loop


@dataclass(slots=True)
class Reservation:
    placed: Placed
    lease_s: float
    ends_at: float


class Reservations:
    """All methods are called from one event loop."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        assert limit > 0
        self._limit = limit
        self._clock = clock
        self._held: dict[str, Reservation] = {}
        self._due: list[
            tuple[float, str]
        ] = []  # a heap; of each request its end, or an earlier one
        self.expired_total = 0
        self.lost_total = 0  # with their workers

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request: str) -> bool:
        return request in self._held

    @property
    def is_full(self) -> bool:
        return len(self._held) >= self._limit

    def hold(self, request: str, placed: Placed, lease_s: float) -> None:
        """The caller knows that there is room, and no such request."""
        assert request not in self._held and not self.is_full
        ends_at = self._clock() + lease_s
        self._held[request] = Reservation(placed, lease_s, ends_at)
        heapq.heappush(self._due, (ends_at, request))
        if len(self._due) > 2 * len(self._held) + SWEPT_MAX:  # most have ended long before
            self._due = [(held.ends_at, name) for name, held in self._held.items()]
            heapq.heapify(self._due)

    def heard(self, request: str) -> Placed | None:
        """Something was told of it: its lease begins anew. None if there is no such request."""
        found = self._held.get(request)
        if found is None:
            return None
        found.ends_at = self._clock() + found.lease_s
        return found.placed

    def end(self, request: str, ending: Ending) -> bool:
        """False if there is no such request."""
        found = self._held.pop(request, None)
        if found is None:
            return False
        found.placed.end(ending)
        return True

    def lost(self, placed: Placed) -> None:
        """A worker of it has gone."""
        self.lost_total += self.end(placed.query.request, "worker-gone")

    def expire(self) -> int:
        """End those whose lease is over; how many. Costs what has come due."""
        now, ended = self._clock(), 0
        for _ in range(SWEPT_MAX):
            if not self._due or self._due[0][0] > now:
                break
            _, request = heapq.heappop(self._due)
            found = self._held.get(request)
            if found is None:
                continue
            if found.ends_at > now:
                heapq.heappush(self._due, (found.ends_at, request))
                continue
            ended += self.end(request, "expired")
        self.expired_total += ended
        return ended

    def end_all(self) -> None:
        for request in list(self._held):
            self.end(request, "cancelled")
