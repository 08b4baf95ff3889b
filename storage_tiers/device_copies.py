"""Copies between a GPU's pages and slots, one way: what is queued on which stream.

A transfer is cut into batches of a few MiB, which take turns on two streams. Within a batch there
are three ways, because neither the copy engines nor kernels are best for every size of page:

- copies: a copy for each page, on the copy engines. Right for large pages; below some tens of KiB
  what each copy costs by itself decides.
- staged: a kernel gathers the pages into a buffer in the GPU (or scatters them from it) at the
  GPU's own speed, and the copy engines move the buffer in large pieces. While one stream's buffer
  moves, the other's kernel runs. Takes few multiprocessors for a small part of the time.
- direct: a kernel reads or writes the slot itself, over the bus. Occupies multiprocessors for as
  long as the bus takes.

`measured_ways` chooses by page size and direction, on the machine it runs on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, NamedTuple

import numpy as np

from storage_tiers.gpu import Copies, Descriptors, Gpu, GpuError
from storage_tiers.hbm import Blocks, CopyError, KvTensor, PageMap, address_of
from storage_tiers.pinned import PinnedMemory
from storage_tiers.streaming import Addresses

STAGING_BYTES: Final = 8 << 20
"""Of each of two buffers each way, in the GPU: a batch. 160 us of a PCIe 5 bus."""
_STREAMS: Final = 2
_BATCHES_AHEAD: Final = 16  # of a transfer; CUDA's queues are bounded, and block where they end
_FEW_PAGES: Final = 16  # fewer are not worth a kernel before or after the copy
_GOOD_ENOUGH: Final = 0.9  # of the fastest way's speed
_PIN_TIMEOUT_S: Final = 60.0


class Way(Enum):
    """How pages of a size are copied; in the order of what it costs the engine."""

    COPIES = "copies"
    STAGED = "staged"
    DIRECT = "direct"


class Part(NamedTuple):
    """A group's blocks of a transfer, and the way they are to go."""

    blocks: Blocks
    way: Way


class _Lane(NamedTuple):
    stream: int
    staging: int  # address


class _Queued(NamedTuple):
    """A batch under way."""

    mark: object  # its end
    read: list[Descriptors]  # by its kernels, so they must outlive it


class Direction:
    """GPU to host or host to GPU: its streams and buffers. Thread-safe."""

    def __init__(self, gpu: Gpu, *, to_host: bool, staging_bytes: int = STAGING_BYTES) -> None:
        """Raises GpuError, for example when the GPU has no memory left for the buffers."""
        self._gpu = gpu
        self._to_host = to_host
        self._staging_bytes = staging_bytes
        self._lanes = [_Lane(gpu.stream(), gpu.allocate(staging_bytes)) for _ in range(_STREAMS)]
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
        pending: deque[_Queued] = deque()
        try:
            # A batch is queued as a whole, so that its buffer is its own until its end.
            with self._queueing:
                waiting = list(self._lanes) if after is not None else []
                for blocks, way in self._batches(pages, parts):
                    if len(pending) == _BATCHES_AHEAD:
                        self._finish_first(pending)
                    lane = next(self._turns)
                    if lane in waiting:
                        self._gpu.wait(lane.stream, after)
                        waiting.remove(lane)
                    read = self._queue(lane, pages, blocks, way, memory)
                    pending.append(_Queued(self._gpu.mark(lane.stream), read))
            while pending:
                self._finish_first(pending)
        except BaseException as error:
            self._settle()
            if isinstance(error, GpuError):
                raise CopyError(str(error)) from error
            raise

    def close(self) -> None:
        """Give the buffers back; raises GpuError. A second call does nothing."""
        while self._lanes:
            self._gpu.free(self._lanes.pop().staging)

    def _finish_first(self, pending: deque[_Queued]) -> None:
        self._gpu.finish(pending[0].mark)
        pending.popleft()

    def _batches(self, pages: PageMap, parts: Sequence[Part]) -> list[tuple[Blocks, Way]]:
        batches: list[tuple[Blocks, Way]] = []
        for (group, indexes, starts), way in parts:
            count = max(1, self._staging_bytes // pages.block_bytes(group))
            batches += [
                (Blocks(group, indexes[at : at + count], starts[at : at + count]), way)
                for at in range(0, len(indexes), count)
            ]
        return batches

    def _queue(
        self, lane: _Lane, pages: PageMap, blocks: Blocks, way: Way, memory: PinnedMemory | None
    ) -> list[Descriptors]:
        """Queue one batch; what must live until it has run."""
        size = pages.block_bytes(blocks.group)
        way = self._possible(way, pages, blocks, memory)
        if way is Way.COPIES:
            self._bulk(lane, _page_by_page(pages, blocks), memory)
            return []
        if way is Way.DIRECT:
            return self._kernels(lane, pages, blocks)
        steps = np.arange(len(blocks.indexes), dtype=np.uint64) * np.uint64(size)
        staged = blocks._replace(starts=np.uint64(lane.staging) + steps)
        bulk = _contiguous(staged.starts, blocks.starts, size)
        if self._to_host:
            kept = self._kernels(lane, pages, staged)
            self._bulk(lane, bulk, memory)
            return kept
        self._bulk(lane, bulk, memory)
        return self._kernels(lane, pages, staged)

    def _possible(
        self, way: Way, pages: PageMap, blocks: Blocks, memory: PinnedMemory | None
    ) -> Way:
        size, count = pages.block_bytes(blocks.group), len(blocks.indexes)
        if not self._gpu.has_kernel or count * pages.pages_per_block[blocks.group] < _FEW_PAGES:
            return Way.COPIES
        reachable = memory is not None and memory.is_pinned(blocks.starts, size)
        if way is Way.DIRECT and not (self._gpu.maps_host and reachable):
            way = Way.STAGED
        return Way.COPIES if way is Way.STAGED and size > self._staging_bytes else way

    def _bulk(self, lane: _Lane, copies: Copies, memory: PinnedMemory | None) -> None:
        if memory is not None:
            copies = memory.split(copies)
        pinned = memory is not None and memory.is_pinned(copies.host, copies.sizes)
        self._gpu.copy(lane.stream, copies, to_host=self._to_host, pinned=pinned)

    def _kernels(self, lane: _Lane, pages: PageMap, blocks: Blocks) -> list[Descriptors]:
        """Between the engine's pages and where the blocks start."""
        kept: list[Descriptors] = []
        for own, others, size in pages.pieces(blocks):
            pieces = self._gpu.descriptors(own.size)
            # Block by block, which is the order of the other side's memory.
            pieces[:, 0] = (others if self._to_host else own).T.ravel()
            pieces[:, 1] = (own if self._to_host else others).T.ravel()
            self._gpu.copy_pieces(lane.stream, pieces, size)
            kept.append(pieces)
        return kept

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
    if not gpu.has_kernel:
        return [Way.COPIES] * len(directions)
    count = max(_FEW_PAGES, STAGING_BYTES // page_bytes)
    host = np.zeros(count * page_bytes, dtype=np.uint8)
    scratch = gpu.allocate(count * page_bytes)
    memory = PinnedMemory(gpu, host)
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


def _page_by_page(pages: PageMap, blocks: Blocks) -> Copies:
    each = [
        Copies(own.T.ravel(), parts.T.ravel(), np.full(own.size, size, dtype=np.uint64))
        for own, parts, size in pages.pieces(blocks)
    ]
    return Copies(*(np.concatenate(arrays) for arrays in zip(*each, strict=True)))


def _contiguous(device: Addresses, host: Addresses, size: int) -> Copies:
    """Blocks that follow each other on both sides, as one copy each."""
    step = np.uint64(size)
    begins = np.ones(len(host), dtype=np.bool_)
    begins[1:] = (host[1:] != host[:-1] + step) | (device[1:] != device[:-1] + step)
    at = np.flatnonzero(begins)
    counts = np.diff(at, append=len(host)).astype(np.uint64)
    return Copies(device[at], host[at], counts * step)
