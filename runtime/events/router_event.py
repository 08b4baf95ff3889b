"""The reference router's block events: what a worker's cache gained and lost, for an index.

`block_hash` is the engine's own name of a block in its sequence, `tokens_hash` the hash of its
tokens alone (dynamo.md calls it local). A stored event holds them as two numpy arrays, so that an
event of thousands of blocks is a handful of Python objects. `router_wire.py` reads and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np

from runtime.events.msgpack_rows import Hashes


class StorageTier(StrEnum):
    DEVICE = "device"
    HOST_PINNED = "host_pinned"
    DISK = "disk"
    EXTERNAL = "external"

    @property
    def medium(self) -> str | None:
        """What engines call it; None is the GPU, which they may leave out."""
        return _MEDIUM_OF_TIER[self]


@dataclass(frozen=True, slots=True)
class MmObject:
    """An image or the like that stands in a block, at the token ranges `offsets` of that block."""

    mm_hash: int
    offsets: tuple[tuple[int, int], ...] = ()


MmObjects = tuple[MmObject, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Blocks that follow each other, the first of them its `parent_hash`."""

    parent_hash: int | None
    block_hashes: Hashes
    tokens_hashes: Hashes
    start_position: int | None = None  # of the first block in its sequence
    mm_objects: Mapping[int, MmObjects] = field(default_factory=dict)  # by index of the block

    def __post_init__(self) -> None:
        assert self.block_hashes.dtype == self.tokens_hashes.dtype == np.uint64
        assert self.block_hashes.shape == self.tokens_hashes.shape

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Stored)
            and self.parent_hash == other.parent_hash
            and self.start_position == other.start_position
            and self.mm_objects == other.mm_objects
            and np.array_equal(self.block_hashes, other.block_hashes)
            and np.array_equal(self.tokens_hashes, other.tokens_hashes)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class Removed:
    block_hashes: Hashes

    def __post_init__(self) -> None:
        assert self.block_hashes.dtype == np.uint64

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Removed) and np.array_equal(self.block_hashes, other.block_hashes)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Cleared:
    """Everything of this worker and rank is gone."""


KvCacheEventData = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class KvCacheEvent:
    event_id: int
    data: KvCacheEventData
    dp_rank: int = 0


@dataclass(frozen=True, slots=True)
class RouterEvent:
    worker_id: int
    event: KvCacheEvent
    storage_tier: StorageTier = StorageTier.DEVICE
    residency_domain: str | None = "worker"  # None: as older publishers, which do not say
    state_source: object = None  # passed on as it came


def hashes(values: Sequence[int]) -> Hashes:
    """Values outside 64 bits raise OverflowError."""
    return np.array(values, np.uint64) if len(values) else np.empty(0, np.uint64)


def tier_of_medium(medium: str | None) -> StorageTier | None:
    """None if the medium is not known; an engine that names none means its GPU."""
    return StorageTier.DEVICE if medium is None else _TIER_OF_MEDIUM.get(medium.upper())


_TIER_OF_MEDIUM: Final = {
    "GPU": StorageTier.DEVICE,
    "DEVICE": StorageTier.DEVICE,
    "CPU": StorageTier.HOST_PINNED,
    "CPU_PINNED": StorageTier.HOST_PINNED,
    "CPU_TIER1": StorageTier.HOST_PINNED,
    "CPU_TIER2": StorageTier.DISK,
    "DISK": StorageTier.DISK,
    "NVME": StorageTier.DISK,
    "STORAGE": StorageTier.DISK,
    "EXTERNAL": StorageTier.EXTERNAL,
    "NETWORK": StorageTier.EXTERNAL,
    "REMOTE": StorageTier.EXTERNAL,
    "SHARED": StorageTier.EXTERNAL,
}
_MEDIUM_OF_TIER: Final[dict[StorageTier, str | None]] = {
    StorageTier.DEVICE: None,
    StorageTier.HOST_PINNED: "CPU_PINNED",
    StorageTier.DISK: "DISK",
    StorageTier.EXTERNAL: "EXTERNAL",
}
