"""Whether the holder of a lease is alive, where no server says so: by whether the lease moves.

A holder changes its lease (a time of modification, a version) with each renewal. What counts is
how long ago the judge saw it change, by the judge's own steady clock: clocks that are set, or that
differ between machines, end no lease. Only a lease seen for the first time is judged by its age
as written, because it may have been dead for long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet

Stamp = int | str


class Liveness:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._moved: dict[str, tuple[Stamp, float]] = {}  # lease -> its stamp, when that was new

    def silence_s(self, lease: str, stamp: Stamp, age_s: float) -> float:
        """For how long the lease has not moved."""
        now_s = self._clock()
        known = self._moved.get(lease)
        if known is None:
            self._moved[lease] = (stamp, now_s - max(age_s, 0))
        elif known[0] != stamp:
            self._moved[lease] = (stamp, now_s)
        return now_s - self._moved[lease][1]

    def keep(self, leases: AbstractSet[str]) -> None:
        """Forget all others, which are gone."""
        for lease in self._moved.keys() - leases:
            del self._moved[lease]
