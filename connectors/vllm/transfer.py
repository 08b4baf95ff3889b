"""What the scheduler half tells the workers about slots, and what they tell it back."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec


@dataclass
class ArenaSlots(LoadStoreSpec):
    """Slots of one load or store job, in the order of the job's chunks; pickled to each worker.

    `groups` counts the engine's offloaded cache groups from 0 in their order. A rank's bytes of a
    chunk begin at `rank_offsets[group][rank]` of its slot.
    """

    transfer: int  # unique per scheduler process
    request: str
    epoch: bytes
    session: int
    offsets: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # by group
    rank_offsets: list[list[int]] = field(default_factory=list)  # by group, then rank


@dataclass
class KvbmMetadata(OffloadingConnectorMetadata):
    """vLLM's jobs of one step, and the step's number if it is timed."""

    timed_step: int = 0


@dataclass
class KvbmWorkerMetadata(OffloadingWorkerMetadata):
    """vLLM's completions, plus what it has no word for: stores that failed, bytes loaded."""

    failed_stores: set[int] = field(default_factory=set)  # ArenaSlots.transfer
    loaded_bytes: int = 0
    failed_loads: set[str] = field(default_factory=set)  # request ids
    timed_steps: set[int] = field(default_factory=set)  # see `connectors.vllm.steps`

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        merged = super().aggregate(other)
        assert isinstance(other, KvbmWorkerMetadata)
        return KvbmWorkerMetadata(
            completed_jobs=merged.completed_jobs,
            transfer_stats=merged.transfer_stats,
            failed_stores=self.failed_stores | other.failed_stores,
            loaded_bytes=self.loaded_bytes + other.loaded_bytes,
            failed_loads=self.failed_loads | other.failed_loads,
            timed_steps=self.timed_steps | other.timed_steps,
        )
