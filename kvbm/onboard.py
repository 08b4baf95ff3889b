"""Onboard: bring chunks from lower tiers up into host memory, each once however many wait.

The manager asks with `request`; workers, a few per tier, take batches from the tier's lane,
reserve slots, load and commit. A tier that turns out not to have the chunk (gone, corrupt,
unreachable) passes it on to the next one that does. Every request ends in one `landed` call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from kvbm.lane import Lane
from kvbm.meter import Meter
from storage_tiers.arena import Slot
from storage_tiers.base import Chunk, Corrupt, Failed, Key, Loaded, LoadItem, LoadOutcome, Tier
from storage_tiers.dram import DramTier

BATCH_CHUNKS: Final = 8
WORKERS_PER_TIER: Final = 2
QUEUE_CHUNKS: Final = 1 << 16

Landed = Callable[[Sequence[tuple[Key, int]]], None]
"""Told (key, source) per chunk that landed: the tier's index in `tiers`, or -1 if it did not."""


class Onboarder:
    """Call from one event loop; `run` until cancelled."""

    def __init__(
        self,
        dram: DramTier,
        tiers: Sequence[Tier],
        landed: Landed,
        meter: Meter,
        *,
        queue_chunks: int = QUEUE_CHUNKS,
    ) -> None:
        self._dram = dram
        self._tiers = tiers
        self._landed = landed
        self._meter = meter
        self._lanes = [Lane(queue_chunks) for _ in tiers]
        self._pending: dict[Key, int] = {}  # key -> index of the tier it comes from

    def __contains__(self, key: Key) -> bool:
        return key in self._pending

    @property
    def depth(self) -> dict[str, int]:
        """Chunks waiting, by tier name."""
        return {t.name.value: len(lane) for t, lane in zip(self._tiers, self._lanes, strict=True)}

    def request(self, chunk: Chunk, tier: int) -> bool:
        """Bring this chunk up from `tiers[tier]`. False: the queue is full, nothing will come."""
        if chunk.key in self._pending:
            return True
        if not self._lanes[tier].offer(chunk):
            self._meter.dropped("onboard", "queue_full", 1)
            return False
        self._pending[chunk.key] = tier
        return True

    def withdraw(self, key: Key) -> None:
        """Nobody waits for this key any more; it is dropped unless it is on its way."""
        tier = self._pending.get(key)
        if tier is not None and self._lanes[tier].withdraw(key):
            del self._pending[key]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(len(self._tiers)):
                for _ in range(WORKERS_PER_TIER):
                    group.create_task(self._work(index))

    async def _work(self, index: int) -> None:
        while True:
            batch = await self._lanes[index].take(BATCH_CHUNKS)
            reserved = [(chunk, self._dram.reserve(chunk.length)) for chunk in batch]
            ready = [(chunk, slot) for chunk, slot in reserved if slot is not None]
            crowded = [chunk for chunk, slot in reserved if slot is None]
            if crowded:
                self._meter.dropped("onboard", "no_room", len(crowded))
                self._end([(chunk.key, -1) for chunk in crowded])
            if ready:
                await self._bring(index, ready)

    async def _bring(self, index: int, batch: list[tuple[Chunk, Slot]]) -> None:
        tier = self._tiers[index]
        items = [LoadItem(chunk.key, self._dram.view(slot)) for chunk, slot in batch]
        start = time.perf_counter()
        # A cancelled load leaves its slots leased: the process is stopping.
        outcomes = await tier.load(items)
        seconds = time.perf_counter() - start
        ended: list[tuple[Key, int]] = []
        loaded_bytes = 0
        for (chunk, slot), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Loaded):
                self._dram.commit(slot, outcome.chunk, sealed=True)
                loaded_bytes += outcome.chunk.length
                ended.append((chunk.key, index))
            else:
                self._dram.release(slot)
                self._count_failure(tier, outcome)
                if not self._pass_on(chunk, index + 1):
                    ended.append((chunk.key, -1))
        if loaded_bytes:
            self._meter.transfer(tier.name.value, self._dram.name.value, loaded_bytes, seconds)
        self._end(ended)

    def _pass_on(self, chunk: Chunk, start: int) -> bool:
        for index in range(start, len(self._tiers)):
            (found,) = self._tiers[index].find([chunk.key])
            if found is not None and self._lanes[index].offer(found):
                self._pending[chunk.key] = index
                return True
        return False

    def _count_failure(self, tier: Tier, outcome: LoadOutcome) -> None:
        if isinstance(outcome, Corrupt | Failed):
            self._meter.error(f"load_{tier.name.value}", type(outcome).__name__.lower())

    def _end(self, ended: list[tuple[Key, int]]) -> None:
        for key, _ in ended:
            self._pending.pop(key, None)
        if ended:
            self._landed(ended)
