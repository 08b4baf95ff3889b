"""What this machine could do at best: memory copied, and a bare O_DIRECT loop on one file."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

IN_FLIGHT: Final = 8


class BareFile:
    """A preallocated file, O_DIRECT, `IN_FLIGHT` threads; nothing is checked or recorded."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Raises OSError, also where the filesystem does not take O_DIRECT."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, size_bytes)
        self._pool = ThreadPoolExecutor(IN_FLIGHT)

    def write(self, buffers: Sequence[memoryview], size: int) -> float:
        """Seconds for every buffer of `size` bytes, one after the other in the file, durably."""
        began = time.perf_counter()
        self._each(lambda i: os.pwrite(self._fd, buffers[i], i * size), len(buffers))
        os.fdatasync(self._fd)
        return time.perf_counter() - began

    def read(self, buffers: Sequence[memoryview], size: int) -> float:
        began = time.perf_counter()
        self._each(lambda i: os.preadv(self._fd, [buffers[i]], i * size), len(buffers))
        return time.perf_counter() - began

    def _each(self, move: Callable[[int], int], count: int) -> None:
        list(self._pool.map(move, range(count)))

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._fd)


def aligned(count: int, size: int) -> list[memoryview]:
    """Buffers of random bytes in one page-aligned mapping, as in the arena."""
    mapping = memoryview(mmap.mmap(-1, count * size))
    np.frombuffer(mapping, dtype=np.uint8)[:] = np.random.default_rng(0).integers(
        0, 255, count * size, dtype=np.uint8
    )
    return [mapping[i * size : (i + 1) * size] for i in range(count)]


def copy(sources: Sequence[memoryview], targets: Sequence[memoryview]) -> None:
    """memcpy, buffer by buffer."""
    for source, target in zip(sources, targets, strict=True):
        target[:] = source
