"""Moving bytes between memory and one preallocated file: the seam, and its plain implementation.

`FileMover` is what the SSD tier needs of a device: many pieces in flight, one outcome a piece.
`PlainFileMover` does it with positioned reads and writes on a few threads; `storage_tiers.nixl`
with NIXL. The file is opened with O_DIRECT where the filesystem allows it. That wants memory,
offset and length aligned to a page: what is aligned moves without a copy, the rest through a
page-aligned bounce buffer.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from storage_tiers.base import TierError

PAGE: Final = 4096
_BOUNCE_BYTES: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Piece:
    """Contiguous memory and where it lies in the file. `offset` is a multiple of 4096.

    A write pads the last page with zeros; a read leaves memory behind `data` alone.
    """

    data: memoryview
    offset: int


@dataclass(frozen=True, slots=True)
class Moved:
    """All bytes of the piece were transferred."""


@dataclass(frozen=True, slots=True)
class NotMoved:
    """The piece failed or came short; the target's bytes are undefined."""

    reason: str


MoveOutcome = Moved | NotMoved


class FileMover(Protocol):
    """Moves pieces of one file. The caller awaits to the end: buffers are in use until then."""

    @property
    def name(self) -> str: ...

    async def write(self, pieces: Sequence[Piece]) -> list[MoveOutcome]:
        """Write every piece. Durable only after `sync`."""
        ...

    async def read(self, pieces: Sequence[Piece]) -> list[MoveOutcome]: ...

    async def sync(self) -> MoveOutcome:
        """Make what was written durable."""
        ...

    async def close(self) -> None:
        """Finish what runs and give up threads; the file stays open."""
        ...


class BlockFile:
    """An open, preallocated file; `direct` says whether O_DIRECT was accepted."""

    def __init__(self, fd: int, path: Path, size_bytes: int, *, direct: bool) -> None:
        self.fd = fd
        self.path = path
        self.size_bytes = size_bytes
        self.direct = direct

    @classmethod
    def open(cls, path: Path, size_bytes: int) -> BlockFile:
        """Open and grow to at least `size_bytes`, reserved on disk. Raises TierError."""
        assert size_bytes > 0 and size_bytes % PAGE == 0, "the file is whole pages"
        fd, direct = _open_direct(path)
        try:
            before = os.fstat(fd)
            free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
            if size_bytes - before.st_blocks * 512 > free:  # else the attempt would fill the disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            os.close(fd)
            raise TierError(
                f"cannot reserve {size_bytes} bytes in {path}: {error.strerror}; lower the "
                "capacity or make room"
            ) from error
        return cls(fd, path, max(before.st_size, size_bytes), direct=direct)

    def shrink(self, size_bytes: int) -> None:
        """Give back what lies behind `size_bytes`."""
        if self.size_bytes > size_bytes:
            os.ftruncate(self.fd, size_bytes)
            self.size_bytes = size_bytes

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def padded(length: int) -> int:
    """Length rounded up to whole pages."""
    return -(-length // PAGE) * PAGE


def address_of(data: memoryview) -> int:
    """The memory address a view begins at, read-only views included."""
    return int(np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0])


def split(piece: Piece, *, direct: bool) -> tuple[Piece | None, Piece | None]:
    """The part of a piece that can move as it is, and the rest, which has to be bounced."""
    if not direct:
        return piece, None
    if len(piece.data) < PAGE or address_of(piece.data) % PAGE:
        return None, piece
    body = len(piece.data) // PAGE * PAGE
    tail = Piece(piece.data[body:], piece.offset + body) if body < len(piece.data) else None
    return Piece(piece.data[:body], piece.offset), tail


class PlainFileMover:
    """Positioned reads and writes on `threads` threads."""

    def __init__(self, file: BlockFile, *, threads: int = 8) -> None:
        self._file = file
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="file-mover")
        self._bounces = threading.local()

    @property
    def name(self) -> str:
        return "preadv" if self._file.direct else "preadv-buffered"

    async def write(self, pieces: Sequence[Piece]) -> list[MoveOutcome]:
        return await self._each(self._write_one, pieces)

    async def read(self, pieces: Sequence[Piece]) -> list[MoveOutcome]:
        return await self._each(self._read_one, pieces)

    async def sync(self) -> MoveOutcome:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._pool, os.fdatasync, self._file.fd)
        except OSError as error:
            return NotMoved(f"fdatasync of {self._file.path}: {error.strerror}")
        return Moved()

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown)

    async def _each(
        self, move: Callable[[Piece], None], pieces: Sequence[Piece]
    ) -> list[MoveOutcome]:
        waiting = deque(enumerate(pieces))
        outcomes: list[MoveOutcome] = [NotMoved("not tried")] * len(pieces)

        def work() -> None:
            while True:
                try:
                    index, piece = waiting.popleft()
                except IndexError:
                    return
                try:
                    move(piece)
                    outcomes[index] = Moved()
                except OSError as error:
                    outcomes[index] = NotMoved(f"{error.strerror or error} at {piece.offset}")

        loop = asyncio.get_running_loop()
        workers = min(self._threads, len(pieces))
        await asyncio.gather(*(loop.run_in_executor(self._pool, work) for _ in range(workers)))
        return outcomes

    def _write_one(self, piece: Piece) -> None:
        whole, rest = split(piece, direct=self._file.direct)
        if whole is not None:
            self._complete(os.pwritev(self._file.fd, [whole.data], whole.offset), len(whole.data))
        for data, offset in _windows(rest):
            size = padded(len(data))
            bounce = self._bounce()
            bounce[: len(data)] = data
            bounce[len(data) : size] = bytes(size - len(data))
            self._complete(os.pwritev(self._file.fd, [bounce[:size]], offset), size)

    def _read_one(self, piece: Piece) -> None:
        whole, rest = split(piece, direct=self._file.direct)
        if whole is not None:
            self._complete(os.preadv(self._file.fd, [whole.data], whole.offset), len(whole.data))
        for data, offset in _windows(rest):
            size = padded(len(data))
            bounce = self._bounce()
            self._complete(os.preadv(self._file.fd, [bounce[:size]], offset), size)
            data[:] = bounce[: len(data)]

    def _bounce(self) -> memoryview:
        """This thread's page-aligned buffer."""
        buffer: memoryview | None = getattr(self._bounces, "buffer", None)
        if buffer is None:
            buffer = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
            self._bounces.buffer = buffer
        return buffer

    @staticmethod
    def _complete(moved: int, wanted: int) -> None:
        if moved != wanted:
            raise OSError(f"only {moved} of {wanted} bytes were moved")


def make_mover(file: BlockFile, kind: str) -> FileMover:
    """`nixl`, `plain`, or `auto`: NIXL if it loads. Blocks for seconds the first time."""
    if kind not in {"auto", "nixl", "plain"}:
        raise TierError(f"unknown mover {kind!r}: use auto, nixl or plain")
    if kind == "plain":
        return PlainFileMover(file)
    from storage_tiers.nixl import NixlFileMover, NixlUnavailableError

    try:
        return NixlFileMover(file)
    except NixlUnavailableError as error:
        if kind == "nixl":
            raise TierError(f"mover nixl was asked for but {error}; use auto or plain") from error
        return PlainFileMover(file)


def _open_direct(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError:
        pass  # e.g. tmpfs and some network filesystems: the plain open below tells real trouble
    try:
        return os.open(path, flags, 0o600), False
    except OSError as error:
        raise TierError(f"cannot open {path}: {error.strerror}") from error


def _windows(piece: Piece | None) -> list[tuple[memoryview, int]]:
    """A piece in parts that fit the bounce buffer, with their offsets in the file."""
    if piece is None:
        return []
    return [
        (piece.data[at : at + _BOUNCE_BYTES], piece.offset + at)
        for at in range(0, len(piece.data), _BOUNCE_BYTES)
    ]
