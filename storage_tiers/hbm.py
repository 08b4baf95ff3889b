"""G1: the engine's own KV tensors, and copies between their scattered pages and slots.

An engine hands over one tensor per layer (or group of layers), shaped (blocks, page bytes), and
says which of them each cache group uses. A chunk of a group in a slot is, for each of its blocks,
the group's pages one after the other: block 0 page 0, block 0 page 1, ..., block 1 page 0, ...

`HostPages` serves engines whose tensors are in host memory (vLLM's CPU build). Copies release the
GIL; call them from one thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from storage_tiers.streaming import Addresses, copy_pieces, prepare

Bytes = npt.NDArray[np.uint8]


class CopyPlan(NamedTuple):
    """One chunk's part of a transfer: `blocks` lie in the slot from block `first` on."""

    group: int
    blocks: Sequence[int]  # indexes into the engine's tensors
    first: int  # 0 unless the transfer starts in the middle of the chunk
    stripe: Bytes  # this rank's bytes of the slot


class PageAccess(Protocol):
    """Copies between an engine's pages and slots: all chunks of a transfer in one call."""

    def block_bytes(self, group: int) -> int:
        """Bytes of one block of a cache group on this rank."""
        ...

    def gather(self, plans: Sequence[CopyPlan]) -> int:
        """Engine pages -> slots; bytes copied. IndexError outside the tensors or a stripe."""
        ...

    def scatter(self, plans: Sequence[CopyPlan]) -> int:
        """Slots -> engine pages; bytes copied. IndexError outside the tensors or a stripe."""
        ...


class _Run(NamedTuple):
    """Tensors of a group whose pages are equally long and equally far apart."""

    pages: Addresses  # where each tensor's page of block 0 is
    offsets: Addresses  # where each tensor's page begins in a block of a stripe
    page_bytes: int
    stride: int


class HostPages:
    """`PageAccess` over NumPy views of the engine's tensors, each (blocks, page bytes) uint8."""

    def __init__(self, tensors: Sequence[Bytes], groups: Sequence[Sequence[int]]) -> None:
        """`groups[g]` lists the indexes of the tensors that hold group g's pages."""
        for tensor in tensors:
            if tensor.ndim != 2 or tensor.dtype != np.uint8 or tensor.strides[1] != 1:
                raise ValueError("KV tensors must be (blocks, page bytes) of contiguous bytes")
        self._tensors = list(tensors)  # what the addresses point into
        self._runs = [_runs([tensors[index] for index in group]) for group in groups]
        self._blocks = [min(tensors[index].shape[0] for index in group) for group in groups]
        self._block_bytes: list[int] = [
            sum(tensors[index].shape[1] for index in group) for group in groups
        ]
        prepare()

    def block_bytes(self, group: int) -> int:
        return self._block_bytes[group]

    def gather(self, plans: Sequence[CopyPlan]) -> int:
        copied = 0
        for pages, parts, size in self._pieces(plans):
            # Read in the order of memory: scattered stores cost less than scattered loads.
            order = np.argsort(pages[0])
            copy_pieces(parts[:, order].ravel(), pages[:, order].ravel(), size)
            copied += pages.size * size
        return copied

    def scatter(self, plans: Sequence[CopyPlan]) -> int:
        copied = 0
        for pages, parts, size in self._pieces(plans):
            copy_pieces(pages.T.ravel(), parts.T.ravel(), size)
            copied += pages.size * size
        return copied

    def _pieces(self, plans: Sequence[CopyPlan]) -> Iterator[tuple[Addresses, Addresses, int]]:
        """Addresses of pages and of their parts of stripes (tensors, blocks), and their size."""
        for group in sorted({plan.group for plan in plans}):
            blocks: list[int] = []
            starts: list[int] = []  # where each block begins in its stripe
            for plan in plans:
                if plan.group == group:
                    blocks += plan.blocks
                    starts += self._starts(plan)
            indexes = np.array(blocks, dtype=np.int64)
            if len(blocks) and not 0 <= indexes.min() <= indexes.max() < self._blocks[group]:
                raise IndexError(f"the engine has no such blocks: {blocks}")
            for run in self._runs[group]:
                pages = run.pages[:, None] + indexes.astype(np.uint64) * np.uint64(run.stride)
                parts = run.offsets[:, None] + np.array(starts, dtype=np.uint64)
                yield pages, parts, run.page_bytes

    def _starts(self, plan: CopyPlan) -> range:
        stripe, first, count = plan.stripe, plan.first, len(plan.blocks)
        assert stripe.strides == (1,) and stripe.dtype == np.uint8, "a stripe is contiguous bytes"
        block_bytes = self._block_bytes[plan.group]
        if first < 0 or (first + count) * block_bytes > stripe.nbytes:
            raise IndexError(f"{count} blocks from {first} on do not fit {stripe.nbytes} bytes")
        start = _address(stripe) + first * block_bytes
        return range(start, start + count * block_bytes, block_bytes)


def _runs(tensors: Sequence[Bytes]) -> list[_Run]:
    members: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    offset = 0
    for tensor in tensors:
        page_bytes: int = tensor.shape[1]
        members[page_bytes, tensor.strides[0]].append((_address(tensor), offset))
        offset += page_bytes
    runs: list[_Run] = []
    for (page_bytes, stride), places in members.items():
        pages, offsets = np.array(places, dtype=np.uint64).T
        runs.append(_Run(pages, offsets, page_bytes, stride))
    return runs


def _address(array: Bytes) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
