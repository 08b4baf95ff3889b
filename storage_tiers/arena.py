"""The host-memory arena: one memfd that the daemon and every engine on the node map.

Layout of the memfd: a header page, a table of slot generations (8 bytes per 4 KiB of data), and
the data. The daemon hands out slots; engines copy between their KV tensors and slots directly.

A slot's generation changes each time the slot changes hands. An engine that copies out of a slot
reads the generation before and after the copy and takes the bytes only if both are the one it was
told: a claim that was taken back meanwhile then costs a recompute, never wrong KV.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

PAGE: Final = 4096
HUGE_PAGE: Final = 2 << 20
_MAGIC: Final = b"kvbm-arena-1\0\0\0\0"
_HEADER = np.dtype([("magic", "S16"), ("epoch", "S16"), ("data_at", "<u8"), ("data_bytes", "<u8")])


class ArenaError(Exception):
    """The arena cannot be created or mapped; the message says why and what to do."""


class Slot(NamedTuple):
    """A place in the arena: who holds this value with this generation holds the bytes."""

    offset: int
    length: int
    generation: int


class Arena:
    """A mapping of the arena. `create` and `adopt` are the daemon's, `attach` an engine's."""

    def __init__(self, fd: int, mapping: mmap.mmap, *, owner: bool) -> None:
        self.fd = fd
        self._mapping = mapping
        self._owner = owner
        header = np.frombuffer(mapping, dtype=_HEADER, count=1)[0]
        self.epoch: bytes = bytes(header["epoch"]).ljust(16, b"\0")
        self.capacity_bytes = int(header["data_bytes"])
        data_at = int(header["data_at"])
        self.data: memoryview = memoryview(mapping)[data_at : data_at + self.capacity_bytes]
        count = -(-self.capacity_bytes // PAGE)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self.data, dtype=np.uint8)
        self._generations: npt.NDArray[np.uint64] = np.frombuffer(
            mapping, dtype=np.uint64, count=count, offset=PAGE
        )

    @classmethod
    def create(cls, capacity_bytes: int, *, huge_pages: bool = False) -> Arena:
        """A new arena with a random epoch. Memory is taken as it is first used."""
        capacity_bytes = capacity_bytes // PAGE * PAGE
        if capacity_bytes <= 0:
            raise ArenaError("host memory capacity must be at least 4 KiB: raise `dram.capacity`")
        table = -(-(capacity_bytes // PAGE * 8) // HUGE_PAGE) * HUGE_PAGE
        data_at = -(-(PAGE + table) // HUGE_PAGE) * HUGE_PAGE  # so that huge pages line up
        total = -(-(data_at + capacity_bytes) // HUGE_PAGE) * HUGE_PAGE
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if huge_pages else 0)
        try:
            fd = os.memfd_create("kvbm-arena", flags)
        except OSError as error:
            raise ArenaError(f"memfd_create failed: {error}") from error
        try:
            os.ftruncate(fd, total)
            mapping = mmap.mmap(fd, total)
        except OSError as error:
            os.close(fd)
            hint = "reserve huge pages (vm.nr_hugepages)" if huge_pages else "lower `dram.capacity`"
            raise ArenaError(f"cannot map {total} bytes of host memory: {error}; {hint}") from error
        if not huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        header = np.frombuffer(mapping, dtype=_HEADER, count=1)
        header[0] = (_MAGIC, _random_epoch(), data_at, capacity_bytes)
        return cls(fd, mapping, owner=True)

    @classmethod
    def attach(cls, fd: int) -> Arena:
        """Map an arena received by file descriptor, and close the descriptor.

        The memory is unmapped when the last reference to the arena and its views goes.
        """
        try:
            mapping = _mapped(fd)
        finally:
            os.close(fd)
        return cls(-1, mapping, owner=False)

    @classmethod
    def adopt(cls, fd: int, epoch: bytes, *, huge_pages: bool = False) -> Arena:
        """Become the owner of the arena that the daemon before left, if it still has this epoch.

        It gets a new one: whatever names the old epoch, a job of an engine or a description of
        the contents, means nothing from here on. Takes the descriptor; raises ArenaError.
        """
        try:
            mapping = _mapped(fd)
            arena = cls(fd, mapping, owner=True)
            if arena.epoch != epoch:
                raise ArenaError("it has been used since it was described")
        except (ArenaError, OSError) as error:
            os.close(fd)
            raise ArenaError(str(error)) from error
        if not huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        arena.epoch = _random_epoch()
        np.frombuffer(mapping, dtype=_HEADER, count=1)["epoch"] = arena.epoch
        return arena

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes of a slot, writable. Raises ValueError outside the arena."""
        if offset < 0 or length < 0 or offset + length > self.capacity_bytes:
            raise ValueError(f"slot [{offset}, +{length}) is outside the arena")
        return self.data[offset : offset + length]

    def array(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """The same bytes as `view`, as an array of the arena's own memory."""
        if offset < 0 or length < 0 or offset + length > self.capacity_bytes:
            raise ValueError(f"slot [{offset}, +{length}) is outside the arena")
        return self._bytes[offset : offset + length]

    def generation(self, offset: int) -> int:
        """The current generation of the slot at `offset`."""
        return int(self._generations[offset // PAGE])

    def generations(self, offsets: Sequence[int]) -> npt.NDArray[np.uint64]:
        """The current generation of each of these slots. Raises IndexError outside the arena."""
        pages = np.asarray(offsets, dtype=np.int64) // PAGE
        return self._generations[pages]

    def advance(self, offset: int) -> int:
        """Give the slot a new generation and return it; the daemon's alone."""
        assert self._owner, "only the daemon changes generations"
        self._generations[offset // PAGE] += np.uint64(1)
        return int(self._generations[offset // PAGE])

    def close(self) -> None:
        """Unmap if nothing refers to the memory any more; else the mapping lives until then."""
        del self._generations, self._bytes
        with contextlib.suppress(BufferError):  # as below
            self.data.release()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        try:
            self._mapping.close()
        except BufferError:  # a view is still in use, e.g. registered with a mover
            return


def _mapped(fd: int) -> mmap.mmap:
    """The memory behind a descriptor, if it is an arena. Raises ArenaError."""
    size = os.fstat(fd).st_size
    if size < PAGE:
        raise ArenaError(f"the descriptor of {size} bytes is no arena")
    mapping = mmap.mmap(fd, size)
    header = np.frombuffer(mapping, dtype=_HEADER, count=1)[0]
    end = int(header["data_at"]) + int(header["data_bytes"])
    if bytes(header["magic"]) != _MAGIC.rstrip(b"\0") or end > size:
        raise ArenaError("the descriptor is no arena of this version: upgrade both sides")
    return mapping


def _random_epoch() -> bytes:
    """16 bytes without zeros, because NumPy strips trailing zeros from byte strings."""
    return bytes(byte or 1 for byte in secrets.token_bytes(16))
