"""Onboard: bring chunks from lower tiers up into host memory, each once however many wait.

The manager asks with `request`; workers, a few per tier, take batches from the tier's lane,
reserve slots, load and commit. A tier that turns out not to have the chunk (gone, corrupt,
unreachable) passes it on to the next one that does. Every request ends in one `landed` call.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import structlog

from kvbm.complaints import Complaints
from kvbm.lane import Lane
from kvbm.meter import Meter
from kvbm.note import NoteBook
from kvbm.pace import TierPace
from kvbm.quarantine import Quarantine
from storage_tiers.arena import Slot
from storage_tiers.base import Chunk, Corrupt, Failed, Key, Loaded, LoadItem, LoadOutcome, Tier
from storage_tiers.dram import DramTier

BATCH_CHUNKS: Final = 64
BATCH_BYTES: Final = 16 << 20  # small chunks of one object then share a request
WORKERS_PER_TIER: Final = 2
QUEUE_CHUNKS: Final = 1 << 16
BYTES_IN_FLIGHT: Final = 512 << 20

_log = structlog.get_logger("kvbm.onboard")

FAILED: Final = -1
NO_ROOM: Final = -2

Landed = Callable[[Sequence[tuple[Key, int]]], None]
"""Told (key, source) per chunk that ended: the tier's index in `tiers`, or why it did not land."""


class Onboarder:
    """Call from one event loop; `run` until cancelled."""

    def __init__(
        self,
        dram: DramTier,
        tiers: Sequence[Tier],
        landed: Landed,
        meter: Meter,
        notes: NoteBook,
        *,
        quarantine: Quarantine | None = None,
        queue_chunks: int = QUEUE_CHUNKS,
        bytes_in_flight: int = BYTES_IN_FLIGHT,
    ) -> None:
        self._dram = dram
        self._tiers = tiers
        self._landed = landed
        self._meter = meter
        self._notes = notes
        self._quarantine = Quarantine() if quarantine is None else quarantine
        self._lanes = [Lane(queue_chunks) for _ in tiers]
        self._complaints = Complaints(_log)
        self.paces = [TierPace() for _ in tiers]
        self._taken_bytes = [0] * len(tiers)  # out of the lanes and not ended yet
        self._pending: dict[Key, int] = {}  # key -> index of the tier it comes from
        # One for each tier, so that a slow one does not hold what another could use.
        self._budgets = [_Budget(bytes_in_flight // len(tiers)) for _ in tiers]

    def __contains__(self, key: Key) -> bool:
        return key in self._pending

    @property
    def depth(self) -> dict[str, int]:
        """Chunks waiting, by tier name."""
        return {t.name.value: len(lane) for t, lane in zip(self._tiers, self._lanes, strict=True)}

    @property
    def limits(self) -> dict[str, int]:
        """Most that may wait, by tier name."""
        lanes = zip(self._tiers, self._lanes, strict=True)
        return {tier.name.value: lane.capacity_chunks for tier, lane in lanes}

    @property
    def queued_bytes(self) -> list[int]:
        """What is to be brought up before anything asked for now, by index in `tiers`."""
        lanes = zip(self._lanes, self._taken_bytes, strict=True)
        return [lane.waiting_bytes + taken for lane, taken in lanes]

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
            budget = self._budgets[index]
            batch = await self._lanes[index].take(
                BATCH_CHUNKS, bytes_max=min(BATCH_BYTES, budget.total_bytes)
            )
            size = sum(chunk.length for chunk in batch)
            self._taken_bytes[index] += size
            try:
                async with budget.held(size):
                    await self._bring_up(index, batch)
            finally:
                self._taken_bytes[index] -= size

    async def _bring_up(self, index: int, batch: list[Chunk]) -> None:
        reserved = [(chunk, self._dram.reserve(chunk.length)) for chunk in batch]
        ready = [(chunk, slot) for chunk, slot in reserved if slot is not None]
        crowded = [chunk for chunk, slot in reserved if slot is None]
        if crowded:
            self._meter.dropped("onboard", "no_room", len(crowded))
            self._end([(chunk.key, NO_ROOM) for chunk in crowded])
        if ready:
            try:
                await self._load(index, ready)
            except Exception:  # noqa: BLE001 (task border)
                # A fault of ours must not end onboarding; who waits must hear of it.
                _log.exception("onboard_failed", tier=self._tiers[index].name.value)
                self._meter.error(f"load_{self._tiers[index].name.value}", "fault")
                for _, slot in ready:
                    if self._dram.is_leased(slot):
                        self._dram.release(slot)
                keys = [chunk.key for chunk, _ in ready if chunk.key in self._pending]
                self._end([(key, index if key in self._dram else FAILED) for key in keys])

    async def _load(self, index: int, batch: list[tuple[Chunk, Slot]]) -> None:
        tier = self._tiers[index]
        items = [LoadItem(chunk.key, self._dram.view(slot)) for chunk, slot in batch]
        start = time.perf_counter()
        batch_number = self.paces[index].begin(sum(chunk.length for chunk, _ in batch))
        loaded_bytes = 0
        try:
            # A cancelled load leaves its slots leased: the process is stopping.
            outcomes = await tier.load(items)
            loaded_bytes = sum(o.chunk.length for o in outcomes if isinstance(o, Loaded))
        finally:
            self.paces[index].end(batch_number, loaded_bytes)
        seconds = time.perf_counter() - start
        ended: list[tuple[Key, int]] = []
        for (chunk, slot), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Loaded):
                self._dram.commit(slot, outcome.chunk, sealed=True)
                ended.append((chunk.key, index))
            else:
                self._dram.release(slot)
                self._note_failure(tier, chunk.key, outcome)
                if not self._pass_on(chunk, index + 1):
                    ended.append((chunk.key, FAILED))
        if loaded_bytes:
            self._meter.transfer(tier.name.value, self._dram.name.value, loaded_bytes, seconds)
        noted = [o.chunk for o in outcomes if isinstance(o, Loaded) and o.chunk.note]
        if noted:
            self._notes.learn([chunk.key for chunk in noted], [chunk.note for chunk in noted])
        self._end(ended)

    def _pass_on(self, chunk: Chunk, start: int) -> bool:
        for index in range(start, len(self._tiers)):
            (found,) = self._tiers[index].find([chunk.key])
            if found is not None and self._lanes[index].offer(found):
                self._pending[chunk.key] = index
                return True
        return False

    def _note_failure(self, tier: Tier, key: Key, outcome: LoadOutcome) -> None:
        if isinstance(outcome, Corrupt):
            _log.error("chunk_damaged", tier=tier.name.value, key=key.hex(), reason=outcome.reason)
            self._quarantine.explain(tier.name, key, outcome.reason)
        if isinstance(outcome, Failed):
            self._complaints.failed(tier.name, "load", outcome.reason)
        if isinstance(outcome, Corrupt | Failed):
            self._meter.error(f"load_{tier.name.value}", type(outcome).__name__.lower())

    def _end(self, ended: list[tuple[Key, int]]) -> None:
        for key, _ in ended:
            self._pending.pop(key, None)
        if ended:
            self._landed(ended)


class _Budget:
    """Bytes that may be in flight at a time; waiters are served in order."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._free_bytes = total_bytes
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def held(self, size: int) -> AsyncIterator[None]:
        size = min(size, self.total_bytes)  # one chunk larger than the budget goes alone
        async with self._turn:
            while self._free_bytes < size:
                self._freed.clear()
                await self._freed.wait()
            self._free_bytes -= size
        try:
            yield
        finally:
            self._free_bytes += size
            self._freed.set()
