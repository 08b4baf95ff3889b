"""Scrub: check every chunk in host memory against its checksum, slowly and for ever, or on demand.

Memory rots, and an engine with a fault may write where it should not. A chunk that no longer
matches is quarantined: its slot's generation changes, so that a load that has begun is failed by
the engine and computed instead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

import structlog

from kvbm.meter import Meter
from storage_tiers.base import Key
from storage_tiers.codec import checksum
from storage_tiers.dram import DramTier

IDLE_S: Final = 1.0
CHUNKS_AT_ONCE: Final = 4096
"""Listed at a time; the list is not to grow with host memory."""

_log = structlog.get_logger("kvbm.scrub")


@dataclass(slots=True)
class ScrubPass:
    """One pass that somebody asked for: how far it is, or what it found."""

    total: int = 0  # chunks there when it began
    checked: int = 0
    damaged: int = 0
    unreadable: int = 0  # the medium failed; nothing is known of the bytes
    seconds: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Scrubber:
    """Call from the event loop that owns `dram`; `run` until cancelled."""

    def __init__(self, dram: DramTier, meter: Meter, pass_s: float) -> None:
        self._dram = dram
        self._meter = meter
        self._pass_s = pass_s
        self._asked = asyncio.Event()
        self.passes = 0
        self.latest: ScrubPass | None = None  # of those asked for

    async def run(self) -> None:
        """Passes of about `pass_s` seconds each, none if that is 0; and those asked for."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._patrol())
            group.create_task(self._serve())

    def ask(self) -> ScrubPass:
        """Begin a pass as fast as one thread goes; the one under way if there is one."""
        if self.latest is None or self.latest.ended.is_set():
            self.latest = ScrubPass()
            self._asked.set()
        return self.latest

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

    async def _patrol(self) -> None:
        while self._pass_s > 0:
            if not len(self._dram):
                await asyncio.sleep(min(IDLE_S, self._pass_s))
                continue
            pause_s = self._pass_s / len(self._dram)
            async for key in self._all():
                await self.check(key)
                await asyncio.sleep(pause_s)
            self.passes += 1

    async def _serve(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            assert self.latest is not None, "set before it is asked for"
            await self._pass_over(self.latest)

    async def _pass_over(self, run: ScrubPass) -> None:
        began = time.monotonic()
        run.total = len(self._dram)
        async for key in self._all():
            run.damaged += not await self.check(key)
            run.checked += 1
            run.seconds = time.monotonic() - began
        run.ended.set()
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
