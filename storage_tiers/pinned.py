"""The arena as a GPU reaches it: locked and mapped extent by extent, by a thread of its own.

Locking hundreds of GiB takes minutes, and nothing waits for it: what is not locked yet is copied
all the same, only slower. One copy must not touch two extents, which CUDA may refuse; `split` sees
to that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Final

import numpy as np

from storage_tiers.gpu import Copies, Gpu, GpuError, Sizes
from storage_tiers.hbm import Bytes, address_of
from storage_tiers.streaming import Addresses

logger = logging.getLogger("kvbm.gpu")

EXTENT_BYTES: Final = 1 << 30


class PinnedMemory:
    """Host memory being pinned from its start on. `close` undoes it when no copy uses it."""

    def __init__(self, gpu: Gpu, memory: Bytes, *, extent_bytes: int = EXTENT_BYTES) -> None:
        self._gpu = gpu
        self._memory = memory  # keeps it mapped
        self._start = address_of(memory)
        self._extent_bytes = extent_bytes
        self._pinned_bytes = 0  # from the start on
        self._changed = threading.Condition()
        self._users = 0
        self._closed = False
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="kvbm-pin", daemon=True)
        self._thread.start()

    def holds(self, address: int) -> bool:
        return self._start <= address < self._start + self._memory.nbytes

    @contextlib.contextmanager
    def used(self) -> Iterator[bool]:
        """Nothing is given back meanwhile. False if that has begun already."""
        with self._changed:
            usable = not self._closed
            self._users += usable
        try:
            yield usable
        finally:
            with self._changed:
                self._users -= usable
                self._changed.notify_all()

    def is_pinned(self, host: Addresses, sizes: Sizes | int) -> bool:
        """Whether kernels and copy engines can reach all of these places of this memory."""
        end = self._start + self._pinned_bytes
        return not len(host) or int((host + np.asarray(sizes, dtype=np.uint64)).max()) <= end

    def split(self, copies: Copies) -> Copies:
        """The same copies, more of them where one reaches over the end of an extent."""
        start, extent = np.uint64(self._start), np.uint64(self._extent_bytes)
        heads: list[Copies] = []
        while (over := (room := extent - (copies.host - start) % extent) < copies.sizes).any():
            sizes = np.minimum(copies.sizes, room)
            heads.append(copies._replace(sizes=sizes))
            left = Copies(copies.device + sizes, copies.host + sizes, copies.sizes - sizes)
            copies = Copies(*(each[over] for each in left))
        if not heads:
            return copies  # nearly always
        return Copies(*(np.concatenate(each) for each in zip(*heads, copies, strict=True)))

    def wait(self, timeout_s: float) -> None:
        """Until all is pinned that can be, or TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(self._is_settled, timeout_s):
                raise TimeoutError(f"host memory was not locked within {timeout_s:.0f} s")

    def close(self) -> None:
        """Give back what is pinned, in the background, when the last copy has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """After `close`: until it is given back, or the time is over."""
        self._thread.join(timeout_s)

    def _is_settled(self) -> bool:
        return self._pinned_bytes >= self._memory.nbytes or bool(self._trouble) or self._closed

    def _run(self) -> None:
        extents = list(range(0, self._memory.nbytes, self._extent_bytes))
        pinned: list[int] = []
        try:
            for at in extents:
                if self._closed:
                    break
                size = min(self._extent_bytes, self._memory.nbytes - at)
                self._gpu.pin(self._start + at, size)
                pinned.append(self._start + at)
                with self._changed:
                    self._pinned_bytes = at + size
                    self._changed.notify_all()
        except GpuError as error:
            logger.warning(
                "%d of %d bytes of host memory are locked for the GPU, and no more can be (%s): "
                "the rest is copied the slow way",
                self._pinned_bytes,
                self._memory.nbytes,
                error,
            )
            with self._changed:
                self._trouble = str(error)
                self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: self._closed and not self._users)
        try:
            for address in pinned:
                self._gpu.unpin(address)
        except GpuError as error:
            logger.warning("host memory stays locked until this process ends: %s", error)
