"""What only a real GPU can show: order against its streams, copies beside its work, its errors."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import numpy as np
import pytest

from storage_tiers.arena import Arena
from storage_tiers.cupy_gpu import CupyGpu
from storage_tiers.device_batches import Way
from storage_tiers.device_pages import DevicePages
from storage_tiers.hbm import Bytes, CopyError, CopyPlan, KvTensor, address_of
from tests.storage_tiers.page_rigs import gpu_or_skip, until_pinned

pytestmark = pytest.mark.gpu

BLOCKS, LAYERS, PAGE = 64, 8, 16 << 10
STRIPE = BLOCKS * LAYERS * PAGE
PROCESS_TIMEOUT_S = 120.0
SPIN = """
extern "C" __global__ void spin(long long cycles) {
  long long end = clock64() + cycles;
  while (clock64() < end) {}
}
"""
ONE_SECOND = 1_500_000_000  # cycles, about


class Engine:
    """KV in the GPU's memory, layer by layer, and a stream of its own."""

    def __init__(self, gpu: CupyGpu, way: Way) -> None:
        import cupy

        self.cupy: Any = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.kv = cupy.zeros((LAYERS, BLOCKS, PAGE), dtype=cupy.uint8)
        places = [KvTensor(layer.data.ptr, BLOCKS, PAGE, PAGE) for layer in self.kv]
        self.pages = DevicePages(
            gpu,
            places,
            [list(range(LAYERS))],
            engine_stream=lambda: self.stream.ptr,
            owner=self.kv,
            ways=(way, way),
        )
        cupy.cuda.Device(0).synchronize()

    def compute(self, value: int, cycles: int = ONE_SECOND) -> None:
        """A step that takes a while and then writes all blocks."""
        with self.stream:
            self.cupy.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(cycles),))
            self.kv[:] = value


@pytest.fixture
def gpu() -> CupyGpu:
    return gpu_or_skip()


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def engine(request: pytest.FixtureRequest, gpu: CupyGpu) -> Engine:
    return Engine(gpu, request.param)


def plan(memory: Bytes) -> list[CopyPlan]:
    return [CopyPlan(0, range(BLOCKS), 0, memory)]


def test_a_store_takes_what_the_engine_had_queued_before(engine: Engine) -> None:
    memory = np.zeros(STRIPE, dtype=np.uint8)
    engine.pages.attach(memory)
    engine.compute(7)
    engine.pages.gather(plan(memory), engine.pages.fence())
    assert (memory == 7).all()
    engine.pages.close()


def test_a_load_overwrites_what_the_engine_had_queued_before(engine: Engine) -> None:
    memory = np.full(STRIPE, 9, dtype=np.uint8)
    engine.pages.attach(memory)
    engine.compute(0)
    engine.pages.scatter(plan(memory), engine.pages.fence())
    assert bool((engine.kv == 9).all())
    engine.pages.close()


def test_a_copy_runs_beside_a_step_that_was_queued_after_it(engine: Engine) -> None:
    """It ends while the step still runs: neither waits for the other."""
    memory = np.zeros(STRIPE, dtype=np.uint8)
    engine.pages.attach(memory)
    # Before: to lock memory, also for descriptors, may wait for all that runs.
    until_pinned(engine.pages)
    engine.pages.gather(plan(memory))
    engine.compute(3, cycles=1)
    fence = engine.pages.fence()
    with engine.stream:
        engine.cupy.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(5 * ONE_SECOND),))
    step = engine.stream.record()
    engine.pages.gather(plan(memory), fence)
    assert not step.done, "the copy waited for the step"
    assert (memory == 3).all()
    step.synchronize()
    engine.pages.close()


def test_pinning_goes_on_beside_a_capture_and_leaves_it_whole(gpu: CupyGpu) -> None:
    """Engines capture graphs at their start, and may later."""
    engine = Engine(gpu, Way.STAGED)
    memory = np.zeros(STRIPE, dtype=np.uint8)
    before = engine.pages.fence()  # the engine runs: memory is pinned at once
    with engine.stream:
        engine.kv[:] = 1  # what is compiled and loaded first must not be captured
        engine.stream.begin_capture(mode=engine.cupy.cuda.runtime.streamCaptureModeGlobal)
        engine.kv[:] = 5
        engine.pages.attach(memory)
        until = threading.Thread(target=lambda: gpu.finish(before))
        until.start()
        assert engine.pages._memory is not None
        engine.pages._memory.wait(PROCESS_TIMEOUT_S)
        until.join()
        graph = engine.stream.end_capture()
    assert engine.pages._memory.is_pinned(np.array([address_of(memory)], np.uint64), STRIPE)
    graph.launch(engine.stream)
    engine.pages.gather(plan(memory), engine.pages.fence())
    assert (memory == 5).all()
    engine.pages.close()


def test_a_refused_call_fails_its_copy_and_the_next_one_is_done(
    gpu: CupyGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(gpu, Way.COPIES)
    memory = np.full(STRIPE, 4, dtype=np.uint8)
    engine.pages.attach(memory)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_batch", None)
        patch.setattr("storage_tiers.cupy_gpu._TO_DEVICE", 99)  # no kind of copy
        with pytest.raises(CopyError, match="InvalidMemcpyDirection"):
            engine.pages.scatter(plan(memory), engine.pages.fence())
    engine.pages.scatter(plan(memory), engine.pages.fence())
    assert bool((engine.kv == 4).all())
    engine.pages.close()


def in_a_process(body: Any, *arguments: Any) -> None:
    """An illegal access ends CUDA for its whole process; two processes share an arena."""
    process = multiprocessing.get_context("spawn").Process(target=body, args=arguments)
    process.start()
    process.join(PROCESS_TIMEOUT_S)
    assert process.exitcode == 0


def test_an_illegal_access_fails_copies_and_raises_nothing_else(gpu: CupyGpu) -> None:
    in_a_process(_lose_the_gpu)


def _lose_the_gpu() -> None:
    gpu = CupyGpu(0)
    engine = Engine(gpu, Way.STAGED)
    memory = np.zeros(STRIPE, dtype=np.uint8)
    wild = gpu.descriptors(1)
    wild[:] = 16, 32
    gpu.copy_pieces(gpu.stream(), wild, 16)
    for copy in (engine.pages.gather, engine.pages.scatter, engine.pages.gather):
        with pytest.raises(CopyError):
            copy(plan(memory), engine.pages.fence())


def test_two_processes_share_an_arena(gpu: CupyGpu) -> None:
    """What one engine stores the other loads; both have the memory locked."""
    arena = Arena.create(STRIPE)
    ours = Engine(gpu, Way.STAGED)
    ours.pages.attach(arena.array(0, STRIPE))
    ours.compute(6, cycles=1)
    ours.pages.gather(plan(arena.array(0, STRIPE)), ours.pages.fence())
    path = f"/proc/{os.getpid()}/fd/{arena.fd}"
    in_a_process(_load_and_answer, path)
    ours.pages.scatter(plan(arena.array(0, STRIPE)), ours.pages.fence())
    assert bool((ours.kv == 8).all())
    ours.pages.close()


def _load_and_answer(path: str) -> None:
    engine = Engine(CupyGpu(0), Way.DIRECT)
    memory = Arena.attach(os.open(path, os.O_RDWR)).array(0, STRIPE)
    engine.pages.attach(memory)
    engine.pages.scatter(plan(memory), engine.pages.fence())
    assert bool((engine.kv == 6).all())
    engine.compute(8, cycles=1)
    engine.pages.gather(plan(memory), engine.pages.fence())
    engine.pages.close()
