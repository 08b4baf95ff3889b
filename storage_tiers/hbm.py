"""G1: the engine's own KV tensors, and copies between their scattered pages and one slot.

An engine hands over one tensor per layer (or group of layers), shaped (blocks, page bytes), and
says which of them each cache group uses. A chunk of a group in a slot is, for each of its blocks,
the group's pages one after the other: block 0 page 0, block 0 page 1, ..., block 1 page 0, ...

`HostPages` serves engines whose tensors are in host memory (vLLM's CPU build). Copies release the
GIL; call them from one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class CopyPlan(NamedTuple):
    """One chunk's part of a transfer: `blocks` lie in the slot from block `first` on."""

    group: int
    blocks: Sequence[int]  # indexes into the engine's tensors
    first: int  # 0 unless the transfer starts in the middle of the chunk
    stripe: Bytes  # this rank's bytes of the slot


class PageAccess(Protocol):
    """Copies between an engine's pages and slots."""

    def block_bytes(self, group: int) -> int:
        """Bytes of one block of a cache group on this rank."""
        ...

    def gather(self, plan: CopyPlan) -> int:
        """Engine pages -> slot; bytes copied. Raises IndexError outside the tensors."""
        ...

    def scatter(self, plan: CopyPlan) -> int:
        """Slot -> engine pages; bytes copied. Raises IndexError outside the tensors."""
        ...


class HostPages:
    """`PageAccess` over NumPy views of the engine's tensors, each (blocks, page bytes) uint8.

    Tensors that lie at equal distances, as layers of one allocation do, are copied in one call.
    """

    def __init__(self, tensors: Sequence[Bytes], groups: Sequence[Sequence[int]]) -> None:
        """`groups[g]` lists the indexes of the tensors that hold group g's pages."""
        for tensor in tensors:
            if tensor.ndim != 2 or tensor.dtype != np.uint8 or tensor.strides[1] != 1:
                raise ValueError("KV tensors must be (blocks, page bytes) of contiguous bytes")
        self._tensors = list(tensors)  # what the runs' memory belongs to
        self._runs = [_runs([tensors[index] for index in group]) for group in groups]
        self._block_bytes: list[int] = [
            sum(tensors[index].shape[1] for index in group) for group in groups
        ]

    def block_bytes(self, group: int) -> int:
        return self._block_bytes[group]

    def gather(self, plan: CopyPlan) -> int:
        copied = 0
        for block, run, stripe in self._pieces(plan):
            stripe[:] = run[:, block]
            copied += stripe.nbytes
        return copied

    def scatter(self, plan: CopyPlan) -> int:
        copied = 0
        for block, run, stripe in self._pieces(plan):
            run[:, block] = stripe
            copied += stripe.nbytes
        return copied

    def _pieces(self, plan: CopyPlan) -> Iterator[tuple[int, Bytes, Bytes]]:
        """Block, run (tensors, blocks, page bytes), its part of the slot (tensors, page bytes)."""
        stripe = plan.stripe
        at = plan.first * self._block_bytes[plan.group]
        for block in plan.blocks:
            for run in self._runs[plan.group]:
                count, _, page_bytes = run.shape
                end = at + count * page_bytes
                yield block, run, stripe[at:end].reshape(count, page_bytes)
                at = end


def _runs(tensors: Sequence[Bytes]) -> list[Bytes]:
    """The tensors in order, as few arrays (tensors, blocks, page bytes) of the same memory."""
    runs: list[Bytes] = []
    first = 0
    while first < len(tensors):
        last = first + 1
        distance = 0
        while last < len(tensors) and _alike(tensors[first], tensors[last]):
            step = _address(tensors[last]) - _address(tensors[last - 1])
            if last > first + 1 and step != distance:
                break
            distance = step
            last += 1
        tensor = tensors[first]
        runs.append(
            np.lib.stride_tricks.as_strided(
                tensor, (last - first, *tensor.shape), (distance, *tensor.strides)
            )
        )
        first = last
    return runs


def _alike(one: Bytes, other: Bytes) -> bool:
    return one.shape == other.shape and one.strides == other.strides


def _address(tensor: Bytes) -> int:
    address: int = tensor.__array_interface__["data"][0]
    return address
