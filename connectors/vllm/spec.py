"""The offloading spec vLLM creates in both halves: ours to give the manager and the worker."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from connectors.vllm.options import Options
from connectors.vllm.scheduler_side import KvbmManager
from connectors.vllm.stats import metric_definitions
from connectors.vllm.worker_side import KvbmWorker, pages_of
from kvbm.protocol import VERSION, Hello


class KvbmOffloadingSpec(OffloadingSpec):
    """Made from `kv_connector_extra_config`; raises OptionError if that is bad."""

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return metric_definitions()

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self.options = Options.parse(config.extra_config)
        # One copy serves all ranks where they hold the same bytes (MLA): rank 0 writes it.
        self.replicated_layout = config.replicated_layout
        self.manager = KvbmManager(self.options)
        self.worker: KvbmWorker | None = None

    @property
    def engine_name(self) -> str:
        """Shared by the scheduler and the workers of one engine, unique on the node."""
        return f"{self.config.engine_id}/{self.config.parallel.data_parallel_index}"

    def get_manager(self) -> OffloadingManager:
        return self.manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        pages = pages_of(kv_caches, self.options.gpu_copies)
        parallel = self.config.parallel
        rank = parallel.rank % parallel.world_size
        group_bytes = [
            pages.block_bytes(group) * self.blocks_per_chunk
            for group in range(len(kv_caches.group_data_refs))
        ]

        def hello() -> Hello:
            return Hello(
                version=VERSION,
                role="worker",
                engine=self.engine_name,
                rank=rank,
                world_size=parallel.world_size,
                fingerprint={},
                group_bytes=group_bytes,
                replicated=self.replicated_layout,
                pid=os.getpid(),
            )

        self.worker = KvbmWorker(
            pages,
            socket_path=self.options.socket,
            hello=hello,
            rank=rank,
            blocks_per_chunk=self.blocks_per_chunk,
            load_deadline_s=self.options.load_deadline_s,
        )
        return self.worker
