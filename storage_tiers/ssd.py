"""G3: chunks in one preallocated file on a local SSD, with a crash-exact catalogue.

Order of a store: victims' catalogue entries are deleted durably, data is written, the file synced,
then the new entries are committed. So whatever the catalogue lists after a crash is on the disk in
full, and no extent is overwritten while an entry still points to it. Every load is verified.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from storage_tiers.base import (
    Chunk,
    Corrupt,
    Failed,
    Full,
    Key,
    Known,
    Loaded,
    LoadItem,
    LoadOutcome,
    Missing,
    RecoveryReport,
    RemovalReason,
    SetAside,
    Stored,
    StoreItem,
    StoreOutcome,
    TierError,
    TierListener,
    TierName,
    TierUsage,
)
from storage_tiers.catalogue import CatalogueError, Changes, Entry
from storage_tiers.codec import checksum
from storage_tiers.eviction import find_victims
from storage_tiers.files import PAGE, Moved, NotMoved, Piece, make_mover, padded
from storage_tiers.recency import Recency, Record
from storage_tiers.recovery import RecoverMode, open_directory
from storage_tiers.settle import Gate, settled

STORES_AT_ONCE: Final = 2
_QUARANTINE_MAX: Final = 64  # extents kept aside; the oldest is used again when it is exceeded
_VICTIMS_TRIED_MAX: Final = 4096
_RESTAMPED_MAX: Final = 8192  # touches held in memory before a load records them
_VERIFY_THREADS: Final = 2
_CLOSED: Final = Failed("the SSD tier is closed")


class SsdTier:
    """A directory with `extents`, `catalogue/` and `lock`. One event loop calls it.

    Also a `SupportsScrub`: extents whose bytes did not match are set aside, restarts included.
    """

    name = TierName.SSD

    def __init__(
        self,
        path: Path | str,
        capacity_bytes: int,
        listener: TierListener,
        *,
        recover: RecoverMode = "quiet",
        mover: str = "auto",
    ) -> None:
        self._path = Path(path)
        self._capacity_bytes = capacity_bytes // PAGE * PAGE
        self._listener = listener
        self._recover = recover
        self._make_mover = partial(make_mover, kind=mover)
        self._index: Recency[Record] = Recency(persistent=True)
        self._key_at: dict[int, Key] = {}  # extent offset -> resident there
        self._undeleted: set[Key] = set()  # left the index; deleted before the next write
        self._gate = Gate()
        self._storing = asyncio.Semaphore(STORES_AT_ONCE)
        self._placing: dict[Key, asyncio.Future[None]] = {}  # keys being written
        self._aside: dict[int, SetAside] = {}  # by offset, the oldest first
        self._aside_unsaved = False
        self._engaged = 0  # loads and stores under way; scrubbing gives way to them
        self._stored_bytes = self._loaded_bytes = self._corrupt = 0
        self._evictions: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    async def open(self) -> RecoveryReport:
        began = time.monotonic()
        if self._capacity_bytes <= 0:
            raise TierError("SSD capacity must be at least 4 KiB")
        self._directory = directory = await open_directory(
            self._path, self._capacity_bytes, self._recover, self._make_mover
        )
        self._verifier = ThreadPoolExecutor(_VERIFY_THREADS, thread_name_prefix="ssd-verify")
        self._index.restore([Record(e.chunk, e.offset, e.stamp) for e in directory.entries])
        self._key_at = {entry.offset: entry.chunk.key for entry in directory.entries}
        self._aside = {extent.at: extent for extent in directory.aside}
        directory.entries = []
        self._gate.shut = False
        self._listener.appeared(self.name, [r.chunk.key for r in self._index.records()])
        return RecoveryReport(
            self.name,
            chunks=len(self._index),
            bytes=sum(record.chunk.length for record in self._index.records()),
            dropped=dict(directory.dropped),
            seconds=time.monotonic() - began,
        )

    async def close(self) -> None:
        if not self._gate.shut:
            await settled(self._close())

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        return [r.chunk if (r := self._index.get(key)) is not None else None for key in keys]

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        if self._gate.shut:
            return [_CLOSED] * len(items)
        with self._gate, self._engagement():
            async with self._storing:
                return await settled(self._store(items))

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        if self._gate.shut:
            return [_CLOSED] * len(items)
        with self._gate, self._engagement():
            return await settled(self._load(items))

    async def remove(self, keys: Sequence[Key]) -> None:
        if self._gate.shut:
            return
        with self._gate:
            self._drop(keys, RemovalReason.REQUESTED)
            await settled(self._delete_dropped())

    def touch(self, keys: Sequence[Key]) -> None:
        self._index.touch(keys)

    def usage(self) -> TierUsage:
        opened = not self._gate.shut
        return TierUsage(
            tier=self.name,
            mover=self._directory.mover.name if opened else "closed",
            capacity_bytes=self._capacity_bytes,
            used_bytes=self._directory.slots.used_bytes if opened else 0,
            chunks=len(self._index),
            stored_bytes_total=self._stored_bytes,
            loaded_bytes_total=self._loaded_bytes,
            evictions_total=dict(self._evictions),
            corrupt_total=self._corrupt,
            errors_total=dict(self._errors),
        )

    # -- SupportsScrub -------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._engaged > 0

    async def places(self) -> Sequence[int]:
        """Offsets of all extents, ascending. Cost: 8 bytes a chunk, and a walk over all of them."""
        offsets = np.fromiter(self._key_at, np.int64, len(self._key_at))
        await asyncio.to_thread(offsets.sort)
        return offsets  # type: ignore[return-value]  # an array is a sequence of its numbers

    async def scrub(self, place: int) -> tuple[Chunk, LoadOutcome] | None:
        key = self._key_at.get(place)
        (chunk,) = self.find([key]) if key is not None else (None,)
        if chunk is None:
            return None
        if self._gate.shut:
            return chunk, _CLOSED
        scratch = memoryview(mmap.mmap(-1, padded(chunk.length)))[: chunk.length]
        with self._gate:
            (outcome,) = await settled(self._load([LoadItem(chunk.key, scratch)], op="scrub"))
        return chunk, outcome

    def aside(self) -> Sequence[SetAside]:
        return list(self._aside.values())

    async def give_back(self, keys: Collection[Key]) -> list[SetAside]:
        wanted = frozenset(keys)
        found = [extent for extent in self._aside.values() if extent.key in wanted]
        if not found or self._gate.shut:
            return []
        with self._gate:
            for extent in found:
                self._free_aside(extent)
            await settled(self._delete_dropped())
        return found

    def check_integrity(self) -> None:
        """Assert the module's invariants; call it when nothing is in flight. Cost: linear."""
        slots = self._directory.slots
        slots.check_integrity()
        self._index.check_integrity()
        resident = {record.at: record.chunk.key for record in self._index.records()}
        assert resident == self._key_at
        assert not self._aside.keys() & resident.keys()
        held = sum(slots.size_of(offset) for offset in (*resident, *self._aside))
        assert held == slots.used_bytes <= self._capacity_bytes

    # -- store ---------------------------------------------------------------------------

    async def _store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        """One batch; another one may be on its way, so that data and catalogue take turns."""
        while others := {f for item in items if (f := self._placing.get(item.chunk.key))}:
            await asyncio.wait(others)
        placed = asyncio.get_running_loop().create_future()
        keys = [item.chunk.key for item in items]
        self._placing.update(dict.fromkeys(keys, placed))
        try:
            return await self._store_alone(items)
        finally:
            for key in keys:
                self._placing.pop(key, None)
            placed.set_result(None)

    async def _store_alone(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        outcomes: list[StoreOutcome] = [Known()] * len(items)
        placed: dict[Key, tuple[int, int]] = {}  # key -> index of its item, offset
        kept = [
            record
            for item in items
            if item.chunk.key not in self._index
            for record in self._index.ancestors(item.chunk)
        ]
        for record in kept:
            record.pins += 1
        for index, item in enumerate(items):
            assert len(item.data) == item.chunk.length, "a store item holds exactly its chunk"
            if item.chunk.key in self._index or item.chunk.key in placed:
                continue
            offset = self._reserve(item.chunk.length)
            if offset is None:
                outcomes[index] = Full("no chunk on the SSD can be evicted for this one")
            else:
                placed[item.chunk.key] = (index, offset)
        try:
            written = await self._write(items, placed)
        finally:
            for record in kept:
                self._unpin(record)
        for key, (index, offset) in placed.items():
            outcome = outcomes[index] = written[key]
            if isinstance(outcome, Failed):
                self._directory.slots.free(offset)
                self._errors["store"] += 1
                continue
            self._index.add(Record(items[index].chunk, offset))
            self._key_at[offset] = key
            self._stored_bytes += items[index].chunk.length
        here = [item.chunk for item in items if item.chunk.key in self._index]
        self._index.touch([c.key for c in sorted(here, key=lambda chunk: -chunk.position)])
        return outcomes

    async def _write(
        self, items: Sequence[StoreItem], placed: dict[Key, tuple[int, int]]
    ) -> dict[Key, Stored | Failed]:
        """Victims out of the catalogue, data, sync, new entries into the catalogue."""
        if not placed:
            return {}
        if (why_not := await self._delete_dropped()) is not None:
            return dict.fromkeys(placed, Failed(why_not))
        pieces = [Piece(items[index].data, offset) for index, offset in placed.values()]
        moved = await self._directory.mover.write(pieces)
        synced = await self._directory.mover.sync()
        if isinstance(synced, NotMoved):
            return dict.fromkeys(placed, Failed(synced.reason))
        outcomes: dict[Key, Stored | Failed] = {
            key: Stored() if isinstance(move, Moved) else Failed(move.reason)
            for key, move in zip(placed, moved, strict=True)
        }
        written = [
            Entry(items[index].chunk, offset, 0)
            for key, (index, offset) in placed.items()
            if isinstance(outcomes[key], Stored)
        ]
        written.sort(key=lambda entry: -entry.chunk.position)
        first = self._index.reserve(len(written))
        put = [replace(entry, stamp=first + index) for index, entry in enumerate(written)]
        why_not = await self._commit(Changes(put=put, stamps=self._take_restamped()))
        if why_not is not None:
            self._undeleted.update(placed)  # in case the disk took it although it said no
            return dict.fromkeys(placed, Failed(why_not))
        return outcomes

    def _reserve(self, length: int) -> int | None:
        """An extent, evicting for it if need be. Each round evicts something or gives up."""
        slots = self._directory.slots
        while (offset := slots.allocate(length)) is None and slots.fits(length):
            victims = find_victims(slots, self._index, self._key_at, length)
            if not victims:
                return None
            self._drop(victims, RemovalReason.CAPACITY)
        return offset

    # -- load ----------------------------------------------------------------------------

    async def _load(self, items: Sequence[LoadItem], *, op: str = "load") -> list[LoadOutcome]:
        outcomes: list[LoadOutcome] = [Missing()] * len(items)
        pinned: list[tuple[int, LoadItem, Record]] = []
        for index, item in enumerate(items):
            record = self._index.get(item.key)
            if record is None:
                continue
            assert len(item.into) >= record.chunk.length, "the buffer is as long as the chunk"
            record.pins += 1
            pinned.append((index, item, record))
        try:
            pieces = [Piece(i.into[: r.chunk.length], r.at) for _, i, r in pinned]
            moved = await self._directory.mover.read(pieces)
            loop = asyncio.get_running_loop()
            digests = await loop.run_in_executor(self._verifier, _digests, pieces)
            for (index, _, record), move, digest in zip(pinned, moved, digests, strict=True):
                if isinstance(move, NotMoved):
                    self._errors[op] += 1
                    outcomes[index] = Failed(move.reason)
                elif digest != record.chunk.checksum:
                    self._quarantine(record)
                    outcomes[index] = Corrupt("the bytes do not match the checksum")
                else:
                    self._loaded_bytes += record.chunk.length if op == "load" else 0
                    outcomes[index] = Loaded(record.chunk)
        finally:
            for _, _, record in pinned:
                self._unpin(record)
        if self._undeleted or len(self._index.restamped) > _RESTAMPED_MAX:
            await self._delete_dropped()
        return outcomes

    # -- what leaves ---------------------------------------------------------------------

    def _drop(self, keys: Iterable[Key], reason: RemovalReason) -> None:
        """Out of the index now; out of the catalogue before any extent is written again."""
        removed: list[Key] = []
        for key in keys:
            record = self._index.pop(key)
            if record is None:
                continue
            removed.append(key)
            del self._key_at[record.at]
            record.gone = record.pins > 0
            if not record.gone:
                self._directory.slots.free(record.at)
        if removed:
            self._undeleted.update(removed)
            self._evictions[reason.value] += len(removed)
            self._listener.removed(self.name, removed, reason)

    def _quarantine(self, record: Record) -> None:
        key = record.chunk.key
        self._corrupt += 1
        if self._index.get(key) is not record:
            return  # another load saw it first
        self._index.pop(key)
        del self._key_at[record.at]
        self._undeleted.add(key)
        self._evictions[RemovalReason.CORRUPT.value] += 1
        self._aside[record.at] = SetAside(key, record.at, record.chunk.length, time.time())
        self._aside_unsaved = True
        if len(self._aside) > _QUARANTINE_MAX:
            self._free_aside(next(iter(self._aside.values())))
        self._listener.removed(self.name, [key], RemovalReason.CORRUPT)

    def _free_aside(self, extent: SetAside) -> None:
        """Let it be used again; the catalogue forgets it before it is written."""
        del self._aside[extent.at]
        self._aside_unsaved = True
        self._directory.slots.free(extent.at)

    def _unpin(self, record: Record) -> None:
        record.pins -= 1
        if record.gone and record.pins == 0:
            self._directory.slots.free(record.at)

    async def _delete_dropped(self) -> str | None:
        """Tell the catalogue what is gone; why it could not be told, if so."""
        doomed = list(self._undeleted)
        is_due = doomed or self._aside_unsaved or len(self._index.restamped) > _RESTAMPED_MAX
        if not is_due:
            return None
        why_not = await self._commit(Changes(delete=doomed, stamps=self._take_restamped()))
        if why_not is None:
            self._undeleted.difference_update(doomed)
        return why_not

    async def _commit(self, changes: Changes) -> str | None:
        """Why the catalogue did not take it, or None."""
        has_aside, self._aside_unsaved = self._aside_unsaved, False
        if has_aside:
            changes = replace(changes, aside=self.aside())
        try:
            await self._directory.catalogue.commit(changes)
        except CatalogueError as error:
            self._errors["catalogue"] += 1
            self._index.restamped = {**changes.stamps, **self._index.restamped}
            self._aside_unsaved |= has_aside
            return str(error)
        finally:
            if grown := self._directory.catalogue.grown:
                self._errors["catalogue_full"] = grown
        return None

    @contextlib.contextmanager
    def _engagement(self) -> Iterator[None]:
        self._engaged += 1
        try:
            yield
        finally:
            self._engaged -= 1

    def _take_restamped(self) -> dict[Key, int]:
        taken, self._index.restamped = self._index.restamped, {}
        return taken

    async def _close(self) -> None:
        await self._gate.close()
        changes = Changes(
            delete=list(self._undeleted),
            stamps=self._take_restamped(),
            meta=replace(self._directory.meta, clean=True),
            aside=self.aside(),
        )
        self._verifier.shutdown()
        try:
            await self._directory.close(changes)
        except CatalogueError:
            self._errors["catalogue"] += 1


def _digests(pieces: Sequence[Piece]) -> list[int]:
    return [checksum(piece.data) for piece in pieces]
