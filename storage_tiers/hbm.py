"""G1: the engine's own KV tensors, and copies between their scattered pages and slots.

An engine hands over one tensor per layer (or group of layers), shaped (blocks, page bytes), and
says which of them each cache group uses. A chunk of a group in a slot is, for each of its blocks,
the group's pages one after the other: block 0 page 0, block 0 page 1, ..., block 1 page 0, ...

Layouts differ only in which views those are. Layers apart (LBHNC) is a tensor a layer; all layers
of a block together (BLHNC, MLA's packed form) one tensor for all; where K and V of a block are
apart they are two tensors. What the bytes mean (bf16, fp8) does not matter.

`HostPages` serves engines whose tensors are in host memory (vLLM's CPU build); its copies release
the GIL. `storage_tiers.device_pages` serves those whose tensors are in a GPU's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from storage_tiers.streaming import Addresses, copy_pieces, prepare

Bytes = npt.NDArray[np.uint8]


class CopyError(Exception):
    """A copy failed, and nothing of it is under way any more; the bytes must not be used."""


class CopyPlan(NamedTuple):
    """One chunk's part of a transfer: `blocks` lie in the slot from block `first` on."""

    group: int
    blocks: Sequence[int]  # indexes into the engine's tensors
    first: int  # 0 unless the transfer starts in the middle of the chunk
    stripe: Bytes  # this rank's bytes of the slot


class PageAccess(Protocol):
    """Copies between an engine's pages and slots: all chunks of a transfer in one call."""

    @property
    def concurrent(self) -> bool:
        """Whether threads may copy at the same time, both ways; else one thread does all."""
        ...

    def block_bytes(self, group: int) -> int:
        """Bytes of one block of a cache group on this rank."""
        ...

    def attach(self, memory: Bytes) -> None:
        """The slots of coming transfers lie in this memory; that of an earlier call goes."""
        ...

    def fence(self) -> object:
        """On the engine's thread: what it has queued until now, for a copy to come after. Never
        raises.
        """
        ...

    def gather(self, plans: Sequence[CopyPlan], after: object = None) -> int:
        """Engine pages -> slots; returns the bytes copied when they are.

        IndexError outside the tensors or a stripe, before anything is copied; CopyError.
        """
        ...

    def scatter(self, plans: Sequence[CopyPlan], after: object = None) -> int:
        """Slots -> engine pages; as `gather`."""
        ...

    def close(self) -> None:
        """Give back what was taken; no copy is under way and none comes."""
        ...


class KvTensor(NamedTuple):
    """A tensor of (blocks, page bytes) by its place in memory."""

    address: int
    blocks: int
    page_bytes: int
    stride: int  # bytes from a block's page to the next one's


class Pieces(NamedTuple):
    """Pages of one size and their places in chunks: addresses, shaped (tensors, blocks)."""

    pages: Addresses
    parts: Addresses
    size: int


class Blocks(NamedTuple):
    """A group's blocks of a transfer: their indexes, and where each begins in its slot."""

    group: int
    indexes: npt.NDArray[np.uint64]
    starts: Addresses


class _Run(NamedTuple):
    """Tensors of a group whose pages are equally long and equally far apart."""

    pages: Addresses  # where each tensor's page of block 0 is
    offsets: Addresses  # where each tensor's page begins in a block of a stripe
    page_bytes: int
    stride: int


class PageMap:
    """Where the pages of each cache group's blocks are; pure arithmetic on addresses."""

    def __init__(self, tensors: Sequence[KvTensor], groups: Sequence[Sequence[int]]) -> None:
        """`groups[g]` lists the indexes of the tensors that hold group g's pages."""
        members = [[tensors[index] for index in group] for group in groups]
        self._runs = [_runs(group) for group in members]
        self._blocks = [min(tensor.blocks for tensor in group) for group in members]
        self._block_bytes = [sum(tensor.page_bytes for tensor in group) for group in members]
        self.pages_per_block = [len(group) for group in members]

    def block_bytes(self, group: int) -> int:
        return self._block_bytes[group]

    def blocks(self, plans: Sequence[CopyPlan]) -> list[Blocks]:
        """The transfer's blocks by group. IndexError outside the tensors or a stripe."""
        by_group: dict[int, list[CopyPlan]] = defaultdict(list)
        for plan in plans:
            by_group[plan.group].append(plan)
        found: list[Blocks] = []
        for group, own in sorted(by_group.items()):
            indexes = np.array([block for plan in own for block in plan.blocks], dtype=np.int64)
            if len(indexes) and not 0 <= indexes.min() <= indexes.max() < self._blocks[group]:
                raise IndexError(f"the engine has no such blocks: {indexes.tolist()}")
            starts = [self._starts(plan) for plan in own]
            found.append(Blocks(group, indexes.astype(np.uint64), np.concatenate(starts)))
        return found

    def pieces(self, blocks: Blocks) -> Iterator[Pieces]:
        """Where each page of these blocks is, and where in its block's copy."""
        for run in self._runs[blocks.group]:
            pages = run.pages[:, None] + blocks.indexes * np.uint64(run.stride)
            yield Pieces(pages, run.offsets[:, None] + blocks.starts, run.page_bytes)

    def _starts(self, plan: CopyPlan) -> Addresses:
        stripe, first, count = plan.stripe, plan.first, len(plan.blocks)
        assert stripe.strides == (1,) and stripe.dtype == np.uint8, "a stripe is contiguous bytes"
        size = self._block_bytes[plan.group]
        if first < 0 or (first + count) * size > stripe.nbytes:
            raise IndexError(f"{count} blocks from {first} on do not fit {stripe.nbytes} bytes")
        steps = np.arange(first, first + count, dtype=np.uint64)
        return np.uint64(address_of(stripe)) + steps * np.uint64(size)


class HostPages:
    """`PageAccess` over NumPy views of the engine's tensors, each (blocks, page bytes) uint8."""

    concurrent = False

    def __init__(self, tensors: Sequence[Bytes], groups: Sequence[Sequence[int]]) -> None:
        """`groups[g]` lists the indexes of the tensors that hold group g's pages."""
        for tensor in tensors:
            if tensor.ndim != 2 or tensor.dtype != np.uint8 or tensor.strides[1] != 1:
                raise ValueError("KV tensors must be (blocks, page bytes) of contiguous bytes")
        self._tensors = list(tensors)  # what the addresses point into
        places = [
            KvTensor(address_of(each), len(each), each.shape[1], each.strides[0])
            for each in tensors
        ]
        self._map = PageMap(places, groups)
        prepare()

    def block_bytes(self, group: int) -> int:
        return self._map.block_bytes(group)

    def attach(self, memory: Bytes) -> None:
        return

    def fence(self) -> object:
        return None  # what the engine computes is done when its call returns

    def gather(self, plans: Sequence[CopyPlan], after: object = None) -> int:
        copied = 0
        for pages, parts, size in self._pieces(plans):
            # Read in the order of memory: scattered stores cost less than scattered loads.
            order = np.argsort(pages[0])
            copy_pieces(parts[:, order].ravel(), pages[:, order].ravel(), size)
            copied += pages.size * size
        return copied

    def scatter(self, plans: Sequence[CopyPlan], after: object = None) -> int:
        copied = 0
        for pages, parts, size in self._pieces(plans):
            copy_pieces(pages.T.ravel(), parts.T.ravel(), size)
            copied += pages.size * size
        return copied

    def close(self) -> None:
        return

    def _pieces(self, plans: Sequence[CopyPlan]) -> Iterator[Pieces]:
        for blocks in self._map.blocks(plans):
            yield from self._map.pieces(blocks)


def address_of(array: npt.NDArray[Any]) -> int:
    """Where an array's first byte is."""
    address: int = array.__array_interface__["data"][0]
    return address


def _runs(tensors: Sequence[KvTensor]) -> list[_Run]:
    members: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    offset = 0
    for tensor in tensors:
        members[tensor.page_bytes, tensor.stride].append((tensor.address, offset))
        offset += tensor.page_bytes
    runs: list[_Run] = []
    for (page_bytes, stride), places in members.items():
        pages, offsets = np.array(places, dtype=np.uint64).T
        runs.append(_Run(pages, offsets, page_bytes, stride))
    return runs
