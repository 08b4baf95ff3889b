"""The connector's half in each vLLM worker: copies between the engine's pages and the arena.

vLLM submits jobs and polls for results on the worker's thread; one copy thread runs them in order,
or where the pages allow it (a GPU's) two threads each way, so that one prepares a copy while the
other's is under way. The link's thread maps the arena and answers the daemon's fences. Rules that
keep KV right:

- A load counts only if every slot's generation was the expected one before and after the copy.
- A store runs only while the session that leased its slots is open here; a fence, or the end of
  the connection, waits for the copy in progress, and jobs of that session fail from then on.
- Nothing is abandoned half-way: a job past its deadline is failed only if it has not started.
- A copy comes after all that the engine had queued on its device when it submitted the job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from connectors.vllm.cores import leave_the_models_core
from connectors.vllm.transfer import ArenaSlots
from kvbm.link import Link
from kvbm.protocol import Fence, Fenced, FromDaemon, Hello, Welcome
from storage_tiers.arena import Arena, ArenaError
from storage_tiers.cupy_gpu import CupyGpu
from storage_tiers.device_batches import Way
from storage_tiers.device_pages import DevicePages
from storage_tiers.gpu import GpuUnavailableError
from storage_tiers.hbm import Bytes, CopyError, CopyPlan, HostPages, KvTensor, PageAccess

logger = logging.getLogger("kvbm.worker")

_THREADS_EACH_WAY = 2
_STOP_TIMEOUT_S = 10.0


class TransferError(Exception):
    """A job cannot be done; its bytes must not be used."""


@dataclass(slots=True)
class _Job:
    number: int
    is_load: bool
    pages: GPULoadStoreSpec
    slots: ArenaSlots
    arena: Arena | None  # the one the slots are in; None if it is not mapped here
    after: object  # the fence of the pages at its submission
    submitted_at: float

    @property
    def what(self) -> str:
        return "load" if self.is_load else "store"


class KvbmWorker(OffloadingWorker):
    """Thread-safe as vLLM uses it: submit, poll and wait on one thread."""

    def __init__(
        self,
        pages: PageAccess,
        *,
        socket_path: str,
        hello: Callable[[], Hello],
        rank: int,
        blocks_per_chunk: int,
        load_deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages = pages
        self._rank = rank
        self._blocks_per_chunk = blocks_per_chunk
        self._load_deadline_s = load_deadline_s
        self._clock = clock
        self._changed = threading.Condition()
        self._loads: deque[_Job] = deque()
        self._stores = deque[_Job]() if pages.concurrent else self._loads
        self._unfinished: set[int] = set()
        self._results: list[TransferResult] = []
        self._failed: list[_Job] = []
        self._arena: Arena | None = None
        self._connection = 0
        self._session: tuple[bytes, int] | None = None  # (epoch, number) that stores may use
        self._storing = 0  # stores that are being copied right now
        self._stopping = False
        queues = (self._loads, self._stores) * _THREADS_EACH_WAY
        self._threads = [
            threading.Thread(target=self._run, args=(queue,), name="kvbm-copy", daemon=True)
            for queue in (queues if pages.concurrent else queues[:1])
        ]
        for thread in self._threads:
            thread.start()
        self._link = Link(socket_path, hello, self)
        self._link.start()

    # -- vLLM's side ---------------------------------------------------------------------

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        assert isinstance(dst_spec, ArenaSlots)
        self._submit(job_id, src_spec, dst_spec, is_load=False)
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        # `expedited` is vLLM 0.33's; such loads are switched off by the connector.
        assert isinstance(src_spec, ArenaSlots)
        self._submit(job_id, dst_spec, src_spec, is_load=True)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Ended jobs. All say success, because vLLM asserts it; see `take_failed`."""
        with self._changed:
            results, self._results = self._results, []
            return results

    def take_failed(self) -> tuple[set[str], set[int]]:
        """Requests whose load failed and transfers whose store failed, since the last call.

        Call right after `get_finished`, with no poll between: a failure is listed at the latest
        together with its result.
        """
        with self._changed:
            failed, self._failed = self._failed, []
        loads = {job.slots.request for job in failed if job.is_load}
        return loads, {job.slots.transfer for job in failed if not job.is_load}

    def wait(self, job_ids: set[int]) -> None:
        """Until these jobs have ended; bounded by the copies queued before them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished & job_ids or self._stopping)

    def shutdown(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        end = self._clock() + _STOP_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, end - self._clock()))
        self._link.close()
        if not any(thread.is_alive() for thread in self._threads):
            self._pages.close()

    # -- the link's thread ---------------------------------------------------------------

    def connected(self, connection: int, welcome: Welcome, arena_fd: int | None) -> None:
        if arena_fd is None:
            logger.error("kvbm-daemon sent no arena; serving without it")
            return
        try:
            arena = Arena.attach(arena_fd)
        except (ArenaError, OSError) as error:
            logger.error("cannot map the daemon's arena (%s); serving without it", error)
            return
        self._pages.attach(arena.array(0, arena.capacity_bytes))
        with self._changed:
            # Jobs hold on to the arena they were submitted with, so a load that is queued while
            # the daemon restarts still finds its bytes.
            self._arena = arena
            self._connection = connection
            self._session = (welcome.epoch, welcome.session)

    def received(self, message: FromDaemon) -> None:
        if isinstance(message, Fence):
            self._end_session()
            self._link.send(self._connection, Fenced())

    def disconnected(self) -> None:
        self._end_session()

    def _end_session(self) -> None:
        with self._changed:
            self._session = None
            self._changed.wait_for(lambda: not self._storing)

    # -- the copy thread -----------------------------------------------------------------

    def _submit(
        self, number: int, pages: GPULoadStoreSpec, slots: ArenaSlots, *, is_load: bool
    ) -> None:
        after = self._pages.fence()
        with self._changed:
            arena = self._arena
            if arena is not None and arena.epoch != slots.epoch:
                arena = None
            job = _Job(number, is_load, pages, slots, arena, after, self._clock())
            (self._loads if is_load else self._stores).append(job)
            self._unfinished.add(number)
            self._changed.notify_all()

    def _run(self, queue: deque[_Job]) -> None:
        leave_the_models_core()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: queue or self._stopping)
                if self._stopping:
                    return
                job = queue.popleft()
            copied, seconds, failed = 0, 0.0, True
            try:
                start = time.perf_counter()
                copied = self._load(job) if job.is_load else self._store(job)
                seconds = time.perf_counter() - start
                failed = False
            except (TransferError, CopyError) as error:
                logger.warning("%s of request %s failed: %s", job.what, job.slots.request, error)
            except Exception:
                logger.exception("%s of request %s failed", job.what, job.slots.request)
            finally:
                with self._changed:
                    if failed:
                        self._failed.append(job)
                    self._results.append(TransferResult(job.number, True, copied, seconds))
                    self._unfinished.discard(job.number)
                    self._changed.notify_all()

    def _load(self, job: _Job) -> int:
        waited_s = self._clock() - job.submitted_at
        if waited_s > self._load_deadline_s:
            raise TransferError(f"it waited {waited_s:.1f} s, longer than its deadline")
        arena = _arena_of(job)
        self._check_generations(job, arena)
        copied = self._pages.scatter(self._plans(job, arena), job.after)
        self._check_generations(job, arena)
        return copied

    def _store(self, job: _Job) -> int:
        with self._changed:
            if self._session != (job.slots.epoch, job.slots.session):
                raise TransferError("the session that leased its slots has ended")
            self._storing += 1
        try:
            arena = _arena_of(job)
            self._check_generations(job, arena)
            return self._pages.gather(self._plans(job, arena), job.after)
        finally:
            with self._changed:
                self._storing -= 1
                self._changed.notify_all()

    def _check_generations(self, job: _Job, arena: Arena) -> None:
        found = arena.generations(job.slots.offsets)
        expected = np.asarray(job.slots.generations, dtype=np.uint64)
        if found.shape != expected.shape or not np.array_equal(found, expected):
            raise TransferError("a slot has changed hands")

    def _plans(self, job: _Job, arena: Arena) -> list[CopyPlan]:
        """Match the job's blocks with its slots, group by group."""
        sizes, firsts = job.pages.group_sizes, job.pages.block_indices
        blocks = job.pages.block_ids.tolist()
        plans: list[CopyPlan] = []
        slot = at = 0
        for group, (count, first_block) in enumerate(zip(sizes, firsts, strict=True)):
            end = at + count
            first = first_block % self._blocks_per_chunk
            while at < end:
                if slot >= len(job.slots.groups) or job.slots.groups[slot] != group:
                    raise TransferError("its blocks and slots do not match")
                take = min(self._blocks_per_chunk - first, end - at)
                stripe = self._stripe(job.slots, slot, arena)
                plans.append(CopyPlan(group, blocks[at : at + take], first, stripe))
                at, slot, first = at + take, slot + 1, 0
        if slot != len(job.slots.groups):
            raise TransferError("its blocks and slots do not match")
        return plans

    def _stripe(self, slots: ArenaSlots, index: int, arena: Arena) -> Bytes:
        group = slots.groups[index]
        start = slots.rank_offsets[group][self._rank]
        length = self._pages.block_bytes(group) * self._blocks_per_chunk
        if start + length > slots.lengths[group]:
            raise TransferError("this rank's stripe does not fit the slot")
        return arena.array(slots.offsets[index] + start, length)


def _arena_of(job: _Job) -> Arena:
    if job.arena is None:
        raise TransferError("its slots are not in the arena of the running daemon")
    return job.arena


def pages_of(caches: CanonicalKVCaches, way: Way | None = None) -> PageAccess:
    """Access to vLLM's KV tensors, wherever they are; `way`: a GPU's, if not by measuring.

    ValueError for a kind of device that is not supported or more than one device;
    GpuUnavailableError if a GPU cannot be reached, for example because CuPy is missing.
    """
    tensors = [cache.tensor for cache in caches.tensors]
    groups: Sequence[Sequence[int]] = [
        list(dict.fromkeys(ref.tensor_idx for ref in refs)) for refs in caches.group_data_refs
    ]
    [device, *others] = sorted({tensor.device for tensor in tensors}, key=str)
    if others or device.type not in ("cpu", "cuda"):
        found = ", ".join(map(str, (device, *others)))
        raise ValueError(f"KV tensors are on {found}: they must be on one CUDA device or the CPU")
    if device.type == "cpu":
        return HostPages([tensor.numpy().view(np.uint8) for tensor in tensors], groups)
    return _on_gpu(CupyGpu(device.index), tensors, groups, way)


def _on_gpu(
    gpu: CupyGpu,
    tensors: Sequence[torch.Tensor],
    groups: Sequence[Sequence[int]],
    way: Way | None,
) -> DevicePages:
    """Access to (blocks, page bytes) tensors of one-byte elements in this GPU's memory."""
    for tensor in tensors:
        if tensor.ndim != 2 or tensor.element_size() != 1 or tensor.stride(1) != 1:
            raise ValueError("KV tensors must be (blocks, page bytes) of contiguous bytes")
        if not gpu.owns(tensor.data_ptr()):
            raise GpuUnavailableError(f"KV tensors on {tensor.device} are not this GPU's memory")
    places = [
        KvTensor(each.data_ptr(), each.shape[0], each.shape[1], each.stride(0)) for each in tensors
    ]
    device = tensors[0].device

    def engine_stream() -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)

    ways = None if way is None else (way, way)
    return DevicePages(gpu, places, groups, engine_stream=engine_stream, owner=tensors, ways=ways)
