"""The arena as a GPU reaches it: locked and mapped extent by extent, by a thread of its own.

Locking hundreds of GiB takes minutes, and nothing waits for it: what is not locked yet is copied
all the same, only slower. Locking holds locks of the driver that the engine's launches need too,
so extents are small. They end at multiples of their size, and so never within a page. One copy must
not touch two extents, which CUDA refuses; `split` sees to that.
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
from storage_tiers.prefault import populate
from storage_tiers.streaming import Addresses

logger = logging.getLogger("kvbm.gpu")

EXTENT_BYTES: Final = 256 << 20
"""Some 25 ms (0.1 s a GB: https://github.com/vllm-project/vllm/issues/51081)."""


class PinnedMemory:
    """Host memory being pinned from its start on, once `begin` is called. `close` undoes it when no
    copy uses it.
    """

    def __init__(self, gpu: Gpu, memory: Bytes, *, extent_bytes: int = EXTENT_BYTES) -> None:
        self._gpu = gpu
        self._memory = memory  # keeps it mapped
        self._start = address_of(memory)
        self._extent_bytes = extent_bytes
        self._pinned_bytes = 0  # from the start on
        self._changed = threading.Condition()
        self._users = 0
        self._begun = False
        self._closed = False
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="kvbm-pin", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        with self._changed:
            self._begun = True
            self._changed.notify_all()

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
        extent = np.uint64(self._extent_bytes)
        heads: list[Copies] = []
        while (over := (room := extent - copies.host % extent) < copies.sizes).any():
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
        with self._changed:
            self._changed.wait_for(lambda: self._begun or self._closed)
        at, end = self._start, self._start + self._memory.nbytes
        pinned: list[int] = []
        try:
            while at < end and not self._closed:
                size = min(self._extent_bytes - at % self._extent_bytes, end - at)
                # Else CUDA makes the pages, all the time holding what launches need.
                with contextlib.suppress(OSError):
                    populate(at, size, lambda: self._closed)
                self._gpu.pin(at, size)
                pinned.append(at)
                at += size
                with self._changed:
                    self._pinned_bytes = at - self._start
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
