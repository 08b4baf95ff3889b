"""G1: the engine's own KV tensors, and copies between their scattered pages and one slot.

An engine hands over one tensor per layer (or group of layers), shaped (blocks, page bytes), and
says which of them each cache group uses. A chunk of a group in a slot is, for each of its blocks,
the group's pages one after the other: block 0 page 0, block 0 page 1, ..., block 1 page 0, ...

`HostPages` serves engines whose tensors are in host memory (vLLM's CPU build). Copies release the
GIL; call them from one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """One chunk's part of a transfer: `blocks` lie in the slot from block `first` on."""

    group: int
    blocks: Sequence[int]  # indexes into the engine's tensors
    first: int  # 0 unless the transfer starts in the middle of the chunk
    stripe: memoryview  # this rank's bytes of the slot


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
    """`PageAccess` over NumPy views of the engine's tensors, each (blocks, page bytes) uint8."""

    def __init__(self, tensors: Sequence[Bytes], groups: Sequence[Sequence[int]]) -> None:
        """`groups[g]` lists the indexes of the tensors that hold group g's pages."""
        for tensor in tensors:
            if tensor.ndim != 2 or tensor.dtype != np.uint8 or tensor.strides[1] != 1:
                raise ValueError("KV tensors must be (blocks, page bytes) of contiguous bytes")
        self._tensors = [[tensors[index] for index in group] for group in groups]
        self._block_bytes: list[int] = [sum(t.shape[1] for t in group) for group in self._tensors]

    def block_bytes(self, group: int) -> int:
        return self._block_bytes[group]

    def gather(self, plan: CopyPlan) -> int:
        stripe = np.frombuffer(plan.stripe, dtype=np.uint8)
        at: int = plan.first * self._block_bytes[plan.group]
        start = at
        for block in plan.blocks:
            for tensor in self._tensors[plan.group]:
                end = at + tensor.shape[1]
                stripe[at:end] = tensor[block]
                at = end
        return at - start

    def scatter(self, plan: CopyPlan) -> int:
        stripe = np.frombuffer(plan.stripe, dtype=np.uint8)
        at: int = plan.first * self._block_bytes[plan.group]
        start = at
        for block in plan.blocks:
            for tensor in self._tensors[plan.group]:
                end = at + tensor.shape[1]
                tensor[block] = stripe[at:end]
                at = end
        return at - start
