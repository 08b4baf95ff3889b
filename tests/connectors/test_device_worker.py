"""The worker half over a GPU's pages: order against the engine's stream, both ways at once, and
what a GPU that fails costs. The GPU is of NumPy arrays.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from connectors.vllm import worker_side
from connectors.vllm.worker_side import KvbmWorker
from storage_tiers.arena import Slot
from storage_tiers.device_batches import Way
from storage_tiers.device_pages import DevicePages
from storage_tiers.gpu import GpuUnavailableError
from storage_tiers.hbm import CopyPlan, KvTensor, address_of
from tests.connectors.copies import BLOCKS, WAIT_S, Background, Daemon, describe, ended, no_hello
from tests.storage_tiers.numpy_gpu import NumpyGpu

PAGE = 64
LAYERS = 20  # enough pages in a block for a kernel


class Engine:
    """A worker whose pages are in a GPU, and the engine's own stream there."""

    def __init__(self, folder: Path) -> None:
        self.daemon = Daemon()
        self.gpu = NumpyGpu()
        self.stream = self.gpu.stream()
        self.kv = np.zeros((LAYERS, BLOCKS, PAGE), dtype=np.uint8)
        self.gpu.own(self.kv)
        places = [KvTensor(address_of(layer), BLOCKS, PAGE, PAGE) for layer in self.kv]
        self.pages = DevicePages(
            self.gpu,
            places,
            [list(range(LAYERS))],
            engine_stream=lambda: self.stream,
            ways=(Way.STAGED, Way.STAGED),
            staging_bytes=8 * LAYERS * PAGE,
        )
        self.worker = KvbmWorker(
            self.pages,
            socket_path=str(folder / "nowhere"),
            hello=no_hello,
            rank=0,
            blocks_per_chunk=1,
            load_deadline_s=10.0,
        )
        self.daemon.greet(self.worker)

    def slots(self, count: int) -> list[Slot]:
        return self.daemon.slots(count, LAYERS * PAGE)

    def compute(self, blocks: list[int], value: int) -> None:
        """The engine queues a step that writes these blocks."""

        def work() -> None:
            self.kv[:, blocks] = value

        self.gpu.run(self.stream, work)

    def store(self, number: int, slots: list[Slot], blocks: list[int]) -> None:
        spec = describe(self.daemon, [slots], transfer=100 + number, request=f"r{number}")
        self.worker.submit_store(number, GPULoadStoreSpec(blocks, [len(blocks)], [0]), spec)

    def load(self, number: int, slots: list[Slot], blocks: list[int]) -> None:
        spec = describe(self.daemon, [slots], transfer=100 + number, request=f"r{number}")
        self.worker.submit_load(number, spec, GPULoadStoreSpec(blocks, [len(blocks)], [0]))

    def held(self, slot: Slot) -> set[int]:
        return set(self.daemon.read(slot))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.worker.shutdown()
    assert not any(thread.is_alive() for thread in engine.worker._threads)
    assert not engine.gpu.pinned, "the arena is given back"
    engine.daemon.arena.close()


def test_what_a_step_computes_is_stored_and_loaded_in_the_order_it_was_asked_for(
    engine: Engine,
) -> None:
    slots = engine.slots(BLOCKS)
    for number in range(BLOCKS):
        engine.compute([number], number + 1)
        engine.store(number, [slots[number]], [number])
    ended(engine.worker, *range(BLOCKS))
    assert [engine.held(slot) for slot in slots] == [{number + 1} for number in range(BLOCKS)]
    # vLLM clears the blocks of a load on its stream before it asks for the load.
    order = np.random.default_rng(0).permutation(BLOCKS).tolist()
    for number, block in enumerate(order):
        engine.compute([block], 0)
        engine.load(100 + number, [slots[number]], [block])
    ended(engine.worker, *range(100, 100 + BLOCKS))
    assert (engine.kv[:, order] == np.arange(1, BLOCKS + 1)[None, :, None]).all()
    assert engine.worker.take_failed() == (set(), set())


def test_a_load_and_another_store_pass_a_store_that_waits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, load, other = engine.slots(3)
    engine.daemon.arena.view(load.offset, load.length)[:] = b"\7" * load.length
    entered, opened = threading.Event(), threading.Event()
    gather = engine.pages.gather

    def slow(plans: list[CopyPlan], after: object = None) -> int:
        is_first = not entered.is_set()
        entered.set()
        assert not is_first or opened.wait(WAIT_S)
        return gather(plans, after)

    monkeypatch.setattr(engine.pages, "gather", slow)
    engine.store(1, [store], [0])
    assert entered.wait(WAIT_S)
    engine.load(2, [load], [1])
    assert ended(engine.worker, 2)[2].transfer_size == LAYERS * PAGE
    assert (engine.kv[:, 1] == 7).all()
    engine.compute([2], 6)
    engine.store(3, [other], [2])
    ended(engine.worker, 3)
    assert engine.held(other) == {6}
    fence = Background(engine.worker.disconnected)
    assert not fence.ended(0.1), "the end of the session waits for the store"
    opened.set()
    assert fence.ended()
    ended(engine.worker, 1)
    assert engine.worker.take_failed() == (set(), set())


@pytest.mark.parametrize("call", ["mark", "wait", "copy", "copy_pieces", "descriptors"])
@pytest.mark.parametrize("is_load", [True, False], ids=["load", "store"])
def test_a_failed_call_is_a_failed_job_and_the_next_one_is_done(
    engine: Engine, call: str, is_load: bool
) -> None:
    slots = engine.slots(2)
    engine.compute([0, 1], 9)
    submit = engine.load if is_load else engine.store
    engine.gpu.fails = call
    submit(1, slots[:1], [0])
    assert ended(engine.worker, 1)[1].transfer_size == 0
    assert engine.worker.take_failed() == (({"r1"}, set()) if is_load else (set(), {101}))
    submit(2, slots[1:], [1])
    assert ended(engine.worker, 2)[2].transfer_size == LAYERS * PAGE
    assert engine.worker.take_failed() == (set(), set())


def test_a_lost_gpu_fails_every_job_and_raises_nothing(engine: Engine) -> None:
    [slot] = engine.slots(1)
    wild = np.array([[8, 16]], dtype=np.uint64)
    engine.gpu.copy_pieces(engine.stream, wild, 16)
    for number in range(4):
        (engine.load if number % 2 else engine.store)(number, [slot], [0])
    results = ended(engine.worker, 0, 1, 2, 3)
    assert all(result.success for result in results.values()), "vLLM asserts it"
    assert engine.worker.take_failed() == ({"r1", "r3"}, {100, 102})
    engine.gpu._sticky = ""  # so that the fixture finds all given back


def test_a_new_daemon_s_arena_takes_the_place_of_the_old_one(engine: Engine) -> None:
    [slot] = engine.slots(1)
    engine.store(0, [slot], [3])
    ended(engine.worker, 0)
    assert Background(lambda: until(lambda: engine.gpu.pinned)).ended()
    old = set(engine.gpu.pinned)
    fresh = Daemon(session=8)
    engine.worker.disconnected()
    fresh.greet(engine.worker, connection=2)
    earlier, engine.daemon = engine.daemon, fresh
    [slot] = engine.slots(1)
    engine.compute([3], 5)
    engine.store(1, [slot], [3])
    ended(engine.worker, 1)
    assert engine.held(slot) == {5} and engine.worker.take_failed() == (set(), set())
    assert Background(lambda: until(lambda: set(engine.gpu.pinned) - old)).ended()
    assert Background(lambda: until(lambda: not old & set(engine.gpu.pinned))).ended()
    earlier.arena.close()


def until(true: Any) -> None:
    pause = threading.Event()
    while not true():
        pause.wait(0.001)


# -- which access vLLM's tensors get -----------------------------------------------------


def caches(*devices: str, **changes: Any) -> Any:
    """vLLM's description of KV in a memory that this machine does not have."""

    def tensor(device: str) -> Any:
        found = {
            "device": torch.device(device),
            "ndim": 2,
            "shape": (4, 96),
            "element_size": lambda: 1,
            "stride": lambda axis: (128, 1)[axis],
            "data_ptr": lambda: 1 << 40,
        }
        return SimpleNamespace(**(found | changes))

    tensors = [SimpleNamespace(tensor=tensor(device)) for device in devices]
    refs = [[SimpleNamespace(tensor_idx=index) for index in range(len(tensors))]]
    return SimpleNamespace(tensors=tensors, group_data_refs=refs)


class OtherGpu(NumpyGpu):
    """In `CupyGpu`'s place."""

    def __init__(self, device: int) -> None:
        super().__init__(has_kernel=False)
        self.device = device
        self.is_ours = True

    def owns(self, address: int) -> bool:
        return self.is_ours and address == 1 << 40


def test_cuda_tensors_get_their_gpus_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[OtherGpu] = []

    def gpu(device: int) -> OtherGpu:
        made.append(OtherGpu(device))
        return made[-1]

    monkeypatch.setattr(worker_side, "CupyGpu", gpu)
    pages = worker_side.pages_of(caches("cuda:1", "cuda:1"))
    assert isinstance(pages, DevicePages) and made[0].device == 1
    assert pages.block_bytes(0) == 192 and pages._page_bytes(0) == 96
    assert pages._ways == [(Way.COPIES, Way.COPIES)], "measured: there is no kernel"
    told = worker_side.pages_of(caches("cuda:1"), Way.DIRECT)
    assert isinstance(told, DevicePages) and told._ways == [(Way.DIRECT, Way.DIRECT)]


def test_tensors_of_another_device_than_they_say_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OtherGpu, "owns", lambda gpu, address: False)
    monkeypatch.setattr(worker_side, "CupyGpu", OtherGpu)
    with pytest.raises(GpuUnavailableError, match="not this GPU's memory"):
        worker_side.pages_of(caches("cuda:0"))


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cpu", "cuda:0"), ("xpu:0",)])
def test_other_devices_and_mixtures_are_refused_by_name(devices: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=devices[-1]):
        worker_side.pages_of(caches(*devices))


def test_tensors_that_are_not_rows_of_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_side, "CupyGpu", OtherGpu)
    for changes in ({"ndim": 3}, {"element_size": lambda: 2}, {"stride": lambda axis: 2}):
        with pytest.raises(ValueError, match="contiguous bytes"):
            worker_side.pages_of(caches("cuda:0", **changes))


def test_cuda_tensors_without_cupy_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(GpuUnavailableError, match=r"cuda:0.*install kvbm-daemon\[cuda\]"):
        worker_side.pages_of(caches("cuda:0"))
