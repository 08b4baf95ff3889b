"""What a transfer between a GPU's pages and slots asks of the GPU, batch by batch.

A batch is what fits a buffer of a few MiB in the GPU. Within it there are three ways, because
neither the copy engines nor kernels are best for every size of page:

- copies: a copy for each page, on the copy engines. Right for large pages; below some tens of KiB
  what each copy costs by itself decides.
- staged: a kernel gathers the pages into a buffer in the GPU (or scatters them from it) at the
  GPU's own speed, and the copy engines move the buffer in large pieces. While one stream's buffer
  moves, the other's kernel runs. Takes few multiprocessors for a small part of the time.
- direct: a kernel reads or writes the slot itself, over the bus. Occupies multiprocessors for as
  long as the bus takes.

Addresses are worked out for a window of batches at once: an array operation costs a microsecond
whatever it computes, and holds the lock that the engine's own thread wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

import numpy as np

from storage_tiers.gpu import Copies, Descriptors, Gpu
from storage_tiers.hbm import Blocks, PageMap
from storage_tiers.pinned import PinnedMemory
from storage_tiers.streaming import Addresses

_WINDOW: Final = 16  # batches
FEW_PAGES: Final = 16  # fewer are not worth a kernel before or after the copy


class Way(StrEnum):
    """How pages of a size are copied; in the order of what it costs the engine."""

    COPIES = "copies"
    STAGED = "staged"
    DIRECT = "direct"


class Part(NamedTuple):
    """A group's blocks of a transfer, and the way they are to go."""

    blocks: Blocks
    way: Way


class Lane(NamedTuple):
    """A stream and its buffer."""

    stream: int
    staging: int  # address


class Kernel(NamedTuple):
    """Pieces of one size for one kernel; they must outlive it."""

    pieces: Descriptors
    size: int


class Batch(NamedTuple):
    """What to queue on one lane: kernels before copies to the host, after copies from it."""

    lane: Lane
    kernels: list[Kernel]
    copies: list[Copies]
    pinned: bool  # all host memory of the copies is


class Batches:
    """Cuts the transfers of one direction; made anew for each of them."""

    def __init__(
        self,
        gpu: Gpu,
        pages: PageMap,
        memory: PinnedMemory | None,
        *,
        to_host: bool,
        staging_bytes: int,
    ) -> None:
        """`memory` is what the slots lie in, None if that is not pinned."""
        self._gpu = gpu
        self._pages = pages
        self._memory = memory
        self._to_host = to_host
        self._staging_bytes = staging_bytes

    def cut(self, parts: Sequence[Part], next_lane: Callable[[], Lane]) -> Iterator[Batch]:
        """The batches in order. Raises GpuError."""
        for (group, indexes, starts), way in parts:
            count = max(1, self._staging_bytes // self._pages.block_bytes(group))
            for at in range(0, len(indexes), count * _WINDOW):
                end = at + count * _WINDOW
                window = Blocks(group, indexes[at:end], starts[at:end])
                lanes = [next_lane() for _ in range(0, len(window.indexes), count)]
                yield from self._window(window, self._possible(way, window), lanes, count)

    def _possible(self, way: Way, blocks: Blocks) -> Way:
        size, count = self._pages.block_bytes(blocks.group), len(blocks.indexes)
        pages = count * self._pages.pages_per_block[blocks.group]
        if not self._gpu.has_kernel or pages < FEW_PAGES:
            return Way.COPIES
        reachable = self._memory is not None and self._memory.is_pinned(blocks.starts, size)
        if way is Way.DIRECT and not (self._gpu.maps_host and reachable):
            way = Way.STAGED
        return Way.COPIES if way is Way.STAGED and size > self._staging_bytes else way

    def _window(
        self, blocks: Blocks, way: Way, lanes: Sequence[Lane], count: int
    ) -> Iterator[Batch]:
        """Batches of `count` blocks each, one for each lane."""
        kernels: list[_Kernels] = []
        bulks: list[_Bulk] = []
        if way is Way.COPIES:
            bulks = self._page_by_page(blocks, len(lanes), count)
        elif way is Way.DIRECT:
            kernels = self._kernels(blocks)
        else:
            size = np.uint64(self._pages.block_bytes(blocks.group))
            step = np.arange(len(blocks.indexes), dtype=np.uint64)
            buffers = np.array([lane.staging for lane in lanes], dtype=np.uint64)
            starts = buffers[step // count] + step % count * size
            kernels = self._kernels(blocks._replace(starts=starts))
            bulks = [self._contiguous(starts, blocks.starts, size, count)]
        for number, lane in enumerate(lanes):
            yield Batch(
                lane,
                [each.of(number * count, count) for each in kernels],
                [each.of(number) for each in bulks],
                all(each.pinned for each in bulks),
            )

    def _kernels(self, blocks: Blocks) -> list[_Kernels]:
        """Between the engine's pages and where the blocks start."""
        found: list[_Kernels] = []
        for own, others, size in self._pages.pieces(blocks):
            pieces = self._gpu.descriptors(own.size)
            # Block by block, which is the order of the other side's memory.
            pieces[:, 0] = (others if self._to_host else own).T.ravel()
            pieces[:, 1] = (own if self._to_host else others).T.ravel()
            found.append(_Kernels(pieces, len(own), size))
        return found

    def _page_by_page(self, blocks: Blocks, batches: int, count: int) -> list[_Bulk]:
        found: list[_Bulk] = []
        for own, parts, size in self._pages.pieces(blocks):
            sizes = np.full(own.size, size, dtype=np.uint64)
            first = [number * count * len(own) for number in range(batches + 1)]
            found.append(_Bulk(Copies(own.T.ravel(), parts.T.ravel(), sizes), first, self._memory))
        return found

    def _contiguous(self, device: Addresses, host: Addresses, size: np.uint64, count: int) -> _Bulk:
        """Blocks that follow each other on both sides, as one copy; none over a batch's end."""
        begins = np.ones(len(host), dtype=np.bool_)
        begins[1:] = (host[1:] != host[:-1] + size) | (device[1:] != device[:-1] + size)
        begins[::count] = True
        at = np.flatnonzero(begins)
        sizes = np.diff(at, append=len(host)).astype(np.uint64) * size
        first = np.searchsorted(at, np.arange(0, len(host) + count, count)).tolist()
        return _Bulk(Copies(device[at], host[at], sizes), first, self._memory)


class _Kernels(NamedTuple):
    """The pieces of a window, block by block."""

    pieces: Descriptors
    per_block: int
    size: int

    def of(self, first: int, count: int) -> Kernel:
        begin, end = first * self.per_block, (first + count) * self.per_block
        return Kernel(self.pieces[begin:end], self.size)


class _Bulk:
    """The copies of a window; those of batch b begin at `first[b]`."""

    def __init__(self, copies: Copies, first: list[int], memory: PinnedMemory | None) -> None:
        self._copies = copies
        self._first = first
        self._memory = memory
        self._whole = memory is None or memory.split(copies) is copies
        self.pinned = memory is not None and memory.is_pinned(copies.host, copies.sizes)

    def of(self, batch: int) -> Copies:
        begin, end = self._first[batch], self._first[batch + 1]
        copies = Copies(*(each[begin:end] for each in self._copies))
        if self._whole or self._memory is None:
            return copies
        return self._memory.split(copies)
