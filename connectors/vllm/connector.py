"""`KvbmConnector`: vLLM's offloading connector in front of the node's `kvbm-daemon`.

It builds on vLLM's own offloading seam, which keeps cache groups, sliding windows, preemption
fences, ranks and layouts right, and adds what the seam lacks: a failed load becomes a recompute,
every wait has a deadline, a request's lookups are one message sent when the request arrives.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from msgspec import structs
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    SchedulerOffloadConfig,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import OffloadKey, make_offload_key
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from connectors.vllm.identity import SHARED_HASHES, fingerprint_of
from connectors.vllm.notes import RequestNotes
from connectors.vllm.scheduler_side import Group, KvbmManager
from connectors.vllm.transfer import KvbmMetadata, KvbmWorkerMetadata
from connectors.vllm.worker_side import KvbmWorker
from kvbm.fingerprint import namespace_of
from kvbm.note import BLOCKS_MAX
from kvbm.protocol import VERSION, Hello, Routing
from kvbm.routing import derived_worker_id, live_endpoint, replay_endpoint
from kvbm.token_chain import warm_up

logger = logging.getLogger("kvbm.connector")


class KvbmConnector(OffloadingConnector):
    """Named by `--kv-transfer-config`; see `connectors.vllm.options` for its own settings."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        _use_our_spec(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.nnodes_within_dp > 1:
            raise ValueError(
                f"KvbmConnector needs all {parallel.world_size} ranks of an engine on one node, "
                "because they share the node's arena: use one engine per node"
            )
        super().__init__(vllm_config, role, kv_cache_config)
        self._failed_loads: set[str] = set()
        self._failed_stores: set[int] = set()
        self._untold_loads: set[str] = set()  # failed, and the scheduler half not told yet
        if role == KVConnectorRole.SCHEDULER:
            self._start_manager(vllm_config, kv_cache_config)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        _use_our_spec(vllm_config)
        return super().build_prom_metrics(
            vllm_config, metric_types, labelnames, per_engine_labelvalues
        )

    # -- scheduler half ------------------------------------------------------------------

    @property
    def _manager(self) -> KvbmManager:
        manager = self.scheduler.manager
        assert isinstance(manager, KvbmManager)
        return manager

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        self._manager.follow(
            request.request_id,
            RequestNotes(
                request, self._noted.tokens_per_block, self.scheduler.config.tokens_per_hash
            ),
        )
        self._open(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        # A preempted request comes back with more keys than it was opened with, and its claims
        # ended when it was first scheduled.
        if not self._manager.is_open(request.request_id):
            self._open(request)
        self._manager.note_local_hit(request.request_id, num_computed_tokens)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        self._manager.note_scheduled(request.request_id, num_external_tokens)
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens == 0:
            self._manager.release(request.request_id)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        meta = super().build_connector_meta(scheduler_output)
        assert isinstance(meta, OffloadingConnectorMetadata)
        step = self._manager.steps.handed_out(scheduler_output)
        return KvbmMetadata(**vars(meta), timed_step=step)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        meta = connector_output.kv_connector_worker_meta
        steps = meta.timed_steps if isinstance(meta, KvbmWorkerMetadata) else ()
        self._manager.steps.ended(steps)
        if isinstance(meta, KvbmWorkerMetadata):
            self._manager.note_worker_results(
                meta.failed_stores, meta.loaded_bytes, meta.failed_loads
            )
        super().update_connector_output(connector_output)

    def _open(self, request: Request) -> None:
        if not request.skip_reading_prefix_cache:
            self._manager.open(request.request_id, list(self._keys(request)))

    def _keys(self, request: Request) -> Iterator[list[OffloadKey]]:
        """Keys of the request's whole chunks, by cache group."""
        for group in self.scheduler.config.kv_group_configs:
            step = group.hashes_per_chunk
            hashes = islice(request.block_hashes, step - 1, None, step)
            yield [make_offload_key(block_hash, group.group_idx) for block_hash in hashes]

    def _start_manager(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        config = self.scheduler.config
        self._noted = noted = _noted_group(config)
        groups = [
            Group(
                g.group_idx,
                g.tokens_per_chunk,
                g.sliding_window_size_in_chunks or 0,
                is_noted=g is noted and config.blocks_per_chunk <= BLOCKS_MAX,
            )
            for g in config.kv_group_configs
        ]
        warm_up()
        step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # What one step computes is stored during the next one, while new slots are asked for.
        lease_targets = [2 * -(-step_tokens // group.tokens_per_chunk) + 1 for group in groups]
        options = self._manager.options
        fingerprint = fingerprint_of(vllm_config, kv_cache_config, options.tenant)
        offloading = vllm_config.kv_transfer_config
        index = vllm_config.parallel_config.data_parallel_index
        routing = _routing(vllm_config, noted, options.worker_id)

        def hello() -> Hello:
            return Hello(
                version=VERSION,
                role="scheduler",
                engine=f"{offloading.engine_id}/{index}",
                rank=0,
                world_size=config.num_workers,
                fingerprint=fingerprint,
                group_bytes=[],
                replicated=False,
                pid=os.getpid(),
                routing=structs.replace(routing, namespace=self._manager.namespace),
            )

        self._manager.start(groups, hello, lease_targets, _namespaces(vllm_config, fingerprint))
        warn_of(vllm_config)

    # -- worker half ---------------------------------------------------------------------

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        sent, received = self.get_finished(finished_req_ids)
        assert self.connector_worker is not None
        worker = self.connector_worker.worker
        assert isinstance(worker, KvbmWorker)
        failed_loads, failed_stores = worker.take_failed()
        self._untold_loads |= failed_loads
        self._failed_loads |= failed_loads
        self._failed_stores |= failed_stores
        # A failed request must be named as received in the same answer.
        failed = self._failed_loads & received
        self._failed_loads -= failed
        return KVConnectorTransferResults(
            finished_sending=sent, finished_recving=received, failed_recving=failed
        )

    def build_connector_worker_meta(self) -> KvbmWorkerMetadata | None:
        meta = super().build_connector_worker_meta()
        bound = self._connector_metadata
        step = bound.timed_step if isinstance(bound, KvbmMetadata) else 0
        if meta is None:
            return KvbmWorkerMetadata(timed_steps={step}) if step else None
        failed_stores, self._failed_stores = self._failed_stores, set()
        failed_loads, self._untold_loads = self._untold_loads, set()
        return KvbmWorkerMetadata(
            completed_jobs=meta.completed_jobs,
            transfer_stats=meta.transfer_stats,
            failed_stores=failed_stores,
            loaded_bytes=meta.transfer_stats.load.bytes,
            failed_loads=failed_loads,
            timed_steps={step} if step else set(),
        )


def _use_our_spec(vllm_config: VllmConfig) -> None:
    """Point vLLM's spec factory at our spec, and set the seam's options as we need them."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra["spec_name"] = "KvbmOffloadingSpec"
    extra["spec_module_path"] = "connectors.vllm.spec"
    # The next turn of a conversation needs the answer's KV too.
    extra.setdefault("offload_prompt_only", False)
    # vLLM 0.33 can load inside a step; such a load cannot be turned into a recompute.
    extra["sync_load_budget_bytes"] = 0


def _noted_group(config: SchedulerOffloadConfig) -> GroupOffloadConfig:
    """The group that routers are told of: the first with full attention, else the first."""
    groups = config.kv_group_configs
    return next((g for g in groups if g.sliding_window_size_in_chunks is None), groups[0])


def warn_of(vllm_config: VllmConfig) -> None:
    """What an operator set, or left as it is, and may come to regret."""
    if vllm_config.kv_transfer_config.kv_load_failure_policy == "fail":
        logger.warning(
            "kv_load_failure_policy is 'fail' (vLLM's default): a load that fails ends its "
            "request with an error; set it to 'recompute' to compute such requests instead"
        )
    on_gpu = vllm_config.device_config.device_type == "cuda"
    if on_gpu and vllm_config.model_config.enable_sleep_mode:
        logger.warning(
            "sleep mode takes the KV cache's memory away without waiting for copies, and one that "
            "still runs ends the engine: let all requests end, and some seconds more, before "
            "/sleep (https://github.com/vllm-project/vllm/issues/45268)"
        )


def _routing(vllm_config: VllmConfig, noted: GroupOffloadConfig, worker_id: int) -> Routing:
    """What routers are told of this engine; the namespace is filled in at each connection."""
    rank = vllm_config.parallel_config.data_parallel_index
    engine_id = str(vllm_config.kv_transfer_config.engine_id).removesuffix(f"_dp{rank}")
    events = vllm_config.kv_events_config
    live = replay = topic = ""
    if events is not None and events.enable_kv_cache_events and events.publisher == "zmq":
        live = live_endpoint(events.endpoint, rank)
        if live:
            replay, topic = replay_endpoint(events.replay_endpoint, rank), events.topic
        else:
            logger.warning(
                "KV events are published to %s, where kvbm-daemon cannot hear them: routers do "
                "not know what is in this engine's memory; use tcp://*:PORT",
                events.endpoint,
            )
    return Routing(
        worker_id=worker_id or derived_worker_id(engine_id),
        dp_rank=rank,
        namespace=b"",
        block_tokens=noted.tokens_per_block,
        group=noted.group_idx,
        events=live,
        replay=replay,
        topic=topic,
    )


def _namespaces(vllm_config: VllmConfig, fingerprint: dict[str, str]) -> Callable[[], bytes]:
    """The engine's key space: shared by its fingerprint at first, its own after each reset."""
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    shared = algorithm in SHARED_HASHES
    if not shared:
        logger.warning(
            "prefix_caching_hash_algo %r differs from process to process, so this engine shares "
            "no KV with others or with its own restarts; use one of %s",
            algorithm,
            sorted(SHARED_HASHES),
        )
    calls = 0

    def make() -> bytes:
        nonlocal calls
        calls += 1
        if calls == 1 and shared:
            return namespace_of(fingerprint)
        return namespace_of({**fingerprint, "private": uuid.uuid4().hex})

    return make


# MultiConnector makes a child's statistics by the child's name alone.
KVConnectorFactory.register_connector("KvbmConnector", __name__, "KvbmConnector")
