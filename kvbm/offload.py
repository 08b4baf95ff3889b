"""Offload: write committed chunks through to every lower tier, behind the engines' backs.

Two stages. *Seal*: compute the checksum of a chunk that an engine committed, off the event loop.
*Lanes*: one per tier, each with its own batching, so that a slow tier holds nobody up. Queues hold
keys, not bytes: a chunk is claimed only while it is copied; one that host memory has evicted by
then is read from the tier above, or counted as dropped.

Queues are first in, first out; a node that is drained or stopped takes the hottest first, also of
what no queue had room for (`evacuate`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from kvbm.complaints import Complaints
from kvbm.lane import Lane
from kvbm.meter import Meter
from kvbm.note import NoteBook
from kvbm.quarantine import Quarantine
from storage_tiers.base import (
    Chunk,
    Corrupt,
    Failed,
    Full,
    Key,
    Known,
    Loaded,
    LoadItem,
    Stored,
    StoreItem,
    Tier,
)
from storage_tiers.codec import checksum
from storage_tiers.dram import DramTier

SEAL_BATCH_CHUNKS: Final = 16
BACKOFF_S_MAX: Final = 30.0
IDLE_POLL_S: Final = 0.02
SEARCHED_AT_ONCE: Final = 2048

_log = structlog.get_logger("kvbm.offload")

StoredCallback = Callable[[Tier, Sequence[Chunk]], None]


@dataclass(frozen=True, slots=True)
class LaneSettings:
    """How one tier wants its writes."""

    batch_chunks: int = 32
    batch_bytes: int = 64 << 20  # claimed at a time, a larger chunk on its own
    queue_chunks: int = 4096
    enough_bytes: int = 0  # linger until this much waits ...
    linger_s: float = 0.0  # ... but no longer than this
    attempts: int = 3  # per chunk, while the medium fails
    writers: int = 1  # batches on their way at a time
    is_shared: bool = False  # with other nodes: what came from one of them is for it to write


class Offloader:
    """Call from one event loop; `run` until cancelled."""

    def __init__(
        self,
        dram: DramTier,
        tiers: Sequence[tuple[Tier, LaneSettings]],
        stored: StoredCallback,
        meter: Meter,
        quarantine: Quarantine,
        notes: NoteBook,
    ) -> None:
        self._dram = dram
        self._tiers = [tier for tier, _ in tiers]
        self._settings = [settings for _, settings in tiers]
        self._stored = stored
        self._meter = meter
        self._quarantine = quarantine
        self._notes = notes
        self._to_seal = Lane(max((s.queue_chunks for s in self._settings), default=4096))
        self._lanes = [Lane(settings.queue_chunks) for settings in self._settings]
        self._attempts: dict[tuple[int, Key], int] = {}
        self._busy = 0  # chunks on their way
        self._hurries = 0  # who wants lanes not to linger
        self._complaints = Complaints(_log)
        self._is_evacuating = False
        self._search = asyncio.Event()  # for what is in host memory alone and in no queue
        self._queued: set[Key] = set()  # what was in queues when the search began
        self._unqueued = 0  # how much of it is left; at least 1 while it is looked for

    def offer(self, chunk: Chunk) -> None:
        """A chunk was committed to host memory."""
        if not self._to_seal.offer(chunk):
            self._meter.dropped("seal", "queue_full", 1)

    def offer_sealed(self, chunk: Chunk, *, from_peer: bool = False) -> None:
        """A chunk with its checksum known; each tier that lacks it and wants it gets it."""
        for index, tier in enumerate(self._tiers):
            if from_peer and self._settings[index].is_shared:
                continue
            if tier.find([chunk.key])[0] is None:
                self._offer_to(index, chunk)

    def offer_again(self, tier: Tier, keys: Sequence[Key]) -> None:
        """Chunks of one sequence, in its order, that are in use and that a tier lacks.

        It refused them or had no room, or lost them. What comes after a refused one is of no use
        there without it.
        """
        index = self._tiers.index(tier)
        for key in keys:
            if key in self._lanes[index]:
                continue
            record = self._dram.claim(key)
            if record is None:
                return
            sealed, chunk = self._dram.is_sealed(record), self._dram.chunk(record)
            self._dram.unclaim(record)
            if not sealed or not self._offer_to(index, chunk):
                return

    def _offer_to(self, index: int, chunk: Chunk) -> bool:
        tier = self._tiers[index]
        reason = tier.refusal(chunk)
        if reason is None and self._lanes[index].offer(chunk):
            return True
        self._meter.dropped(f"offload_{tier.name.value}", reason or "queue_full", 1)
        return False

    @property
    def depth(self) -> dict[str, int]:
        """Chunks waiting, by stage."""
        lanes = zip(self._tiers, self._lanes, strict=True)
        return {"seal": len(self._to_seal)} | {t.name.value: len(lane) for t, lane in lanes}

    @property
    def limits(self) -> dict[str, int]:
        """Most that may wait, by stage."""
        lanes = zip(self._tiers, self._lanes, strict=True)
        own = {"seal": self._to_seal.capacity_chunks}
        return own | {tier.name.value: lane.capacity_chunks for tier, lane in lanes}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._seal())
            group.create_task(self._catch_up())
            for index, settings in enumerate(self._settings):
                for _ in range(settings.writers):
                    group.create_task(self._write(index))

    @property
    def left(self) -> int:
        """Chunks that wait or are on their way; when evacuating, also those to be queued yet."""
        return self._busy + self._unqueued + sum(self.depth.values())

    def hurry(self) -> None:
        """Lanes write what they have without waiting for more, until `unhurry` as many times."""
        self._hurries += 1
        for lane in self._lanes:
            lane.hurry(True)

    def unhurry(self) -> None:
        self._hurries -= 1
        for lane in self._lanes:
            lane.hurry(self._hurries > 0)

    def evacuate(self) -> None:
        """Until `stay`: what host memory alone holds goes down, the latest used first.

        Parents go before their children, so that whatever was done when time runs out can be
        used. Goes over host memory once, in slices.
        """
        if self._is_evacuating:
            return
        self._is_evacuating = True
        self.hurry()
        for lane in (self._to_seal, *self._lanes):
            lane.order = self._dram.hottest_first
        # What waits already waits in line with the rest: a full queue may hold the coldest.
        for lane in (self._to_seal, *self._lanes[:1]):
            self._queued.update(chunk.key for chunk in lane.withdraw_all())
        if len(self._dram):
            self._unqueued = max(1, len(self._queued))
            self._search.set()

    def stay(self) -> None:
        """End `evacuate`."""
        if not self._is_evacuating:
            return
        self._is_evacuating = False
        self.unhurry()
        for lane in (self._to_seal, *self._lanes):
            lane.order = None

    async def drain(self, deadline_s: float) -> int:
        """Wait until nothing waits or is on its way; how many chunks were left at the deadline."""
        end = time.monotonic() + deadline_s
        self.hurry()
        try:
            while self.left and time.monotonic() < end:
                await asyncio.sleep(IDLE_POLL_S)
        finally:
            self.unhurry()
        return self.left

    # -- stages --------------------------------------------------------------------------

    async def _seal(self) -> None:
        while True:
            batch = await self._to_seal.take(SEAL_BATCH_CHUNKS)
            self._busy += len(batch)
            dram = self._dram
            records = [r for chunk in batch if (r := dram.claim(chunk.key)) is not None]
            if len(records) < len(batch):
                self._meter.dropped("seal", "evicted_first", len(batch) - len(records))
            try:
                unsealed = [record for record in records if not dram.is_sealed(record)]
                views = [dram.view(dram.slot(record)) for record in unsealed]
                digests = await asyncio.to_thread(_checksums, views)
                for record, digest in zip(unsealed, digests, strict=True):
                    dram.seal(record, digest)
                for record in records:
                    await self._room(self._lanes[:1])
                    self.offer_sealed(dram.chunk(record))
            finally:
                self._unclaim(records)
                self._busy -= len(batch)

    async def _catch_up(self) -> None:
        while True:
            await self._search.wait()
            self._search.clear()
            alone = await self._only_here()
            queued, self._queued = self._queued, set()
            waiting = self._dram.hottest_first(list({*alone, *queued}))
            for place, key in enumerate(waiting):
                self._unqueued = len(waiting) - place
                await self._room((self._to_seal, *self._lanes[:1]))
                (chunk,) = self._dram.find([key])
                if chunk is None or not (self._is_evacuating or key in queued):
                    continue
                if _is_sealed(chunk):
                    self.offer_sealed(chunk)
                else:
                    self.offer(chunk)
            self._unqueued = 0

    async def _room(self, lanes: Sequence[Lane]) -> None:
        """When evacuating, wait until none of these is full: then nothing has to be dropped."""
        while self._is_evacuating and any(len(lane) >= lane.capacity_chunks for lane in lanes):
            await asyncio.sleep(IDLE_POLL_S)

    async def _only_here(self) -> list[Key]:
        """Keys of chunks that are in no lower tier, or have no checksum yet."""
        found: list[Key] = []
        start, more = 0, True
        while more:
            keys, start = self._dram.some(start, SEARCHED_AT_ONCE)
            more = start > 0
            chunks = [chunk for chunk in self._dram.find(keys) if chunk is not None]
            found += [chunk.key for chunk in chunks if not _is_sealed(chunk)]
            alone = [chunk.key for chunk in chunks if _is_sealed(chunk)] if self._tiers else []
            for tier in self._tiers:
                there = tier.find(alone)
                alone = [key for key, at in zip(alone, there, strict=True) if at is None]
            found += alone
            await asyncio.sleep(0)
        return found

    async def _write(self, index: int) -> None:
        settings, lane = self._settings[index], self._lanes[index]
        backoff_s = 0.0
        while True:
            batch = await lane.take(
                settings.batch_chunks,
                bytes_max=settings.batch_bytes,
                enough_bytes=settings.enough_bytes,
                linger_s=settings.linger_s,
            )
            self._busy += len(batch)
            try:
                failed = await self._write_batch(index, batch)
            except Exception:  # noqa: BLE001 (task border)
                # A fault of ours must not end offloading, and with it the node's other tiers.
                queue = f"offload_{self._tiers[index].name.value}"
                _log.exception("offload_failed", queue=queue, chunks=len(batch))
                self._meter.dropped(queue, "fault", len(batch))
                failed = True
            finally:
                self._busy -= len(batch)
            backoff_s = min(max(2 * backoff_s, 0.5), BACKOFF_S_MAX) if failed else 0.0
            await asyncio.sleep(backoff_s)

    async def _write_batch(self, index: int, batch: list[Chunk]) -> bool:
        """Move one batch into a tier. True if the medium failed for any of it."""
        tier = self._tiers[index]
        dram = self._dram
        records: list[int] = []
        items: list[StoreItem] = []
        try:
            for chunk in batch:
                record = dram.claim(chunk.key)
                if record is not None:
                    records.append(record)
                    if dram.is_sealed(record):  # else it came anew, and is offered once it is
                        noted = self._noted(dram.chunk(record))
                        items.append(StoreItem(noted, dram.view(dram.slot(record))))
                elif (item := await self._reread(index, chunk)) is not None:
                    items.append(item)
                else:
                    self._drop(index, chunk, "evicted_first")
            start = time.perf_counter()
            outcomes = await tier.store(items)
        finally:
            self._unclaim(records)
        seconds = time.perf_counter() - start
        stored = [i.chunk for i, o in zip(items, outcomes, strict=True) if isinstance(o, Stored)]
        if stored:
            size = sum(chunk.length for chunk in stored)
            self._meter.transfer(dram.name.value, tier.name.value, size, seconds)
            self._stored(tier, stored)
        failed = False
        for item, outcome in zip(items, outcomes, strict=True):
            match outcome:
                case Stored() | Known():
                    self._attempts.pop((index, item.chunk.key), None)
                case Full():
                    self._drop(index, item.chunk, outcome.cause)
                case Failed():
                    failed = True
                    self._complaints.failed(tier.name, "store", outcome.reason)
                    self._try_again(index, item.chunk)
        return failed

    async def _reread(self, index: int, chunk: Chunk) -> StoreItem | None:
        """The chunk's bytes from a tier above this one, for a lane that lags behind."""
        for tier in self._tiers[:index]:
            (found,) = tier.find([chunk.key])
            if found is None:
                continue
            buffer = memoryview(bytearray(found.length))
            (outcome,) = await tier.load([LoadItem(chunk.key, buffer)])
            if isinstance(outcome, Loaded):
                return StoreItem(self._noted(outcome.chunk), buffer)
            if isinstance(outcome, Corrupt):
                name, key = tier.name.value, chunk.key.hex()
                _log.error("chunk_damaged", tier=name, key=key, reason=outcome.reason)
                self._meter.error(f"load_{name}", "corrupt")
                self._quarantine.explain(tier.name, chunk.key, outcome.reason)
        return None

    def _noted(self, chunk: Chunk) -> Chunk:
        """With its note, which goes with it wherever it is written."""
        note = chunk.note or self._notes.note_of(chunk.key)
        return replace(chunk, note=note) if note else chunk

    def _try_again(self, index: int, chunk: Chunk) -> None:
        tier, key = self._tiers[index], chunk.key
        self._meter.error(f"store_{tier.name.value}", "failed")
        attempt = self._attempts.pop((index, key), 0) + 1
        if attempt < self._settings[index].attempts and self._lanes[index].offer(chunk):
            self._attempts[index, key] = attempt
        else:
            self._drop(index, chunk, "failed")

    def _drop(self, index: int, chunk: Chunk, reason: str) -> None:
        self._attempts.pop((index, chunk.key), None)
        self._meter.dropped(f"offload_{self._tiers[index].name.value}", reason, 1)

    def _unclaim(self, records: Sequence[int]) -> None:
        for record in records:
            self._dram.unclaim(record)


def _is_sealed(chunk: Chunk) -> bool:
    return chunk.checksum != 0  # 0 until it is computed; computed, it is that once in 2**64


def _checksums(views: Sequence[memoryview]) -> list[int]:
    return [checksum(view) for view in views]
