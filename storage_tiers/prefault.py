"""Taking an arena's memory from the system before it is needed.

A page of a new arena is made and cleared by whoever touches it first: about half a millisecond a
MiB, and for a chunk from the SSD that is the one thread that submits I/O, so that the disk waits
too. After a start every chunk is such a first one. So a thread of the lowest priority goes through
the arena and has the kernel make its pages, in slices short enough that nobody waits for one.
Contents stay as they are; pages that are there cost next to nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import numpy as np
import structlog

_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14
_SLICE_BYTES: Final = 256 << 10
_LOWEST_PRIORITY: Final = 19
_SPARE: Final = 0.05  # of the system's available memory is left alone

_log = structlog.get_logger("kvbm.prefault")


class Prefault:
    """One pass over `memory`. A context manager, or `start` and `close`, which ends it early.

    `close` must come before the memory goes.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefault", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin, unless the system has not got that much memory to spare."""
        available = available_bytes()
        if available is not None and len(self._memory) > available * (1 - _SPARE):
            _log.warning("not_prefaulted", bytes=len(self._memory), available_bytes=available)
            return
        self._thread.start()

    def close(self) -> None:
        """Return once no page is touched any more."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        start = int(np.frombuffer(self._memory, dtype=np.uint8).__array_interface__["data"][0])
        try:
            populate(start, len(self._memory), self._stopping.is_set)
        except OSError as error:
            _log.warning("prefault_ended", reason=str(error))
            return
        if self._stopping.is_set():
            return
        _log.info("prefaulted", bytes=len(self._memory))


def populate(address: int, size: int, is_ended: Callable[[], bool]) -> None:
    """Have the kernel make these pages, unless `is_ended` says so meanwhile; other threads run.

    Raises OSError where the kernel does not.
    """
    # Through ctypes, which releases the GIL; mmap's own madvise does not.
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for at in range(0, size, _SLICE_BYTES):
        if is_ended():
            return
        if madvise(address + at, min(_SLICE_BYTES, size - at), _POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, f"{os.strerror(code)} after {at} bytes")


def available_bytes() -> int | None:
    """What the kernel thinks programs can still have without swapping; None if it does not say."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
