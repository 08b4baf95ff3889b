"""The index over restarts of a router: written to a file now and then, read back if it is young.

A snapshot is what was true when it was written. It makes a router useful until the nodes have told
what is true now, which takes the place of it worker by worker; workers that do not come back are
dropped by the caller. Layout: magic, seconds since 1970 when it was written (f64), the index's own
format, which is checked before anything of it is used.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import structlog

from router.index import Index

_HEAD: Final = struct.Struct("<8sd")
_MAGIC: Final = b"KVBMRTR1"

Outcome = Literal["written", "not-written", "read", "absent", "old", "refused"]

_log = structlog.get_logger("router")


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    path: str
    written_total: int
    failed_total: int
    read: Outcome | None  # what became of the one found at the start
    bytes: int  # of the last one written


class Snapshots:
    """One thread calls it."""

    def __init__(
        self, path: Path, max_age_s: float, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._max_age_s = max_age_s
        self._wall = wall
        self._written_total = 0
        self._failed_total = 0
        self._bytes = 0
        self._read: Outcome | None = None

    @property
    def status(self) -> SnapshotStatus:
        return SnapshotStatus(
            str(self._path), self._written_total, self._failed_total, self._read, self._bytes
        )

    def pack(self, index: Index) -> bytes:
        """Costs a pass over the index; `write` is for another thread."""
        return _HEAD.pack(_MAGIC, self._wall()) + index.snapshot()

    def write(self, packed: bytes) -> Outcome:
        """In place of the one before, or not at all."""
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.draft")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(packed)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            self._failed_total += 1
            _log.warning("snapshot_not_written", path=str(self._path), why=str(error))
            with suppress(OSError):
                draft.unlink()
            return "not-written"
        self._written_total += 1
        self._bytes = len(packed)
        return "written"

    def read(self, index: Index) -> Outcome:
        """Into an index that nothing was put into yet; one that cannot be used changes nothing."""
        self._read = self._try_read(index)
        return self._read

    def _try_read(self, index: Index) -> Outcome:
        from router.index_snapshot import SnapshotError  # with the kernels that an index has

        try:
            packed = self._path.read_bytes()
        except FileNotFoundError:
            return "absent"
        except OSError as error:
            _log.warning("snapshot_not_read", path=str(self._path), why=str(error))
            return "refused"
        if len(packed) < _HEAD.size:
            return "refused"
        magic, written_at = _HEAD.unpack_from(packed)
        if magic != _MAGIC:
            _log.warning("snapshot_not_read", path=str(self._path), why="no snapshot of a router")
            return "refused"
        if not 0 <= self._wall() - written_at <= self._max_age_s:
            _log.info("snapshot_too_old", path=str(self._path), written_at=written_at)
            return "old"
        try:
            index.restore(packed[_HEAD.size :])
        except SnapshotError as error:
            _log.warning("snapshot_not_read", path=str(self._path), why=str(error))
            return "refused"
        _log.info("snapshot_read", path=str(self._path), blocks=len(index))
        return "read"
