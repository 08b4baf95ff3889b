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
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from storage_tiers.admission import Admission
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
    tenant_of,
)
from storage_tiers.budget import Budget
from storage_tiers.catalogue import CatalogueError, Changes, Entry, Meta
from storage_tiers.chunk_index import PLACE_UNIT, ChunkIndex
from storage_tiers.codec import checksum
from storage_tiers.eviction import Quotas, find_own_victim, find_victims, within_quota
from storage_tiers.files import PAGE, Moved, NotMoved, Piece, make_mover, padded
from storage_tiers.leaves import NONE
from storage_tiers.policy import EvictionPolicy, LruPolicy
from storage_tiers.recovery import RecoverMode, open_directory
from storage_tiers.settle import Gate, settled
from storage_tiers.slabs import HELD

STORES_AT_ONCE: Final = 2
_QUARANTINE_MAX: Final = 64  # extents kept aside; the oldest is used again when it is exceeded
_CAPACITY_MAX: Final = PLACE_UNIT << 32
_UNRECORDED_MAX: Final = 8192  # touches held in memory before a load records them; a commit's most
_STAMPS_A_SECOND: Final = 1 << 24
_VERIFY_THREADS: Final = 2
_ANNOUNCED_AT_ONCE: Final = 4096
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
        policy: EvictionPolicy | None = None,
        admission: Admission | None = None,
        write_budget: Budget | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`write_budget` is in bytes; what is spent is what reaches the disk."""
        self._path = Path(path)
        self._capacity_bytes = capacity_bytes // PAGE * PAGE
        self._listener = listener
        self._recover = recover
        self._make_mover = partial(make_mover, kind=mover)
        self._clock = clock
        self._index = ChunkIndex(LruPolicy() if policy is None else policy, self._free, now_s=clock)
        self._admission = admission
        self._quotas = quotas or {}
        self._pending = array("q", [0]) * 256  # bytes being written, by tenant
        self._write_budget = Budget() if write_budget is None else write_budget
        self._stamp = 0  # the latest; its seconds are what survives a restart of recency
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
        if self._capacity_bytes > _CAPACITY_MAX:
            raise TierError(f"SSD capacity must be at most {_CAPACITY_MAX >> 40} TiB")
        self._directory = directory = await open_directory(
            self._path, self._capacity_bytes, self._recover, self._make_mover
        )
        self._verifier = ThreadPoolExecutor(_VERIFY_THREADS, thread_name_prefix="ssd-verify")
        found, directory.entries = directory.entries, []
        self._take_over(found)
        self._aside = {extent.at: extent for extent in directory.aside}
        await self._announce(found)
        self._gate.shut = False
        return RecoveryReport(
            self.name,
            chunks=len(found),
            bytes=sum(entry.chunk.length for entry in found),
            dropped=dict(directory.dropped),
            seconds=time.monotonic() - began,
        )

    async def _announce(self, found: Sequence[Entry]) -> None:
        """In slices: what is made of the notes takes a while. Nothing can change meanwhile."""
        for first in range(0, len(found), _ANNOUNCED_AT_ONCE):
            chunks = [entry.chunk for entry in found[first : first + _ANNOUNCED_AT_ONCE]]
            keys, notes = [chunk.key for chunk in chunks], [chunk.note for chunk in chunks]
            self._listener.appeared(self.name, keys, notes)
            await asyncio.sleep(0)

    async def close(self) -> None:
        if not self._gate.shut:
            await settled(self._close())

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        return self._index.find(keys)

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
            found = [r for key in dict.fromkeys(keys) if (r := self._index.record(key)) != NONE]
            self._drop(found, RemovalReason.REQUESTED)
            await settled(self._delete_dropped())

    def refusal(self, chunk: Chunk) -> str | None:
        if self._gate.shut:
            return None
        if self._write_budget.left <= 0:
            return "budget"
        if self._admission is None:
            return None
        full = not self._directory.slots.has_room(chunk.length)
        return None if self._index.admits(self._admission, chunk, full=full) else "admission"

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        here, absent = self._index.touch(keys)
        for record in here:
            self._index.set_tag(record, self._stamps(1))
            self._index.mark(record)
        return absent

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
        """Offsets of all extents, ascending. Cost: 8 bytes a chunk, sorted on a thread."""
        offsets = self._index.places()
        await asyncio.to_thread(offsets.sort)
        return offsets  # type: ignore[return-value]  # an array is a sequence of its numbers

    async def scrub(self, place: int) -> tuple[Chunk, LoadOutcome] | None:
        if self._gate.shut:
            return None
        record = self._resident_at(place)
        if record == NONE:
            return None
        chunk = self._index.chunk(record)
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
        records = self._index.records(self._index.all_keys()).tolist()
        resident = {self._index.place(record): record for record in records}
        assert all(slots.owner(offset) == record for offset, record in resident.items())
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
        parents = [self._index.parent(item.chunk) for item in items]
        kept = [record for record in parents if record != NONE]  # and so all above them
        for record in kept:
            self._index.pin(record)
        for index, item in enumerate(items):
            assert len(item.data) == item.chunk.length, "a store item holds exactly its chunk"
            if item.chunk.key in self._index or item.chunk.key in placed:
                continue
            offset = self._reserve(item.chunk)
            if isinstance(offset, Full):
                outcomes[index] = offset
            else:
                placed[item.chunk.key] = (index, offset)
                self._pending[tenant_of(item.chunk.key)] += item.chunk.length
        try:
            written = await self._write(items, placed)
        finally:
            for record in kept:
                self._index.unpin(record)
        for key, (index, offset) in sorted(
            placed.items(), key=lambda each: items[each[1][0]].chunk.position
        ):
            stamp = written[key]
            self._pending[tenant_of(key)] -= items[index].chunk.length
            if isinstance(stamp, Failed):
                outcomes[index] = stamp
                self._directory.slots.free(offset)
                self._errors["store"] += 1
                continue
            chunk = items[index].chunk
            self._directory.slots.set_owner(offset, self._index.add(chunk, offset, stamp))
            self._stored_bytes += chunk.length
            outcomes[index] = Stored()
        return outcomes

    async def _write(
        self, items: Sequence[StoreItem], placed: dict[Key, tuple[int, int]]
    ) -> dict[Key, int | Failed]:
        """Victims out of the catalogue, data, sync, new entries with their stamps into it."""
        if not placed:
            return {}
        if (why_not := await self._delete_dropped()) is not None:
            return dict.fromkeys(placed, Failed(why_not))
        pieces = [Piece(items[index].data, offset) for index, offset in placed.values()]
        self._write_budget.spend(sum(padded(len(piece.data)) for piece in pieces))
        moved = await self._directory.mover.write(pieces)
        synced = await self._directory.mover.sync()
        if isinstance(synced, NotMoved):
            return dict.fromkeys(placed, Failed(synced.reason))
        failed = {
            key: Failed(move.reason)
            for key, move in zip(placed, moved, strict=True)
            if not isinstance(move, Moved)
        }
        written = [
            Entry(items[index].chunk, offset, 0)
            for key, (index, offset) in placed.items()
            if key not in failed
        ]
        written.sort(key=lambda entry: -entry.chunk.position)
        first = self._stamps(len(written))
        put = [replace(entry, stamp=first + index) for index, entry in enumerate(written)]
        if (why_not := await self._commit(put)) is not None:
            self._undeleted.update(placed)  # in case the disk took it although it said no
            return dict.fromkeys(placed, Failed(why_not))
        return failed | {entry.chunk.key: entry.stamp for entry in put}

    def _reserve(self, chunk: Chunk) -> int | Full:
        """An extent, evicting for it if need be. Each round evicts something or gives up."""
        slots, index = self._directory.slots, self._index
        pending = self._pending[tenant_of(chunk.key)]
        while not within_quota(index, self._quotas, chunk, pending):
            victim = find_own_victim(index, chunk)
            if victim == NONE:
                return Full("its tenant has used up its quota of the SSD", "quota")
            self._drop([victim], RemovalReason.QUOTA)
        while (offset := slots.allocate(chunk.length)) is None and slots.fits(chunk.length):
            victims = find_victims(slots, index, chunk.length)
            if not victims:
                break
            self._drop(victims, RemovalReason.CAPACITY)
        if offset is None:
            return Full("no chunk on the SSD can be evicted for this one")
        return offset

    # -- load ----------------------------------------------------------------------------

    async def _load(self, items: Sequence[LoadItem], *, op: str = "load") -> list[LoadOutcome]:
        outcomes: list[LoadOutcome] = [Missing()] * len(items)
        held: list[tuple[int, LoadItem, int]] = []
        for index, item in enumerate(items):
            record = self._index.record(item.key)
            if record == NONE:
                continue
            assert len(item.into) >= self._index.length(record), "it is as long as the chunk"
            self._index.pin(record)
            held.append((index, item, record))
        try:
            pieces = [
                Piece(item.into[: self._index.length(record)], self._index.place(record))
                for _, item, record in held
            ]
            moved = await self._directory.mover.read(pieces)
            loop = asyncio.get_running_loop()
            digests = await loop.run_in_executor(self._verifier, _digests, pieces)
            for (index, _, record), move, digest in zip(held, moved, digests, strict=True):
                chunk = self._index.chunk(record)
                if isinstance(move, NotMoved):
                    self._errors[op] += 1
                    outcomes[index] = Failed(move.reason)
                elif digest != chunk.checksum:
                    self._quarantine(record)
                    outcomes[index] = Corrupt("the bytes do not match the checksum")
                else:
                    self._loaded_bytes += chunk.length if op == "load" else 0
                    outcomes[index] = Loaded(chunk)
        finally:
            for _, _, record in held:
                self._index.unpin(record)
        await self._delete_dropped()
        return outcomes

    # -- what leaves ---------------------------------------------------------------------

    def _drop(self, records: Sequence[int], reason: RemovalReason) -> None:
        """Out of the index now; out of the catalogue before any extent is written again."""
        if not records:
            return
        removed = [self._index.key(record) for record in records]
        self._index.remove_all(records)
        self._undeleted.update(removed)
        self._evictions[reason.value] += len(removed)
        self._listener.removed(self.name, removed, reason)

    def _quarantine(self, record: int) -> None:
        self._corrupt += 1
        if not self._index.is_resident(record):
            return  # another load saw it first
        chunk, offset = self._index.chunk(record), self._index.place(record)
        self._index.remove(record, keep_place=True)
        self._directory.slots.set_owner(offset, HELD)
        self._undeleted.add(chunk.key)
        self._evictions[RemovalReason.CORRUPT.value] += 1
        self._aside[offset] = SetAside(chunk.key, offset, chunk.length, self._clock())
        self._aside_unsaved = True
        if len(self._aside) > _QUARANTINE_MAX:
            self._free_aside(next(iter(self._aside.values())))
        self._listener.removed(self.name, [chunk.key], RemovalReason.CORRUPT)

    def _free_aside(self, extent: SetAside) -> None:
        """Let it be used again; the catalogue forgets it before it is written."""
        del self._aside[extent.at]
        self._aside_unsaved = True
        self._free(extent.at)

    def _resident_at(self, place: int) -> int:
        """The record of the chunk that lies there, NONE if none does."""
        try:
            record = self._directory.slots.owner(place)
        except ValueError:
            return NONE
        return record if record != HELD and self._index.is_resident(record) else NONE

    def _free(self, offset: int) -> None:
        self._directory.slots.free(offset)

    # -- catalogue -----------------------------------------------------------------------

    def _take_over(self, entries: Sequence[Entry]) -> None:
        """Index what the catalogue lists."""
        entries = sorted(entries, key=lambda entry: entry.stamp)
        self._index.restore(
            [(entry.chunk, entry.offset, entry.stamp) for entry in entries],
            [entry.stamp / _STAMPS_A_SECOND for entry in entries],
        )
        for record, entry in enumerate(entries):
            self._directory.slots.set_owner(entry.offset, record)
        self._stamp = entries[-1].stamp if entries else 0

    def _stamps(self, count: int) -> int:
        """The first of so many consecutive stamps, later than all before."""
        first = max(self._stamp + 1, int(self._clock()) * _STAMPS_A_SECOND)
        self._stamp = first + count - 1
        return first

    async def _delete_dropped(self) -> str | None:
        """Tell the catalogue what is gone; why it could not be told, if so."""
        if self._undeleted or self._aside_unsaved or self._index.marked > _UNRECORDED_MAX:
            return await self._commit()
        return None

    async def _commit(self, put: Sequence[Entry] = (), meta: Meta | None = None) -> str | None:
        """Write entries, and with them what waits: deletions all, stamps as many as are due.

        Why the catalogue did not take it, or None.
        """
        doomed = list(self._undeleted)
        marked = self._index.take_marked(_UNRECORDED_MAX if meta is None else len(self._index))
        stamps = {self._index.key(record): self._index.tag(record) for record in marked}
        aside = self.aside() if self._aside_unsaved else None
        self._aside_unsaved = False
        try:
            await self._directory.catalogue.commit(Changes(put, doomed, stamps, meta, aside))
        except CatalogueError as error:
            self._errors["catalogue"] += 1
            self._aside_unsaved |= aside is not None
            for key in stamps:
                if (record := self._index.record(key)) != NONE:
                    self._index.mark(record)
            return str(error)
        finally:
            if grown := self._directory.catalogue.grown:
                self._errors["catalogue_full"] = grown
        self._undeleted.difference_update(doomed)
        return None

    @contextlib.contextmanager
    def _engagement(self) -> Iterator[None]:
        self._engaged += 1
        try:
            yield
        finally:
            self._engaged -= 1

    async def _close(self) -> None:
        await self._gate.close()
        self._verifier.shutdown()
        try:
            await self._commit(meta=replace(self._directory.meta, clean=True))
        finally:
            await self._directory.close()


def _digests(pieces: Sequence[Piece]) -> list[int]:
    return [checksum(piece.data) for piece in pieces]
