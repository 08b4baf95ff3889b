"""How fast bytes go into and out of each tier, over moving windows.

Tiers count bytes for ever; this samples their counters once a second and keeps a minute of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from storage_tiers.base import TierName, TierUsage

WINDOWS_S: Final = (10, 60)
SAMPLE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Means over the last `window_s` seconds, or since the start if that was later."""

    window_s: int
    in_bytes_per_s: float
    out_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    counts: Mapping[TierName, tuple[int, int]]  # stored, loaded


class Rates:
    """Call from one event loop; `run` until cancelled."""

    def __init__(
        self,
        usages: Callable[[], Sequence[TierUsage]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._usages = usages
        self._clock = clock
        self._samples: deque[_Sample] = deque(maxlen=int(max(WINDOWS_S) / SAMPLE_S) + 1)

    async def run(self) -> None:
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        self._samples.append(self._look())

    def now(self) -> dict[TierName, list[Rate]]:
        """Per tier one rate for each of `WINDOWS_S`. Cost: linear in the samples."""
        last = self._look()
        return {
            tier: [self._rate(tier, window, last) for window in WINDOWS_S] for tier in last.counts
        }

    def _rate(self, tier: TierName, window_s: int, last: _Sample) -> Rate:
        oldest_at = last.at - window_s - SAMPLE_S / 2
        first = next((s for s in self._samples if s.at >= oldest_at), last)
        elapsed_s = max(last.at - first.at, SAMPLE_S)
        stored, loaded = last.counts[tier]
        stored_before, loaded_before = first.counts.get(tier, (0, 0))
        return Rate(
            window_s,
            max(0, stored - stored_before) / elapsed_s,
            max(0, loaded - loaded_before) / elapsed_s,
        )

    def _look(self) -> _Sample:
        counts = {u.tier: (u.stored_bytes_total, u.loaded_bytes_total) for u in self._usages()}
        return _Sample(self._clock(), counts)
