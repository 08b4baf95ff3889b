"""Scrub: check every chunk in host memory against its checksum, slowly and for ever.

Memory rots, and an engine with a fault may write where it should not. A chunk that no longer
matches is quarantined: its slot's generation changes, so that a load that has begun is failed by
the engine and computed instead.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from kvbm.meter import Meter
from storage_tiers.base import Key
from storage_tiers.codec import checksum
from storage_tiers.dram import DramTier, Resident

IDLE_S: Final = 1.0

_log = structlog.get_logger("kvbm.scrub")


class Scrubber:
    """Call from the event loop that owns `dram`; `run` until cancelled."""

    def __init__(self, dram: DramTier, meter: Meter, pass_s: float) -> None:
        self._dram = dram
        self._meter = meter
        self._pass_s = pass_s
        self.passes = 0

    async def run(self) -> None:
        """Passes of about `pass_s` seconds each; returns at once if that is 0."""
        while self._pass_s > 0:
            keys = self._dram.oldest(len(self._dram))
            if not keys:
                await asyncio.sleep(min(IDLE_S, self._pass_s))
                continue
            for key in keys:
                await self.check(key)
                await asyncio.sleep(self._pass_s / len(keys))
            self.passes += 1

    async def check(self, key: Key) -> bool:
        """False if the chunk was found damaged, and quarantined."""
        resident = self._dram.claim(key)
        if resident is None:
            return True
        try:
            return await self._is_sound(resident)
        finally:
            self._dram.unclaim(resident)

    async def _is_sound(self, resident: Resident) -> bool:
        if not resident.sealed:
            return True  # committed a moment ago; its checksum is on the way
        digest = await asyncio.to_thread(checksum, self._dram.view(resident.slot))
        if digest == resident.chunk.checksum:
            return True
        if not resident.gone:
            _log.error("host_memory_damaged", key=resident.chunk.key.hex())
            self._meter.error("scrub", "corrupt")
            self._dram.quarantine(resident.chunk.key)
        return False
