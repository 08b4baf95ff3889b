"""`KvbmConnector` in a worker: vLLM's own half of the seam over ours, told of what failed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace as Fields
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    TransferJob,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
    OffloadingConnectorWorker,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from connectors.vllm.connector import KvbmConnector, warn_of
from connectors.vllm.transfer import ArenaSlots, KvbmMetadata, KvbmWorkerMetadata
from connectors.vllm.worker_side import KvbmWorker
from storage_tiers.arena import Slot
from tests.connectors.copies import (
    ONE_BLOCK,
    Daemon,
    describe,
    no_hello,
    pages_of,
)

BLOCK_BYTES = ONE_BLOCK.block_bytes(0)


class Rank:
    """A worker process of an engine, without the engine."""

    def __init__(self, daemon: Daemon, socket: Path) -> None:
        self.worker = KvbmWorker(
            pages_of(ONE_BLOCK, ONE_BLOCK.tensors(seed=1)),
            socket_path=str(socket),
            hello=no_hello,
            rank=0,
            blocks_per_chunk=1,
            load_deadline_s=10.0,
        )
        daemon.greet(self.worker)
        spec = Fields(
            replicated_layout=False,
            config=Fields(canonical_layout=False, parallel=Fields(rank=0)),
        )
        half = OffloadingConnectorWorker(spec, None, None)
        half.worker = self.worker
        # What KvbmConnector's own constructor makes besides vLLM's, which needs an engine.
        self.connector = object.__new__(KvbmConnector)
        self.connector.connector_worker = half
        self.connector._failed_loads = set()
        self.connector._failed_stores = set()
        self.connector._untold_loads = set()
        self.step()

    def step(
        self,
        loads: dict[int, ArenaSlots] | None = None,
        stores: dict[int, ArenaSlots] | None = None,
    ) -> None:
        """One step of the engine; its stores begin with the next one, as vLLM does it."""
        pages = GPULoadStoreSpec([0], [1], [0])
        metadata = OffloadingConnectorMetadata(
            {n: TransferJob(slots.request, slots, pages) for n, slots in (loads or {}).items()},
            {n: TransferJob(slots.request, pages, slots) for n, slots in (stores or {}).items()},
        )
        self.connector.bind_connector_metadata(metadata)
        self.connector.handle_preemptions(metadata)
        self.connector.start_load_kv(None)
        self.connector.wait_for_save()

    def poll(self, *jobs: int) -> tuple[set[str], set[str], KvbmWorkerMetadata]:
        """Received and failed requests, and the report to the scheduler, once these jobs ended."""
        self.worker.wait(set(jobs))
        results = self.connector.get_transfer_results(set())
        meta = self.connector.build_connector_worker_meta()
        assert meta is not None and meta.completed_jobs == dict.fromkeys(jobs, 1)
        return results.finished_recving, results.failed_recving, meta


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    daemon = Daemon()
    yield daemon
    daemon.arena.close()


@pytest.fixture
def rank(daemon: Daemon, tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(daemon, tmp_path / "nowhere")
    yield rank
    rank.connector.connector_worker.shutdown()


def slots_of(daemon: Daemon, request: str, transfer: int = 1, *, lost: bool = False) -> ArenaSlots:
    slots: list[list[Slot]] = ONE_BLOCK.lease(daemon)
    if lost:
        daemon.arena.advance(slots[0][0].offset)
    return describe(daemon, slots, request=request, transfer=transfer)


def test_a_failed_load_is_named_with_its_result_and_told_to_the_scheduler_once(
    rank: Rank, daemon: Daemon
) -> None:
    rank.step(loads={1: slots_of(daemon, "kept"), 2: slots_of(daemon, "lost", lost=True)})
    received, failed, meta = rank.poll(1, 2)
    assert received == {"kept", "lost"} and failed == {"lost"}
    assert meta.failed_loads == {"lost"} and meta.failed_stores == set()
    assert meta.loaded_bytes == BLOCK_BYTES
    rank.step(loads={3: slots_of(daemon, "lost")})
    received, failed, meta = rank.poll(3)
    assert received == {"lost"} and failed == set() and meta.failed_loads == set()


def test_a_failed_store_is_told_to_the_scheduler_once(rank: Rank, daemon: Daemon) -> None:
    good, bad = slots_of(daemon, "a", 11), slots_of(daemon, "a", 12, lost=True)
    rank.step(stores={1: good, 2: bad})
    rank.step()
    received, failed, meta = rank.poll(1, 2)
    assert received == failed == meta.failed_loads == set()
    assert meta.failed_stores == {12} and meta.loaded_bytes == 0
    assert meta.transfer_stats.store.bytes == BLOCK_BYTES
    rank.step(stores={3: slots_of(daemon, "a", 13)})
    rank.step()
    assert rank.poll(3)[2].failed_stores == set()


def test_with_nothing_ended_there_is_nothing_to_tell(rank: Rank) -> None:
    results = rank.connector.get_transfer_results(set())
    assert not results.finished_recving and not results.failed_recving
    assert rank.connector.build_connector_worker_meta() is None


def test_a_failure_is_kept_until_vllm_hears_of_its_request(rank: Rank, daemon: Daemon) -> None:
    """The copy thread may list a failure between vLLM's poll for results and ours for failures."""
    rank.step(loads={1: slots_of(daemon, "lost", lost=True)})
    rank.worker.wait({1})
    held, rank.worker._results = rank.worker._results, []
    early = rank.connector.get_transfer_results(set())
    assert not early.finished_recving and not early.failed_recving
    assert rank.connector.build_connector_worker_meta() is None
    rank.worker._results = held
    late = rank.connector.get_transfer_results(set())
    assert late.finished_recving == late.failed_recving == {"lost"}
    meta = rank.connector.build_connector_worker_meta()
    assert meta is not None and meta.failed_loads == {"lost"}


def test_what_the_ranks_report_is_merged() -> None:
    one = KvbmWorkerMetadata(
        completed_jobs={1: 1}, failed_stores={11}, loaded_bytes=64, failed_loads={"a"}
    )
    other = KvbmWorkerMetadata(
        completed_jobs={1: 1, 2: 1}, failed_stores={12}, loaded_bytes=32, failed_loads={"b"}
    )
    merged = one.aggregate(other)
    assert isinstance(merged, KvbmWorkerMetadata)
    assert merged.completed_jobs == {1: 2, 2: 1}
    assert (merged.failed_stores, merged.loaded_bytes) == ({11, 12}, 96)
    assert merged.failed_loads == {"a", "b"}


def test_slots_and_reports_travel_between_processes(daemon: Daemon) -> None:
    slots = slots_of(daemon, "a")
    assert pickle.loads(pickle.dumps(slots)) == slots
    report = KvbmWorkerMetadata(completed_jobs={1: 1}, failed_stores={1}, failed_loads={"a"})
    assert pickle.loads(pickle.dumps(report)) == report


def test_the_number_of_a_timed_step_comes_back_with_its_result(rank: Rank) -> None:
    metadata = KvbmMetadata({}, {}, timed_step=7)
    rank.connector.bind_connector_metadata(pickle.loads(pickle.dumps(metadata)))
    meta = rank.connector.build_connector_worker_meta()
    assert meta is not None and meta.timed_steps == {7} and not meta.completed_jobs
    other = KvbmWorkerMetadata(timed_steps={7})
    merged = meta.aggregate(other)
    assert isinstance(merged, KvbmWorkerMetadata) and merged.timed_steps == {7}
    rank.connector.bind_connector_metadata(KvbmMetadata({}, {}))
    assert rank.connector.build_connector_worker_meta() is None


@pytest.mark.parametrize(
    ("policy", "device", "sleeps", "warned"),
    [
        ("recompute", "cuda", False, []),
        ("recompute", "cpu", True, []),
        ("fail", "cuda", False, ["kv_load_failure_policy is 'fail'"]),
        ("recompute", "cuda", True, ["sleep mode takes the KV cache's memory away"]),
    ],
)
def test_what_may_be_regretted_is_warned_of(
    policy: str, device: str, sleeps: bool, warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config: Any = Fields(
        kv_transfer_config=Fields(kv_load_failure_policy=policy),
        device_config=Fields(device_type=device),
        model_config=Fields(enable_sleep_mode=sleeps),
    )
    warn_of(config)
    told = [each.getMessage() for each in caplog.records if each.name == "kvbm.connector"]
    assert len(told) == len(warned)
    assert all(map(str.startswith, told, warned))
