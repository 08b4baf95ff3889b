"""Copies between a GPU's pages and slots, one way: what is queued when on which stream.

The batches of a transfer take turns on two streams. `measured_ways` chooses how pages of a size are
copied in each direction (`storage_tiers.device_batches.Way`), on the machine it runs on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from storage_tiers.device_batches import FEW_PAGES, Batch, Batches, Kernel, Lane, Part, Way
from storage_tiers.gpu import Gpu, GpuError
from storage_tiers.hbm import Blocks, CopyError, KvTensor, PageMap, address_of
from storage_tiers.pinned import PinnedMemory

STAGING_BYTES: Final = 8 << 20
"""Of each of two buffers each way, in the GPU: a batch. 160 us of a PCIe 5 bus."""
_STREAMS: Final = 2
_BATCHES_AHEAD: Final = 16  # of a transfer; CUDA's queues are bounded, and block where they end
_COPIES_AHEAD: Final = 4096  # in them; with ten times as many drivers have failed (vllm#49276)
_SURELY_COPIES: Final = 512 << 10  # from such pages on nothing is measured, which takes memory
_GOOD_ENOUGH: Final = 0.9  # of the fastest way's speed
_PIN_TIMEOUT_S: Final = 60.0


class _Queued(NamedTuple):
    """A batch under way."""

    mark: object  # its end
    kernels: list[Kernel]  # they read their pieces until then
    copies: int


class Direction:
    """GPU to host or host to GPU: its streams and buffers. Thread-safe."""

    def __init__(self, gpu: Gpu, *, to_host: bool, staging_bytes: int = STAGING_BYTES) -> None:
        """Raises GpuError, for example when the GPU has no memory left for the buffers."""
        self._gpu = gpu
        self._to_host = to_host
        self._staging_bytes = staging_bytes
        self._lanes = [Lane(gpu.stream(), gpu.allocate(staging_bytes)) for _ in range(_STREAMS)]
        self._turns = itertools.cycle(self._lanes)
        self._queueing = threading.Lock()
        self._lost = ""  # why nothing can be copied any more

    def copy(
        self, pages: PageMap, parts: Sequence[Part], after: object, memory: PinnedMemory | None
    ) -> None:
        """Copy, and return when it is done. CopyError: it failed, and has stopped.

        `after` is a mark or None; `memory` is what the slots lie in, None if it is not pinned.
        """
        if self._lost:
            raise CopyError(self._lost)
        batches = Batches(
            self._gpu, pages, memory, to_host=self._to_host, staging_bytes=self._staging_bytes
        )
        pending: deque[_Queued] = deque()
        try:
            # A batch is queued as a whole, so that its buffer is its own until its end.
            with self._queueing:
                waiting = list(self._lanes) if after is not None else []
                for batch in batches.cut(parts, lambda: next(self._turns)):
                    copies = sum(len(each.sizes) for each in batch.copies)
                    self._make_room(pending, copies)
                    if batch.lane in waiting:
                        self._gpu.wait(batch.lane.stream, after)
                        waiting.remove(batch.lane)
                    self._queue(batch)
                    mark = self._gpu.mark(batch.lane.stream)
                    pending.append(_Queued(mark, batch.kernels, copies))
            for last in list(pending)[-_STREAMS:]:  # one on each
                self._gpu.finish(last.mark)
        except BaseException as error:
            self._settle()
            if isinstance(error, GpuError):
                raise CopyError(str(error)) from error
            raise

    def close(self) -> None:
        """Give the buffers back; raises GpuError. A second call does nothing."""
        while self._lanes:
            self._gpu.free(self._lanes.pop().staging)

    def _make_room(self, pending: deque[_Queued], copies: int) -> None:
        """For a batch of so many copies; the first of all always fits."""
        while pending and (
            len(pending) == _BATCHES_AHEAD
            or sum(each.copies for each in pending) + copies > _COPIES_AHEAD
        ):
            self._gpu.finish(pending[0].mark)
            pending.popleft()

    def _queue(self, batch: Batch) -> None:
        stream = batch.lane.stream
        if self._to_host:
            self._run(batch)
        for copies in batch.copies:
            self._gpu.copy(stream, copies, to_host=self._to_host, pinned=batch.pinned)
        if not self._to_host:
            self._run(batch)

    def _run(self, batch: Batch) -> None:
        for kernel in batch.kernels:
            self._gpu.copy_pieces(batch.lane.stream, kernel.pieces, kernel.size)

    def _settle(self) -> None:
        """After a failure: nothing may be under way any more, for its memory is given away."""
        try:
            for lane in self._lanes:
                self._gpu.finish(self._gpu.mark(lane.stream))
        except GpuError as error:
            self._lost = f"the GPU is lost to copies since an earlier failure: {error}"


def measured_ways(
    gpu: Gpu,
    directions: Sequence[Direction],
    page_bytes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Way]:
    """The way for pages of this size in each direction: of those nearly as fast as the fastest, the
    one that costs the engine least. Takes some ten ms. Raises GpuError or CopyError.
    """
    if not gpu.has_kernel or page_bytes >= _SURELY_COPIES:
        return [Way.COPIES] * len(directions)
    count = max(FEW_PAGES, STAGING_BYTES // page_bytes)
    host = np.zeros(count * page_bytes, dtype=np.uint8)
    scratch = gpu.allocate(count * page_bytes)
    memory = PinnedMemory(gpu, host)
    memory.begin()
    try:
        memory.wait(_PIN_TIMEOUT_S)
        pages = PageMap([KvTensor(scratch, count, page_bytes, page_bytes)], [[0]])
        order = np.random.default_rng(0).permutation(count).astype(np.uint64)
        starts = np.uint64(address_of(host)) + np.arange(count, dtype=np.uint64) * page_bytes
        blocks = Blocks(0, np.tile(order, 4), np.tile(starts, 4))
        return [
            min(
                seconds,
                key=lambda way: (
                    seconds[way] * _GOOD_ENOUGH > min(seconds.values()),
                    list(Way).index(way),
                ),
            )
            for seconds in (
                {way: _seconds(each, pages, Part(blocks, way), memory, clock) for way in Way}
                for each in directions
            )
        ]
    finally:
        memory.close()
        memory.join(_PIN_TIMEOUT_S)
        gpu.free(scratch)


def _seconds(
    direction: Direction,
    pages: PageMap,
    part: Part,
    memory: PinnedMemory,
    clock: Callable[[], float],
) -> float:
    """Of the fastest of three; the first also warms up."""
    found: list[float] = []
    for _ in range(3):
        began = clock()
        direction.copy(pages, [part], None, memory)
        found.append(clock() - began)
    return min(found)
