"""What copies of a GPU's pages wait for, how they are cut, and what becomes of a failed call."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from storage_tiers.device_batches import Way
from storage_tiers.device_copies import Direction, measured_ways
from storage_tiers.device_pages import DevicePages
from storage_tiers.gpu import Copies, GpuUnavailableError
from storage_tiers.hbm import Bytes, CopyError, CopyPlan, KvTensor, address_of
from storage_tiers.pinned import PinnedMemory
from tests.storage_tiers.numpy_gpu import Costs, NumpyGpu
from tests.storage_tiers.page_rigs import (
    BLOCKS,
    EXTENT_BYTES,
    STAGING_BYTES,
    WAIT_S,
    NumpyRig,
    layers_apart,
)

pytestmark = pytest.mark.usefixtures("short_windows")

LAYOUT = layers_apart(4, 1024)
STILL_THERE_S = 0.1  # long enough for what must not happen to happen
STRIPE = BLOCKS * LAYOUT.block_bytes(0)  # ten of the rig's buffers


class Scene:
    """All blocks of an engine, and a slot that takes them."""

    def __init__(self, way: Way = Way.STAGED, seed: int = 0) -> None:
        self.rig = NumpyRig(way, seed)
        self.gpu = self.rig.gpu
        self.engine = self.rig.place(LAYOUT.random(1))
        self.memory = aligned(STRIPE, EXTENT_BYTES)
        self.pages = self.rig.pages(LAYOUT, self.engine)
        self.attach(self.memory)
        self.gpu.calls.clear()

    def attach(self, memory: Bytes) -> None:
        self.pages.attach(memory)
        self.rig.settle(self.pages)
        self.gpu.drain()

    def plan(self, blocks: int = BLOCKS) -> list[CopyPlan]:
        return [CopyPlan(0, range(blocks), 0, self.memory)]

    def gather(self, after: object = None) -> int:
        return self.pages.gather(self.plan(), after)

    def slot(self) -> Bytes:
        """By block, layer and byte."""
        return self.memory.reshape(BLOCKS, 4, 1024)

    def layers(self) -> Bytes:
        """The same of the engine."""
        return np.stack([layer.reshape(BLOCKS, 1024) for layer in self.engine], axis=1)


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def way(request: pytest.FixtureRequest) -> Way:
    return Way(request.param)


# -- order ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_store_takes_what_the_engine_had_queued_before(way: Way, seed: int) -> None:
    scene = Scene(way, seed)
    for number, layer in enumerate(scene.engine):
        scene.gpu.run(scene.rig.engine, partial(layer.fill, 10 + number))
    fence = scene.pages.fence()
    scene.gather(fence)
    assert (scene.slot() == np.arange(10, 14)[None, :, None]).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_load_overwrites_what_the_engine_had_queued_before(way: Way, seed: int) -> None:
    """vLLM clears blocks on its own stream; a load that came before that would be lost."""
    scene = Scene(way, seed)
    scene.memory[:] = 7
    for layer in scene.engine:
        scene.gpu.run(scene.rig.engine, partial(layer.fill, 0))
    scene.pages.scatter(scene.plan(), scene.pages.fence())
    assert (scene.layers() == 7).all()


def test_a_batchs_buffer_is_its_own_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's batch may not come between its kernel and its copy."""
    scene = Scene(Way.STAGED)
    lanes = scene.pages._out._lanes
    monkeypatch.setattr(scene.pages._out, "_turns", itertools.repeat(lanes[0]))
    between = threading.Event()
    copy_pieces, threads = scene.gpu.copy_pieces, set[int]()

    def slow(*arguments: Any) -> None:
        copy_pieces(*arguments)
        threads.add(threading.get_ident())
        if len(threads) == 2:
            between.set()
        between.wait(STILL_THERE_S)

    monkeypatch.setattr(scene.gpu, "copy_pieces", slow)
    blocks = [list(range(10)), list(range(10, 20))]
    slots = [np.zeros(10 * 4096, dtype=np.uint8) for _ in blocks]
    copies = [
        threading.Thread(target=scene.pages.gather, args=([CopyPlan(0, own, 0, slot)],))
        for own, slot in zip(blocks, slots, strict=True)
    ]
    for each in copies:
        each.start()
    for each in copies:
        each.join(WAIT_S)
    found = np.concatenate(slots).reshape(20, 4, 1024)
    np.testing.assert_array_equal(found, scene.layers()[:20])


def test_a_copy_does_not_wait_for_what_the_engine_queues_after(way: Way) -> None:
    scene = Scene(way)
    fence = scene.pages.fence()
    later = scene.gpu.stream()
    # The engine waits for something that is queued only when the copy is done.
    gate = scene.gpu.mark(later)
    scene.gpu.hold(later)
    scene.gpu.wait(scene.rig.engine, gate)
    scene.gather(fence)
    np.testing.assert_array_equal(scene.slot(), scene.layers())


def test_transfers_of_several_threads_do_not_mix(way: Way) -> None:
    """Both ways at once, on two threads each, as the worker does it."""
    scene = Scene(way)
    slots = [np.zeros(STRIPE, dtype=np.uint8) for _ in range(4)]
    before = scene.layers()
    half = BLOCKS // 2
    low, high = list(range(half)), list(range(half, BLOCKS))
    slots[2][: STRIPE // 2], slots[3][: STRIPE // 2] = 5, 6
    rounds: list[int] = []

    def run(copy: Callable[..., int], blocks: list[int], slot: Bytes) -> None:
        for number in range(5):
            copy([CopyPlan(0, blocks, 0, slot)], scene.pages.fence())
            rounds.append(number)

    threads = [
        threading.Thread(target=run, args=arguments)
        for arguments in (
            (scene.pages.gather, low, slots[0]),
            (scene.pages.gather, low[::-1], slots[1]),
            (scene.pages.scatter, high[: half // 2], slots[2]),
            (scene.pages.scatter, high[half // 2 :], slots[3]),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(rounds) == sorted(4 * [0, 1, 2, 3, 4])
    found = [slot.reshape(BLOCKS, 4, 1024)[:half] for slot in slots[:2]]
    np.testing.assert_array_equal(found[0], before[:half])
    np.testing.assert_array_equal(found[1], before[:half][::-1])
    after = scene.layers()
    np.testing.assert_array_equal(after[:half], before[:half])
    assert (after[half : half + half // 2] == 5).all() and (after[half + half // 2 :] == 6).all()


# -- ways -------------------------------------------------------------------------------


def test_each_way_is_what_it_says() -> None:
    pages, blocks, batches = BLOCKS * 4, BLOCKS, STRIPE // STAGING_BYTES
    for way, copied, kernels in (
        (Way.COPIES, pages, 0),
        (Way.STAGED, batches, batches),
        (Way.DIRECT, 0, batches),
    ):
        scene = Scene(way)
        assert scene.gather() == blocks * 4096
        assert (scene.gpu.calls["copied"], scene.gpu.calls["copy_pieces"]) == (copied, kernels)
        assert scene.gpu.calls["copied, pinned"] == copied


def test_each_direction_has_its_way() -> None:
    scene = Scene()
    scene.pages._ways = [(Way.COPIES, Way.STAGED)]
    scene.gather()
    assert not scene.gpu.calls["copy_pieces"]
    scene.pages.scatter(scene.plan())
    assert scene.gpu.calls["copy_pieces"]


def test_each_group_has_its_way() -> None:
    scene = Scene()
    pages = scene.rig.pages(replace(LAYOUT, groups=[[0, 1], [2, 3]]), scene.engine)
    pages._ways = [(Way.COPIES, Way.COPIES), (Way.STAGED, Way.STAGED)]
    for copy in (pages.gather, pages.scatter):
        scene.gpu.calls.clear()
        copy([CopyPlan(0, range(BLOCKS), 0, scene.memory)])
        assert not scene.gpu.calls["copy_pieces"]
        copy([CopyPlan(1, range(BLOCKS), 0, scene.memory)])
        assert scene.gpu.calls["copy_pieces"]


def test_a_few_pages_are_copied_one_by_one(way: Way) -> None:
    scene = Scene(way)
    scene.pages.gather(scene.plan(blocks=3))
    assert (scene.gpu.calls["copied"], scene.gpu.calls["copy_pieces"]) == (12, 0)


def test_a_long_transfer_is_queued_a_bounded_way_ahead(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's queues are bounded, and where they end a call would stop every thread of Python."""
    monkeypatch.setattr("storage_tiers.device_copies._BATCHES_AHEAD", 3)
    scene = Scene(way)
    most = 0
    finish = scene.gpu.finish

    def counted(mark: object) -> None:
        nonlocal most
        most = max(most, scene.gpu.waiting())
        finish(mark)

    monkeypatch.setattr(scene.gpu, "finish", counted)
    scene.gather(scene.pages.fence())
    # The fence's mark, a wait for it on each stream, and three steps of each batch.
    assert most <= 1 + 2 + 3 * 3
    np.testing.assert_array_equal(scene.slot(), scene.layers())


@pytest.mark.parametrize(("limit", "batches"), [(40, 2), (3, 1)])
def test_only_so_many_copies_are_queued_ahead(
    limit: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen to a batch here; a batch of more than the limit goes by itself."""
    monkeypatch.setattr("storage_tiers.device_copies._COPIES_AHEAD", limit)
    scene = Scene(Way.COPIES)
    waiting: list[int] = []
    finish = scene.gpu.finish

    def counted(mark: object) -> None:
        waiting.append(scene.gpu.waiting())
        finish(mark)

    monkeypatch.setattr(scene.gpu, "finish", counted)
    scene.gather()
    assert max(waiting) == 2 * batches, "a step of copies and a mark each"
    np.testing.assert_array_equal(scene.slot(), scene.layers())


def test_large_pages_need_no_measuring() -> None:
    gpu = NumpyGpu(costs=Costs(copy_s=1.0))
    both = [Direction(gpu, to_host=to_host, staging_bytes=1 << 16) for to_host in (True, False)]
    gpu.calls.clear()
    assert measured_ways(gpu, both, 512 << 10) == [Way.COPIES] * 2
    assert not gpu.calls


@pytest.mark.parametrize(
    ("kernel", "maps", "kernels"), [(False, True, 0), (True, False, STRIPE // STAGING_BYTES)]
)
def test_what_the_gpu_cannot_do_is_done_another_way(kernel: bool, maps: bool, kernels: int) -> None:
    scene = Scene(Way.DIRECT)
    scene.gpu.has_kernel, scene.gpu.maps_host = kernel, maps
    scene.gather()
    assert scene.gpu.calls["copy_pieces"] == kernels and scene.gpu.calls["copied"]
    np.testing.assert_array_equal(scene.slot(), scene.layers())


def test_the_way_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By page size and direction: the cheapest for the engine of those that are nearly fastest."""
    monkeypatch.setattr("storage_tiers.device_copies.STAGING_BYTES", 1 << 16)

    def chosen(page_bytes: int, **costs: float) -> list[Way]:
        gpu = NumpyGpu(costs=Costs(**costs))
        both = [Direction(gpu, to_host=to_host, staging_bytes=1 << 16) for to_host in (True, False)]
        ways = measured_ways(gpu, both, page_bytes, clock=lambda: gpu.now_s)
        assert not gpu.pinned
        return ways

    bus_s = 1 / 50e9
    assert chosen(1 << 16) == [Way.COPIES] * 2
    assert chosen(1 << 10, copy_s=1e-7, kernel_s=1e-7) == [Way.STAGED] * 2
    assert chosen(1 << 10, copy_s=5e-6, kernel_s=1e-7, bus_s=4 * bus_s) == [Way.DIRECT] * 2
    assert chosen(1 << 10, copy_s=1e-9, kernel_s=1e-9) == [Way.COPIES] * 2


def test_pages_measure_each_groups_size() -> None:
    gpu = NumpyGpu(costs=Costs(copy_s=1e-3))
    engine = np.zeros((4, 1 << 15), dtype=np.uint8)
    gpu.own(engine)
    places = [KvTensor(address_of(engine), 4, 1 << 15, 1 << 15)]
    pages = DevicePages(gpu, places, [[0]], engine_stream=gpu.stream)
    assert gpu.calls["copy_pieces"], "kernels were tried"
    pages.close()
    pages.close()
    assert gpu.calls["free"] == gpu.calls["allocate"] == 5


# -- host memory ------------------------------------------------------------------------


def test_before_the_slots_memory_is_pinned_it_is_copied_all_the_same(way: Way) -> None:
    scene = Scene(way)
    scene.memory = np.zeros(STRIPE, dtype=np.uint8)  # nobody told of this one
    scene.gather()
    np.testing.assert_array_equal(scene.slot(), scene.layers())


@pytest.mark.parametrize("extents", [3, 5])
def test_what_cannot_be_pinned_is_copied_all_the_same(
    way: Way, extents: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Where locked memory ends is in a page: a window's last one, or one in its middle."""
    scene = Scene(way)
    inside = 512
    scene.memory = aligned(STRIPE + inside, EXTENT_BYTES)[inside:]
    locked = extents * EXTENT_BYTES - inside
    scene.gpu.pin_limit = sum(scene.gpu.pinned.values()) + locked
    earlier = scene.pages._memory
    assert earlier is not None
    with earlier.used():  # so that what it holds is not given back meanwhile
        scene.attach(scene.memory)
    assert f"{locked} of {STRIPE} bytes of host memory are locked" in caplog.text
    scene.gather()
    np.testing.assert_array_equal(scene.slot(), scene.layers())
    scene.memory[:] = 3
    scene.pages.scatter(scene.plan())
    assert (scene.layers() == 3).all()


def test_memory_is_given_back_when_its_last_copy_has_ended() -> None:
    scene = Scene()
    first = scene.pages._memory
    assert first is not None and scene.gpu.pinned
    before = dict(scene.gpu.pinned)
    with first.used() as usable:
        assert usable
        other = np.zeros(STRIPE, dtype=np.uint8)
        scene.attach(other)
        first.join(STILL_THERE_S)
        assert scene.gpu.pinned.keys() > before.keys()
    first.join(WAIT_S)
    assert not scene.gpu.pinned.keys() & before.keys()
    with first.used() as usable:
        assert not usable
    scene.gather()  # into the earlier memory
    np.testing.assert_array_equal(scene.slot(), scene.layers())
    scene.pages.close()
    assert not scene.gpu.pinned


def test_memory_stays_pinned_while_a_copy_of_it_is_under_way(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(way)
    memory, before = scene.pages._memory, set(scene.gpu.pinned)
    queued, ending = threading.Event(), threading.Event()
    finish = scene.gpu.finish

    def slow(mark: object) -> None:
        queued.set()
        assert ending.wait(WAIT_S)
        finish(mark)

    monkeypatch.setattr(scene.gpu, "finish", slow)
    copy = threading.Thread(target=scene.gather)
    copy.start()
    assert queued.wait(WAIT_S) and memory is not None
    scene.pages.attach(np.zeros(STRIPE, dtype=np.uint8))
    memory.join(STILL_THERE_S)
    assert before <= set(scene.gpu.pinned)
    ending.set()
    copy.join(WAIT_S)
    memory.join(WAIT_S)
    assert not before & set(scene.gpu.pinned)
    np.testing.assert_array_equal(scene.slot(), scene.layers())
    scene.pages.close()


def test_nothing_is_pinned_before_the_engines_first_transfer() -> None:
    """Until then it captures graphs, and CUDA refuses to pin, and ends the capture, meanwhile."""
    scene = Scene()
    pages = scene.rig.pages(LAYOUT, scene.engine)
    before = set(scene.gpu.pinned)
    memory = np.zeros(STRIPE, dtype=np.uint8)
    pages.attach(memory)
    assert pages._memory is not None
    with pytest.raises(TimeoutError):
        pages._memory.wait(STILL_THERE_S)
    assert set(scene.gpu.pinned) == before
    pages.fence()
    pages._memory.wait(WAIT_S)
    assert sum(scene.gpu.pinned[at] for at in set(scene.gpu.pinned) - before) == STRIPE
    earlier = pages._memory
    pages.attach(np.zeros(STRIPE, dtype=np.uint8))  # a new daemon's
    pages._memory.wait(WAIT_S)
    pages.close()
    earlier.join(WAIT_S)
    assert set(scene.gpu.pinned) == before


def test_memory_stays_mapped_as_long_as_it_is_pinned() -> None:
    gpu, memory = NumpyGpu(), np.zeros(STRIPE, dtype=np.uint8)
    mapped = weakref.ref(memory)
    pinned = PinnedMemory(gpu, memory)
    pinned.begin()
    pinned.wait(WAIT_S)
    del memory
    assert mapped() is not None
    pinned.close()
    pinned.join(WAIT_S)
    assert not gpu.pinned


def test_the_kernel_makes_an_extents_pages_before_it_is_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, memory = NumpyGpu(), aligned(1000, 400)
    made: list[tuple[int, int]] = []

    def populate(address: int, size: int, is_ended: Callable[[], bool]) -> None:
        assert not is_ended() and len(made) == len(gpu.pinned)
        made.append((address, size))
        raise OSError("no such advice")  # older kernels; then CUDA makes them

    monkeypatch.setattr("storage_tiers.pinned.populate", populate)
    pinned = PinnedMemory(gpu, memory, extent_bytes=400)
    pinned.begin()
    pinned.wait(WAIT_S)
    assert made == sorted(gpu.pinned.items()) and len(made) == 3
    pinned.close()
    pinned.join(WAIT_S)


def test_memory_that_was_never_pinned_is_closed() -> None:
    scene = Scene()
    pages = scene.rig.pages(LAYOUT, scene.engine)
    pages.attach(np.zeros(STRIPE, dtype=np.uint8))
    memory = pages._memory
    pages.close()
    assert memory is not None and not memory._thread.is_alive()


def test_registrations_end_at_multiples_of_an_extent() -> None:
    """Within a page they would share it, wherever the memory begins."""
    gpu, whole = NumpyGpu(), aligned(1000, 400)
    pinned = PinnedMemory(gpu, whole[30:930], extent_bytes=400)
    pinned.begin()
    pinned.wait(WAIT_S)
    start = address_of(whole)
    ends = {at + size for at, size in gpu.pinned.items()} - {start + 930}
    assert len(ends) == 2 and not any(end % 400 for end in ends)
    assert sum(gpu.pinned.values()) == 900
    pinned.close()
    pinned.join(WAIT_S)
    assert not gpu.pinned


def test_copies_end_where_registrations_do() -> None:
    gpu, memory = NumpyGpu(), aligned(1000, 100)
    pinned = PinnedMemory(gpu, memory, extent_bytes=100)
    start = address_of(memory)

    def split(at: int, size: int) -> list[tuple[int, int, int]]:
        arrays = (np.array([each], dtype=np.uint64) for each in (5000, start + at, size))
        device, host, sizes = pinned.split(Copies(*arrays))
        return sorted(zip(device.tolist(), (host - start).tolist(), sizes.tolist(), strict=True))

    assert split(0, 100) == [(5000, 0, 100)]
    assert split(30, 71) == [(5000, 30, 70), (5070, 100, 1)]
    assert split(99, 202) == [
        (5000, 99, 1),
        (5001, 100, 100),
        (5101, 200, 100),
        (5201, 300, 1),
    ]
    pinned.close()
    pinned.join(WAIT_S)


# -- failures ---------------------------------------------------------------------------

CALLS = ["mark", "wait", "finish", "copy", "copy_pieces", "descriptors"]


@pytest.mark.parametrize("later", [0, 1, 2])
@pytest.mark.parametrize("is_load", [False, True], ids=["store", "load"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_fails_its_copy_and_nothing_goes_on_behind_it(
    call: str, is_load: bool, later: int
) -> None:
    """What was queued before has ended, because the slots and blocks are given away now."""
    scene = Scene()
    copy = scene.pages.scatter if is_load else scene.pages.gather
    fence = scene.pages.fence()
    scene.gpu.fails = call
    # Of these there are two: one on each stream.
    scene.gpu.fails_after = later % 2 if call in ("wait", "finish") else later
    with pytest.raises(CopyError, match=f"{call} was refused"):
        copy(scene.plan(), fence)
    at_failure = scene.memory.copy(), scene.layers()
    scene.gpu.drain()
    np.testing.assert_array_equal(scene.memory, at_failure[0])
    np.testing.assert_array_equal(scene.layers(), at_failure[1])
    assert copy(scene.plan(), scene.pages.fence()) == STRIPE
    np.testing.assert_array_equal(scene.slot(), scene.layers())


def test_a_failure_is_told_when_both_streams_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    monkeypatch.setattr(scene.gpu._random, "choice", lambda ready: ready[0])  # one, then the other
    scene.gpu.fails, scene.gpu.fails_after = "copy", 2
    with pytest.raises(CopyError):
        scene.gather()
    before = scene.memory.copy()
    scene.gpu.drain()
    np.testing.assert_array_equal(scene.memory, before)


def test_whatever_ends_a_copy_nothing_goes_on_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    queue = Direction._queue

    def fail_in_the_middle(direction: Direction, *arguments: Any) -> Any:
        if scene.gpu.calls["copy_pieces"] == 3:
            raise MemoryError
        return queue(direction, *arguments)

    monkeypatch.setattr(Direction, "_queue", fail_in_the_middle)
    with pytest.raises(MemoryError):
        scene.gather(scene.pages.fence())
    before = scene.memory.copy()
    scene.gpu.drain()
    np.testing.assert_array_equal(scene.memory, before)


def test_a_fence_that_fails_fails_the_copy_and_not_the_engine() -> None:
    scene = Scene()
    scene.gpu.fails = "mark"
    fence = scene.pages.fence()
    with pytest.raises(CopyError, match="stream could not be marked"):
        scene.gather(fence)
    assert not scene.memory.any()


def test_after_an_illegal_access_every_copy_fails_at_once(way: Way) -> None:
    scene = Scene(way)
    wild = np.array([[8, 16]], dtype=np.uint64)
    scene.gpu.copy_pieces(scene.rig.engine, wild, 16)
    fence = scene.pages.fence()
    with pytest.raises(CopyError, match="illegal memory access"):
        scene.gather(fence)
    calls = scene.gpu.calls.total()
    for copy in (scene.pages.gather, scene.pages.gather):
        with pytest.raises(CopyError, match="the GPU is lost"):
            copy(scene.plan())
    assert scene.gpu.calls.total() == calls
    scene.pages.close()


@pytest.mark.parametrize("call", ["allocate", "stream", "copy_pieces", "finish"])
def test_a_gpu_that_fails_at_the_start_is_said_to(call: str) -> None:
    gpu = NumpyGpu(fails=call)
    engine = np.zeros((4, 1024), dtype=np.uint8)
    places = [KvTensor(gpu.own(engine), 4, 1024, 1024)]
    with pytest.raises(GpuUnavailableError, match=f"do not work: {call} was refused"):
        DevicePages(gpu, places, [[0]], engine_stream=lambda: 1)


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from storage_tiers.cupy_gpu import CupyGpu

    missing: Any = None
    monkeypatch.setitem(sys.modules, "cupy", missing)
    with pytest.raises(GpuUnavailableError, match=r"install kvbm-daemon\[cuda\]"):
        CupyGpu(0)


def aligned(size: int, to: int) -> Bytes:
    """Zeros that begin at a multiple of `to`."""
    whole = np.zeros(size + to, dtype=np.uint8)
    start = -address_of(whole) % to
    return whole[start : start + size]
