"""The SSD tier's catalogue: which chunk lies where, in LMDB. The one file that imports it.

Every `commit` is part of one synced transaction, so what it recorded is there after a crash, all of
it or nothing. All of LMDB runs on one thread; the event loop only awaits. Three tables: `chunks`,
`meta`, and `aside`, the extents that are out of use. Format 1 has had `aside` from its second
release on: a directory without it opens, and a program that does not know it only uses those
extents again. An entry in `chunks` may be followed by the chunk's note: those without one are what
they were, and a program that does not know notes drops those with one as unreadable.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import lmdb

from storage_tiers.base import KEY_BYTES, Chunk, Key, SetAside, TierError

FORMAT_VERSION: Final = 1
_ENTRY: Final = struct.Struct("<QQQQI?16s")  # offset, length, checksum, stamp, position, parent?
_STAMP: Final = slice(24, 32)  # of an entry
_META: Final = struct.Struct("<IQI?")  # format version, capacity, granule, clean
_META_KEY: Final = b"meta"
_OFFSET: Final = struct.Struct("<Q")
_ASIDE: Final = struct.Struct("<16sQd")  # key, length, since

_log = logging.getLogger("kvbm.catalogue")

T = TypeVar("T")


class CatalogueError(Exception):
    """LMDB refused; nothing of the commit is recorded."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What the directory was made for; `clean` is true only between a close and the next open."""

    version: int
    capacity_bytes: int
    granule_bytes: int  # of the allocator that placed the extents
    clean: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A chunk's place in the extents file and its recency."""

    chunk: Chunk
    offset: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Changes:
    """One transaction: deletes first, then puts, then stamps of entries that exist."""

    put: Sequence[Entry] = ()
    delete: Sequence[Key] = ()
    stamps: Mapping[Key, int] = field(default_factory=dict)
    meta: Meta | None = None
    aside: Sequence[SetAside] | None = None  # all extents out of use, if that changed


@dataclass(slots=True)
class _Commit:
    """Changes on their way, and what became of them."""

    changes: Changes
    error: Exception | None = None


class Catalogue:
    """An LMDB environment. One process at a time opens a directory."""

    def __init__(self, path: Path, map_bytes: int, map_bytes_max: int) -> None:
        """`map_bytes` of address space, doubled up to `map_bytes_max` when entries fill it."""
        self._path = path
        self._map_bytes = map_bytes
        self._map_bytes_max = max(map_bytes, map_bytes_max)
        self.grown = 0  # times the map was full
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="catalogue")
        self._env: lmdb.Environment | None = None
        self._waiting: deque[_Commit] = deque()

    async def open(self) -> Meta | None:
        """Open or create; None if it is new. Raises TierError if LMDB cannot use it."""

        def start() -> Meta | None:
            self._path.mkdir(parents=True, exist_ok=True)
            self._env = env = lmdb.open(
                str(self._path), map_size=self._map_bytes, max_dbs=3, max_readers=4, mode=0o600
            )
            self._chunks = self._growing(lambda: env.open_db(b"chunks"))
            self._meta = self._growing(lambda: env.open_db(b"meta"))
            self._aside = self._growing(lambda: env.open_db(b"aside"))
            with env.begin(self._meta) as reader:
                packed = reader.get(_META_KEY)
            return Meta(*_META.unpack(packed)) if packed is not None else None

        try:
            return await self._run(start)
        except (lmdb.Error, struct.error, OSError) as error:
            raise TierError(
                f"cannot open the catalogue {self._path}: {error}; move it away or start with "
                "recover=none, which empties the tier"
            ) from error

    async def entries(self) -> tuple[list[Entry], list[bytes]]:
        """Everything recorded, and the keys of records that cannot be read."""

        def read() -> tuple[list[Entry], list[bytes]]:
            found: list[Entry] = []
            unreadable: list[bytes] = []
            with self._opened().begin(self._chunks) as reader:
                for key, packed in reader.cursor():
                    if len(key) == KEY_BYTES and len(packed) >= _ENTRY.size:
                        found.append(_unpack(Key(key), packed))
                    else:
                        unreadable.append(key)
            return found, unreadable

        return await self._run(read)

    async def aside(self) -> list[SetAside]:
        """The extents out of use, the oldest first; what cannot be read is left out."""

        def read() -> list[SetAside]:
            with self._opened().begin(self._aside) as reader:
                found = [
                    _unpack_aside(at, packed)
                    for at, packed in reader.cursor()
                    if len(at) == _OFFSET.size and len(packed) == _ASIDE.size
                ]
            return sorted(found, key=lambda extent: extent.since)

        return await self._run(read)

    async def commit(self, changes: Changes) -> None:
        """Apply durably, or raise CatalogueError.

        What waits while a transaction is written goes into the next one together, because syncing
        costs far more than recording; it then fails together as well.
        """
        waiting = _Commit(changes)
        self._waiting.append(waiting)
        await self._run(self._commit_waiting)
        if waiting.error is not None:
            raise CatalogueError(f"catalogue: {waiting.error}") from waiting.error

    def _commit_waiting(self) -> None:
        """On the catalogue's thread, once a commit: those that came too late find it done."""
        together: list[_Commit] = []
        while self._waiting:
            together.append(self._waiting.popleft())
        if not together:
            return

        def write() -> None:
            with self._opened().begin(self._chunks, write=True) as writer:
                for commit in together:
                    self._record(writer, commit.changes)

        try:
            self._growing(write)
        except (lmdb.Error, OSError) as error:
            for commit in together:
                commit.error = error

    def _record(self, writer: lmdb.Transaction, changes: Changes) -> None:
        for key in changes.delete:
            writer.delete(key)
        for entry in changes.put:
            writer.put(entry.chunk.key, _pack(entry))
        for key, stamp in changes.stamps.items():
            packed = writer.get(key)
            if packed is not None:
                writer.put(key, _restamp(bytes(packed), stamp))
        if (meta := changes.meta) is not None:
            packed = _META.pack(meta.version, meta.capacity_bytes, meta.granule_bytes, meta.clean)
            writer.put(_META_KEY, packed, db=self._meta)
        if changes.aside is not None:
            writer.drop(self._aside, delete=False)
            for extent in changes.aside:
                packed = _ASIDE.pack(extent.key, extent.length, extent.since)
                writer.put(_OFFSET.pack(extent.at), packed, db=self._aside)

    def _growing(self, work: Callable[[], T]) -> T:
        """Do a transaction's work, again with a larger map if it was full.

        Even a delete needs pages of the map, so that a full one would never empty again.
        """
        while True:
            try:
                return work()
            except lmdb.MapFullError:
                if self._map_bytes >= self._map_bytes_max:
                    raise
                self._map_bytes = min(2 * self._map_bytes, self._map_bytes_max)
                self._opened().set_mapsize(self._map_bytes)
                self.grown += 1
                _log.warning("catalogue_map_was_full")

    async def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            await self._run(env.close)
        self._pool.shutdown()

    def _opened(self) -> lmdb.Environment:
        assert self._env is not None, "the catalogue is used between open and close"
        return self._env

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _pack(entry: Entry) -> bytes:
    chunk = entry.chunk
    fields = _ENTRY.pack(
        entry.offset,
        chunk.length,
        chunk.checksum,
        entry.stamp,
        chunk.position,
        chunk.parent is not None,
        chunk.parent or b"",
    )
    return fields + chunk.note


def _unpack(key: Key, packed: bytes) -> Entry:
    offset, length, digest, stamp, position, has_parent, parent = _ENTRY.unpack_from(packed)
    note = packed[_ENTRY.size :]
    chunk = Chunk(key, length, digest, Key(parent) if has_parent else None, position, note)
    return Entry(chunk, offset, stamp)


def _unpack_aside(at: bytes, packed: bytes) -> SetAside:
    key, length, since = _ASIDE.unpack(packed)
    return SetAside(Key(key), _OFFSET.unpack(at)[0], length, since)


def _restamp(packed: bytes, stamp: int) -> bytes:
    return packed[: _STAMP.start] + stamp.to_bytes(8, "little") + packed[_STAMP.stop :]
