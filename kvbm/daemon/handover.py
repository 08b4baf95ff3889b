"""Host memory over a restart: what one daemon leaves and how the next takes it over.

At an orderly stop the arena and a snapshot of what lies in it are left as file descriptors with
systemd, or with `kvbm-daemon hold`. The next daemon takes the places at once and the chunks one
by one, hottest first: each can be claimed only when its bytes have matched its checksum. What must
hold for that:

- Nothing is left but at an orderly stop, and what was left is believed once (`snapshot`): a daemon
  that was killed leaves nothing.
- Engines are sent away first and answer that they write no more. Slots of those that did not are
  kept aside for as long as the memory lives: a worker that hangs may write to them at any time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from kvbm.daemon.settings import DramSettings
from kvbm.daemon.snapshot import Snapshot, SnapshotError, read_snapshot, write_snapshot
from kvbm.daemon.view import HandoverStatus
from kvbm.manager import BlockManager, Catalogue
from kvbm.meter import Meter
from runtime.systemd import Notifier
from runtime.units import format_size
from storage_tiers.arena import PAGE, Arena, ArenaError, Slot
from storage_tiers.base import Chunk, Key, RecoveryReport, TierName
from storage_tiers.codec import checksum
from storage_tiers.dram import DramTier
from storage_tiers.slabs import SlabAllocator

ARENA: Final = "kvbm-arena"
INDEX: Final = "kvbm-index"
VERIFY_S_MAX: Final = 120.0
BATCH_BYTES: Final = 16 << 20
BATCHES_AT_ONCE: Final = 2
HANDLED_AT_ONCE: Final = 1024  # chunks, between two turns of the event loop

_log = structlog.get_logger("kvbm.handover")

Placed = tuple[Chunk, Slot]


@dataclass(frozen=True, slots=True)
class Inheritance:
    """Memory that the daemon before left, and what it said of it."""

    arena: Arena
    snapshot: Snapshot


def inherit(
    fds: Mapping[str, int], notifier: Notifier, settings: DramSettings
) -> Inheritance | None:
    """What was left for us, if it can be believed and used; takes the descriptors.

    None with a line in the log if it cannot: its memory is freed then.
    """
    notifier.forget(fds)  # else it would outlive both this daemon and its own truth
    kept = dict(fds)
    try:
        if not fds:
            return None
        if not settings.handover:
            raise SnapshotError("dram.handover is false")
        if missing := {ARENA, INDEX} - fds.keys():
            raise SnapshotError(f"{', '.join(sorted(missing))} is missing")
        snapshot = read_snapshot(fds[INDEX])
        _check_fits(snapshot, settings)
        arena = Arena.adopt(kept.pop(ARENA), snapshot.epoch, huge_pages=snapshot.huge_pages)
    except (SnapshotError, ArenaError, OSError) as error:
        _log.warning("memory_not_adopted", reason=str(error), hint="host memory starts empty")
        return None
    finally:
        for fd in kept.values():
            os.close(fd)
    return Inheritance(arena, snapshot)


class Handover:
    """A node's host memory before and after. `run` and `leave` once each, on its event loop."""

    def __init__(
        self,
        notifier: Notifier,
        settings: DramSettings,
        manager: BlockManager,
        catalogue: Catalogue,
        meter: Meter,
        inheritance: Inheritance | None,
    ) -> None:
        """Takes the places of what was inherited, which nobody sees yet. Cost: linear in it."""
        self._notifier = notifier
        self._settings = settings
        self._manager = manager
        self._dram: DramTier = manager.dram
        self._catalogue = catalogue
        self._meter = meter
        self._waiting: list[Placed] = []  # coldest first
        self._aside: list[Slot] = []
        self._dropped: Counter[str] = Counter()
        self._order: list[Key] = []  # of what was inherited, coldest first
        self._adopted: set[Key] = set()
        self._adopted_bytes = 0
        self._seconds = 0.0
        if inheritance is not None:
            self._take_places(inheritance.snapshot)

    async def run(self) -> RecoveryReport:
        """Check and show what was inherited, hottest first, for `VERIFY_S_MAX` at most."""
        began = time.monotonic()
        await self._verify(began + VERIFY_S_MAX)
        late, self._waiting = self._waiting, []
        for _, slot in late:
            self._drop("late", slot)
        await self._restore_order()
        self._seconds = time.monotonic() - began
        report = RecoveryReport(
            TierName.DRAM,
            len(self._adopted),
            self._adopted_bytes,
            dict(self._dropped),
            self._seconds,
        )
        if report.chunks or report.dropped:
            _log.info(
                "memory_adopted",
                chunks=report.chunks,
                bytes=report.bytes,
                dropped=report.dropped,
                aside=len(self._aside),
                seconds=round(report.seconds, 3),
            )
        return report

    async def offer(self) -> None:
        """What the daemon before did not get to: to every tier that lacks it, hottest first."""
        while self._order:
            keys = self._order[: -HANDLED_AT_ONCE - 1 : -1]
            del self._order[-HANDLED_AT_ONCE:]
            for chunk in self._dram.find([key for key in keys if key in self._adopted]):
                if chunk is not None:
                    self._manager.offloader.offer_sealed(chunk)
            await asyncio.sleep(0)

    async def leave(self, unfenced: Sequence[Slot]) -> None:
        """Leave host memory for the next daemon. Nothing may change it from here on.

        `unfenced` are leased slots whose engines did not answer that they write no more.
        """
        if self._why_not() is not None:
            return
        notes = self._manager.notes
        sealed = [
            (replace(chunk, note=notes.note_of(chunk.key)), slot)
            for chunk, slot in self._dram.snapshot()
        ]
        chunks = [*self._waiting, *sealed]
        snapshot = Snapshot(
            self._dram.arena.epoch,
            self._dram.arena.capacity_bytes,
            self._settings.huge_pages,
            chunks,
            [*self._aside, *unfenced],
        )
        try:
            index = await asyncio.to_thread(write_snapshot, snapshot)
        except OSError as error:
            _log.error("memory_not_left", reason=f"no memory for its index: {error}")
            return
        is_left = await self._notifier.store({ARENA: self._dram.arena.fd, INDEX: index})
        os.close(index)
        if not is_left:
            _log.error("memory_not_left", reason="who keeps descriptors did not answer")
            return
        _log.info(
            "memory_left",
            chunks=len(chunks),
            bytes=sum(chunk.length for chunk, _ in chunks),
            unsealed=len(self._dram) - len(sealed),
            aside=len(snapshot.aside),
        )

    def status(self) -> HandoverStatus:
        return HandoverStatus(
            available=self._why_not() is None,
            reason=self._why_not(),
            adopted_chunks=len(self._adopted),
            adopted_bytes=self._adopted_bytes,
            waiting_chunks=len(self._waiting),
            dropped=dict(self._dropped),
            aside_bytes=sum(slot.length for slot in self._aside),
            seconds=self._seconds,
        )

    # -- below ---------------------------------------------------------------------------

    def _why_not(self) -> str | None:
        """Why host memory will not outlive this daemon; None if it will."""
        if not self._settings.handover:
            return "dram.handover is false"
        if not self._notifier.listens:
            return "started by neither systemd nor `kvbm-daemon hold`"
        kept_max = self._notifier.store_max
        if kept_max is not None and kept_max < 2:
            return "the unit's FileDescriptorStoreMax is below 2"
        return None

    def _take_places(self, snapshot: Snapshot) -> None:
        # First of all: nothing else may lie where somebody perhaps still writes. A generation of
        # its own keeps a worker that wakes up from beginning a copy there.
        for slot in snapshot.aside:
            generation = self._dram.arena.advance(slot.offset)
            self._aside.append(Slot(slot.offset, slot.length, generation))
            self._dram.adopt(self._aside[-1])
        for chunk, slot in snapshot.chunks:
            try:
                self._dram.adopt(slot)
            except ValueError:
                self._drop("does_not_fit", None)
                continue
            self._waiting.append((chunk, slot))
            self._order.append(chunk.key)

    async def _verify(self, end: float) -> None:
        while self._waiting and time.monotonic() < end:
            batches = [self._next_batch() for _ in range(BATCHES_AT_ONCE)]
            views = [[self._dram.view(slot) for _, slot in batch] for batch in batches]
            try:
                found = await asyncio.gather(*(asyncio.to_thread(_checksums, v) for v in views))
            except asyncio.CancelledError:
                for batch in reversed(batches):  # for the daemon after this one
                    self._waiting.extend(reversed(batch))
                raise
            for batch, digests in zip(batches, found, strict=True):
                self._show(batch, digests)

    def _next_batch(self) -> list[Placed]:
        """The hottest that wait, hottest first."""
        batch: list[Placed] = []
        size = 0
        while self._waiting and size < BATCH_BYTES:
            batch.append(self._waiting.pop())
            size += batch[-1][1].length
        return batch

    def _show(self, batch: Sequence[Placed], digests: Sequence[int]) -> None:
        shown: list[Chunk] = []
        for (chunk, slot), digest in zip(batch, digests, strict=True):
            if chunk.key in self._dram:
                self._drop("came_anew", slot)
            elif digest != chunk.checksum:
                self._reject(chunk, slot)
            else:
                self._dram.commit(slot, chunk, sealed=True)
                shown.append(chunk)
                self._adopted_bytes += chunk.length
        if shown:
            keys = [chunk.key for chunk in shown]
            self._adopted.update(keys)
            self._catalogue.appeared(TierName.DRAM, keys, [chunk.note for chunk in shown])

    def _reject(self, chunk: Chunk, slot: Slot) -> None:
        _log.error("host_memory_damaged", key=chunk.key.hex(), when="between two daemons")
        self._meter.error("handover", "corrupt")
        self._manager.quarantine.add(TierName.DRAM, [chunk.key])
        self._drop("corrupt", slot)

    def _drop(self, reason: str, slot: Slot | None) -> None:
        self._dropped[reason] += 1
        self._meter.dropped("handover", reason, 1)
        if slot is not None:
            self._dram.release(slot)

    async def _restore_order(self) -> None:
        """As it was: what was adopted in its own order, then what was stored meanwhile."""
        if not self._adopted:
            return
        since = [key for key in self._dram.all_keys() if key not in self._adopted]
        order = [*self._order, *since]
        for first in range(0, len(order), HANDLED_AT_ONCE):
            self._dram.touch(order[first : first + HANDLED_AT_ONCE])
            await asyncio.sleep(0)


def _check_fits(snapshot: Snapshot, settings: DramSettings) -> None:
    """Raises SnapshotError if this daemon's settings or its allocator cannot take it."""
    capacity = settings.capacity // PAGE * PAGE
    if snapshot.capacity_bytes != capacity:
        raise SnapshotError(
            f"dram.capacity was {format_size(snapshot.capacity_bytes)} and is "
            f"{format_size(capacity)}"
        )
    if snapshot.huge_pages != settings.huge_pages:
        raise SnapshotError(
            f"dram.huge_pages was {snapshot.huge_pages} and is {settings.huge_pages}"
        )
    trial = SlabAllocator(capacity)
    for slot in snapshot.aside:
        try:
            trial.place(slot.offset, slot.length)
        except ValueError as error:
            raise SnapshotError(f"what must be kept aside cannot be: {error}") from error


def _checksums(views: Sequence[memoryview]) -> list[int]:
    return [checksum(view) for view in views]
