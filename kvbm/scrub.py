"""Scrub: check every chunk in host memory against its checksum, slowly and for ever, or on demand.

Memory rots, and an engine with a fault may write where it should not. A chunk that no longer
matches is quarantined: its slot's generation changes, so that a load that has begun is failed by
the engine and computed instead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

import structlog

from kvbm.meter import Meter
from kvbm.passes import Passes, ScrubPass
from storage_tiers.base import Key
from storage_tiers.codec import checksum
from storage_tiers.dram import DramTier

CHUNKS_AT_ONCE: Final = 4096
"""Listed at a time; the list is not to grow with host memory."""

_log = structlog.get_logger("kvbm.scrub")


class Scrubber(Passes):
    """Checks host memory against its checksums."""

    def __init__(self, dram: DramTier, meter: Meter, pass_s: float) -> None:
        super().__init__(pass_s)
        self._dram = dram
        self._meter = meter

    async def check(self, key: Key) -> bool:
        """False if the chunk was found damaged, and quarantined."""
        record = self._dram.claim(key)
        if record is None:
            return True
        try:
            return await self._is_sound(record)
        finally:
            self._dram.unclaim(record)

    # -- below ---------------------------------------------------------------------------

    async def _pass_over(self, run: ScrubPass, pass_s: float) -> None:
        began = time.monotonic()
        run.total = len(self._dram)
        async for key in self._all():
            run.damaged += not await self.check(key)
            run.checked += 1
            run.seconds = time.monotonic() - began
            if pass_s > 0:
                await asyncio.sleep(pass_s / run.total)
        if run.total:
            _log.info(
                "scrubbed",
                tier="G2",
                chunks=run.total,
                damaged=run.damaged,
                seconds=round(run.seconds, 3),
            )

    async def _all(self) -> AsyncIterator[Key]:
        """Every chunk that is there all the while."""
        keys, at = self._dram.some(0, CHUNKS_AT_ONCE)
        while True:
            for key in keys:
                yield key
            if not at:
                return
            keys, at = self._dram.some(at, CHUNKS_AT_ONCE)

    async def _is_sound(self, record: int) -> bool:
        if not self._dram.is_sealed(record):
            return True  # committed a moment ago; its checksum is on the way
        digest = await asyncio.to_thread(checksum, self._dram.view(self._dram.slot(record)))
        chunk = self._dram.chunk(record)
        if digest == chunk.checksum:
            self._meter.scrubbed(self._dram.name, "sound")
            return True
        if self._dram.is_resident(record):
            _log.error("host_memory_damaged", key=chunk.key.hex())
            self._meter.error("scrub", "corrupt")
            self._meter.scrubbed(self._dram.name, "damaged")
            self._dram.quarantine(chunk.key)
        return False
