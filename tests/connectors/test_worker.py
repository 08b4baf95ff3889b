"""The worker half: what is copied where, what fails instead, and what waits for a copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)

from connectors.vllm import worker_side
from connectors.vllm.transfer import ArenaSlots
from connectors.vllm.worker_side import KvbmWorker
from kvbm.protocol import Fence, Fenced, FromClient
from storage_tiers.arena import Slot
from storage_tiers.hbm import CopyPlan, PageAccess
from tests.connectors.copies import (
    BLOCKS,
    ONE_BLOCK,
    Background,
    Clock,
    Daemon,
    Gate,
    Shape,
    Watched,
    describe,
    ended,
    no_hello,
    pages_of,
)

MakeWorker = Callable[..., KvbmWorker]
STILL_THERE_S = 0.2  # long enough for what must not happen to happen

SHAPES = {
    "one block": ONE_BLOCK,
    "two layers": Shape([64, 96], [[0, 1]], 1, [5], [0]),
    "two groups": Shape([64, 32, 128], [[0, 1], [2]], 1, [3, 4], [0, 0]),
    "groups that overlay each other": Shape([64, 32], [[0, 1], [0, 1]], 2, [4, 6], [0, 2]),
    "several blocks a chunk": Shape([64, 32], [[0], [1]], 4, [8, 4], [0, 4]),
    "first block inside a chunk": Shape([64], [[0]], 4, [7], [5]),
    "last chunk in part": Shape([64], [[0]], 4, [6], [8]),
    "both, in two groups": Shape([32, 16], [[0, 1], [1]], 3, [5, 2], [1, 5]),
    "inside one chunk": Shape([64], [[0]], 8, [3], [2]),
    "a group with nothing": Shape([64, 32], [[0], [1]], 2, [0, 3], [0, 1]),
}


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    daemon = Daemon()
    yield daemon
    daemon.arena.close()


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[MakeWorker]:
    """Workers whose link finds no daemon; the test plays the link."""
    workers: list[KvbmWorker] = []

    def make(pages: PageAccess, daemon: Daemon | None = None, **options: Any) -> KvbmWorker:
        settings: dict[str, Any] = {"rank": 0, "blocks_per_chunk": 1, "load_deadline_s": 10.0}
        worker = KvbmWorker(
            pages, socket_path=str(tmp_path / "nowhere"), hello=no_hello, **(settings | options)
        )
        workers.append(worker)
        if daemon is not None:
            daemon.greet(worker)
        return worker

    yield make
    for worker in workers:
        worker.shutdown()
        assert not any(thread.is_alive() for thread in worker._threads)
        assert not worker._link._thread.is_alive()


class Tiny:
    """One block stored or loaded at a time by one worker: what most tests need."""

    def __init__(self, make: MakeWorker, daemon: Daemon, **options: Any) -> None:
        self.daemon = daemon
        self.tensors = ONE_BLOCK.tensors(seed=1)
        pages: PageAccess = pages_of(ONE_BLOCK, self.tensors)
        if (during := options.pop("during", None)) is not None:
            pages = Watched(pages, during)
        self.worker = make(pages, daemon, **options)

    def slot(self) -> Slot:
        [[slot]] = ONE_BLOCK.lease(self.daemon)
        return slot

    def filled(self) -> Slot:
        """A slot that somebody has stored a chunk into."""
        slot = self.slot()
        self.daemon.arena.view(slot.offset, slot.length)[:] = b"\7" * slot.length
        return slot

    def store(self, number: int, slot: Slot | ArenaSlots, block: int = 0) -> None:
        self.worker.submit_store(number, self._block(block), self._slots(number, slot))

    def load(self, number: int, slot: Slot | ArenaSlots, block: int = 0) -> None:
        self.worker.submit_load(number, self._slots(number, slot), self._block(block))

    def is_stored(self, slot: Slot, block: int = 0) -> bool:
        found = self.daemon.read(slot)
        assert found in (bytes(slot.length), self.tensors[0][block].tobytes())
        return found != bytes(slot.length)

    def is_loaded(self, block: int = 0) -> bool:
        return self.tensors[0][block].tobytes() == b"\7" * 64

    def _block(self, block: int) -> GPULoadStoreSpec:
        return GPULoadStoreSpec([block], [1], [0])

    def _slots(self, number: int, slot: Slot | ArenaSlots) -> ArenaSlots:
        if isinstance(slot, ArenaSlots):
            return slot
        return describe(self.daemon, [[slot]], transfer=100 + number, request=f"r{number}")


@pytest.fixture
def tiny(make_worker: MakeWorker, daemon: Daemon) -> Tiny:
    return Tiny(make_worker, daemon)


# -- what is copied ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_what_was_stored_is_loaded_into_other_blocks(
    make_worker: MakeWorker, daemon: Daemon, shape: Shape
) -> None:
    source, target = shape.tensors(seed=1), shape.tensors(seed=None)
    worker = make_worker(pages_of(shape, source), daemon, blocks_per_chunk=shape.blocks_per_chunk)
    slots, stored, loaded = shape.lease(daemon), shape.blocks(2), shape.blocks(3)
    assert worker.submit_store(1, stored, describe(daemon, slots))
    size = sum(n * shape.block_bytes(group) for group, n in enumerate(shape.sizes))
    assert ended(worker, 1)[1].transfer_size == size
    expected = shape.expected(source, stored)
    assert [[daemon.read(slot) for slot in of_group] for of_group in slots] == expected

    other = make_worker(pages_of(shape, target), daemon, blocks_per_chunk=shape.blocks_per_chunk)
    assert other.submit_load(2, describe(daemon, slots), loaded)
    assert ended(other, 2)[2].transfer_size == size
    assert shape.expected(target, loaded) == expected
    # Nothing else was written to.
    used = loaded.block_ids.tolist()
    for index, tensor in enumerate(target):
        mine = [
            block
            for group, blocks in enumerate(np.split(used, np.cumsum(shape.sizes)[:-1]))
            for block in blocks.tolist()
            if index in shape.groups[group]
        ]
        assert not np.delete(tensor, mine, axis=0).any()
        assert tensor[mine].all()
    assert worker.take_failed() == other.take_failed() == (set(), set())


@pytest.mark.parametrize("replicated", [False, True])
def test_two_ranks_fill_one_slot_and_each_loads_its_own_stripe(
    make_worker: MakeWorker, daemon: Daemon, replicated: bool
) -> None:
    shape = Shape([64, 32], [[0], [1]], 2, [4, 3], [0, 1])
    stripes = [shape.stripe_bytes(0), shape.stripe_bytes(1)]
    offsets = [[0, 0], [0, 0]] if replicated else [[0, stripes[0]], [0, stripes[1]]]
    slots = shape.lease(daemon, ranks=1 if replicated else 2)
    sources = [shape.tensors(seed=1), shape.tensors(seed=1 if replicated else 2)]
    expected = [shape.expected(source, shape.blocks(5)) for source in sources]
    # Of ranks that hold the same bytes vLLM lets only the first store.
    for rank in (0,) if replicated else (1, 0):
        worker = make_worker(pages_of(shape, sources[rank]), daemon, rank=rank, blocks_per_chunk=2)
        worker.submit_store(1, shape.blocks(5), describe(daemon, slots, rank_offsets=offsets))
        ended(worker, 1)
    held = [[daemon.read(slot) for slot in of_group] for of_group in slots]
    for group, chunks in enumerate(held):
        ranks = (0,) if replicated else (0, 1)
        assert chunks == [
            b"".join(expected[rank][group][chunk] for rank in ranks)
            for chunk in range(shape.chunks(group))
        ]
    for rank in (0, 1):
        target = shape.tensors(seed=None)
        worker = make_worker(pages_of(shape, target), daemon, rank=rank, blocks_per_chunk=2)
        worker.submit_load(1, describe(daemon, slots, rank_offsets=offsets), shape.blocks(6))
        ended(worker, 1)
        assert shape.expected(target, shape.blocks(6)) == expected[rank]


def test_vllms_tensors_are_reached_where_they_are() -> None:
    """A tensor that several layers of a group share is copied once."""
    layers = [torch.arange(BLOCKS * 8, dtype=torch.int8).reshape(BLOCKS, 8) for _ in range(2)]
    packed = torch.zeros(BLOCKS * 12, dtype=torch.int8).as_strided((BLOCKS, 8), (12, 1))
    caches = CanonicalKVCaches(
        [CanonicalKVCacheTensor(tensor, 8) for tensor in [*layers, packed]],
        [
            [CanonicalKVCacheRef(index, 8) for index in (0, 1, 0)],
            [CanonicalKVCacheRef(2, 8)],
        ],
    )
    pages = worker_side.pages_of(caches)
    assert [pages.block_bytes(group) for group in (0, 1)] == [16, 8]
    stripe = np.full(8, 5, dtype=np.uint8)
    pages.scatter([CopyPlan(1, [3], 0, stripe)])
    assert packed[3].tolist() == [5] * 8 and packed.sum() == 40


def test_tensors_on_a_device_are_refused() -> None:
    tensor = torch.empty((BLOCKS, 8), dtype=torch.int8, device="meta")
    caches = CanonicalKVCaches([CanonicalKVCacheTensor(tensor, 8)], [[CanonicalKVCacheRef(0, 8)]])
    with pytest.raises(ValueError, match="meta"):
        worker_side.pages_of(caches)


# -- loads that do not count ------------------------------------------------------------


def test_a_load_counts_whose_slot_stayed(tiny: Tiny) -> None:
    tiny.load(1, tiny.filled())
    assert ended(tiny.worker, 1)[1].success
    assert tiny.is_loaded()
    assert tiny.worker.take_failed() == (set(), set())


def test_a_slot_that_changed_hands_before_its_load_fails_it(tiny: Tiny) -> None:
    slot = tiny.filled()
    tiny.daemon.arena.advance(slot.offset)
    tiny.load(1, slot)
    assert ended(tiny.worker, 1)[1].transfer_size == 0
    assert tiny.worker.take_failed() == ({"r1"}, set())
    assert not tiny.is_loaded()


def test_any_slot_of_a_load_that_changed_hands_fails_it(tiny: Tiny) -> None:
    slots = [tiny.filled() for _ in range(3)]
    tiny.daemon.arena.advance(slots[2].offset)
    pages = GPULoadStoreSpec([0, 1, 2], [3], [0])
    tiny.worker.submit_load(1, describe(tiny.daemon, [slots]), pages)
    ended(tiny.worker, 1)
    assert tiny.worker.take_failed() == ({"request"}, set())


def test_a_slot_that_changes_hands_during_its_load_fails_it(
    make_worker: MakeWorker, daemon: Daemon
) -> None:
    slots: list[Slot] = []
    tiny = Tiny(make_worker, daemon, during=lambda: [daemon.arena.advance(s.offset) for s in slots])
    slot = tiny.filled()
    slots.append(slot)
    tiny.load(1, slot)
    assert ended(tiny.worker, 1)[1].transfer_size == 0
    assert tiny.is_loaded(), "the copy had begun"
    assert tiny.worker.take_failed() == ({"r1"}, set())


def test_failures_are_told_once_and_results_say_success_all_the_same(tiny: Tiny) -> None:
    """vLLM asserts that every transfer succeeded; what failed is told apart from the results."""
    kept, lost = tiny.filled(), tiny.filled()
    tiny.daemon.arena.advance(lost.offset)
    tiny.load(1, lost)
    tiny.load(2, kept)
    tiny.store(3, lost)
    tiny.load(4, lost)
    results = ended(tiny.worker, 1, 2, 3, 4)
    assert all(result.success for result in results.values())
    assert tiny.worker.take_failed() == ({"r1", "r4"}, {103})
    assert tiny.worker.take_failed() == (set(), set())
    assert tiny.worker.get_finished() == []


def test_slots_of_another_arena_are_not_touched(tiny: Tiny) -> None:
    kept, free = tiny.filled(), tiny.slot()
    for number, slot in ((1, kept), (2, free)):
        spec = describe(tiny.daemon, [[slot]], transfer=number, request=f"r{number}")
        spec.epoch = b"another daemon.."
        (tiny.load if slot is kept else tiny.store)(number, spec)
    ended(tiny.worker, 1, 2)
    assert tiny.worker.take_failed() == ({"r1"}, {2})
    assert not tiny.is_loaded() and not tiny.is_stored(free)


def test_before_the_first_connection_everything_fails(
    make_worker: MakeWorker, daemon: Daemon
) -> None:
    tiny = Tiny(make_worker, daemon)
    tiny.worker = make_worker(pages_of(ONE_BLOCK, tiny.tensors))
    tiny.load(1, tiny.filled())
    tiny.store(2, tiny.slot())
    ended(tiny.worker, 1, 2)
    assert tiny.worker.take_failed() == ({"r1"}, {102})


def test_a_load_that_waited_past_its_deadline_is_given_up_unless_it_has_started(
    make_worker: MakeWorker, daemon: Daemon
) -> None:
    gate, clock = Gate(), Clock()
    tiny = Tiny(make_worker, daemon, during=gate, clock=clock, load_deadline_s=10.0)
    slots = [tiny.filled() for _ in range(3)]
    tiny.load(1, slots[0], block=1)
    gate.wait_for_copy()
    tiny.load(2, slots[1], block=2)
    clock.now_s += 0.5
    tiny.load(3, slots[2], block=3)
    clock.now_s += 10
    gate.open()
    ended(tiny.worker, 1, 2, 3)
    assert tiny.worker.take_failed() == ({"r2"}, set())
    assert [tiny.is_loaded(block) for block in (1, 2, 3)] == [True, False, True]


def test_a_store_has_no_deadline(make_worker: MakeWorker, daemon: Daemon) -> None:
    gate, clock = Gate(), Clock()
    tiny = Tiny(make_worker, daemon, during=gate, clock=clock)
    first, second = tiny.slot(), tiny.slot()
    tiny.store(1, first)
    gate.wait_for_copy()
    tiny.store(2, second)
    clock.now_s += 1000
    gate.open()
    ended(tiny.worker, 1, 2)
    assert tiny.worker.take_failed() == (set(), set())
    assert tiny.is_stored(second)


# -- sessions and fences ----------------------------------------------------------------


@pytest.mark.parametrize("end", ["fence", "lost connection"])
def test_after_the_end_of_its_session_nothing_is_stored_but_loads_go_on(
    tiny: Tiny, end: str
) -> None:
    """A load is guarded by generations: bytes that are still there are still right."""
    tiny.worker.received(Fence()) if end == "fence" else tiny.worker.disconnected()
    slot = tiny.slot()
    tiny.store(1, slot)
    tiny.load(2, tiny.filled())
    ended(tiny.worker, 1, 2)
    assert tiny.worker.take_failed() == (set(), {101})
    assert not tiny.is_stored(slot) and tiny.is_loaded()


def test_only_slots_of_the_open_session_are_stored_to(tiny: Tiny) -> None:
    old, new = tiny.slot(), tiny.slot()
    of_old = describe(tiny.daemon, [[old]], transfer=1)
    tiny.worker.disconnected()
    tiny.daemon.session += 1
    tiny.daemon.greet(tiny.worker, connection=2)
    tiny.store(1, of_old)
    tiny.store(2, new)
    ended(tiny.worker, 1, 2)
    assert tiny.worker.take_failed() == (set(), {1})
    assert not tiny.is_stored(old) and tiny.is_stored(new)


def test_a_store_into_a_slot_that_is_no_longer_ours_fails(tiny: Tiny) -> None:
    slot = tiny.slot()
    tiny.daemon.arena.advance(slot.offset)
    tiny.store(1, slot)
    ended(tiny.worker, 1)
    assert tiny.worker.take_failed() == (set(), {101})
    assert not tiny.is_stored(slot)


@pytest.mark.parametrize("end", ["fence", "lost connection"])
def test_the_end_of_a_session_waits_for_the_store_in_progress(
    make_worker: MakeWorker, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    gate = Gate()
    tiny = Tiny(make_worker, daemon, during=gate)
    worker = tiny.worker
    said: list[tuple[int, FromClient, bool]] = []

    def send(connection: int, message: FromClient) -> bool:
        said.append((connection, message, tiny.is_stored(running)))
        return True

    monkeypatch.setattr(worker._link, "send", send)
    running, queued = tiny.slot(), tiny.slot()
    tiny.store(1, running)
    gate.wait_for_copy()
    tiny.store(2, queued)
    fenced = end == "fence"
    link = Background(lambda: worker.received(Fence()) if fenced else worker.disconnected())
    assert not link.ended(STILL_THERE_S)
    assert not said
    gate.open()
    assert link.ended()
    assert said == ([(1, Fenced(), True)] if fenced else [])
    ended(worker, 1, 2)
    assert worker.take_failed() == (set(), {102})
    assert tiny.is_stored(running) and not tiny.is_stored(queued)


def test_a_fence_does_not_wait_for_a_load(make_worker: MakeWorker, daemon: Daemon) -> None:
    gate = Gate()
    tiny = Tiny(make_worker, daemon, during=gate)
    tiny.load(1, tiny.filled())
    gate.wait_for_copy()
    assert Background(lambda: tiny.worker.received(Fence())).ended()
    gate.open()
    ended(tiny.worker, 1)
    assert tiny.worker.take_failed() == (set(), set())


def test_a_queued_load_finds_its_bytes_when_the_daemon_restarts_meanwhile(
    make_worker: MakeWorker, daemon: Daemon
) -> None:
    gate = Gate()
    tiny = Tiny(make_worker, daemon, during=gate)
    tiny.load(1, tiny.filled(), block=1)
    gate.wait_for_copy()
    tiny.load(2, tiny.filled(), block=2)
    stale = describe(daemon, [[tiny.filled()]], request="stale")
    fresh = Daemon(session=8)
    tiny.worker.disconnected()
    fresh.greet(tiny.worker, connection=2)
    tiny.load(3, stale, block=3)
    gate.open()
    ended(tiny.worker, 1, 2, 3)
    fresh.arena.close()
    assert tiny.worker.take_failed() == ({"stale"}, set())
    assert [tiny.is_loaded(block) for block in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize("content", [None, b"", bytes(100), bytes(8192)])
def test_a_daemon_without_a_usable_arena_is_done_without(
    make_worker: MakeWorker, daemon: Daemon, content: bytes | None
) -> None:
    """The handler may not raise: that would end the link, and with it every later connection."""
    tiny = Tiny(make_worker, daemon)
    tiny.worker = make_worker(pages_of(ONE_BLOCK, tiny.tensors))
    fd = None
    if content is not None:
        fd = os.memfd_create("no-arena")
        os.write(fd, content)
    tiny.worker.connected(1, daemon.welcome, fd)
    slot = tiny.slot()
    tiny.store(1, slot)
    ended(tiny.worker, 1)
    assert tiny.worker.take_failed() == (set(), {101})
    daemon.greet(tiny.worker, connection=2)
    tiny.store(2, slot)
    ended(tiny.worker, 2)
    assert tiny.is_stored(slot)


# -- jobs that make no sense ------------------------------------------------------------

MISMATCHES: dict[str, tuple[list[int], list[int]]] = {
    "no slot at all": ([], [2, 2]),
    "a slot too few": ([0, 1], [2, 3]),
    "a slot too many": ([0, 1, 1], [2, 2]),
    "a slot of a group without blocks": ([0, 1], [2, 0]),
    "groups the other way round": ([1, 0], [2, 2]),
    "too few in one group, too many in the other": ([0, 1, 1], [4, 2]),
}


@pytest.mark.parametrize("is_load", [True, False])
@pytest.mark.parametrize(("groups", "sizes"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_blocks_and_slots_that_do_not_match_fail_the_job(
    make_worker: MakeWorker, daemon: Daemon, groups: list[int], sizes: list[int], is_load: bool
) -> None:
    shape = Shape([64, 64], [[0], [1]], 2, sizes, [0, 0])
    tensors = shape.tensors(seed=1)
    before = [tensor.copy() for tensor in tensors]
    worker = make_worker(pages_of(shape, tensors), daemon, blocks_per_chunk=2)
    slots = daemon.slots(len(groups), 128)
    spec = describe(daemon, [slots, []], rank_offsets=[[0], [0]])
    spec.groups, spec.lengths = groups, [128, 128]
    if is_load:
        worker.submit_load(1, spec, shape.blocks(2))
    else:
        worker.submit_store(1, shape.blocks(2), spec)
    ended(worker, 1)
    assert worker.take_failed() == (({"request"}, set()) if is_load else (set(), {1}))
    assert all(np.array_equal(*pair) for pair in zip(tensors, before, strict=True))
    assert not any(any(daemon.read(slot)) for slot in slots)


def test_a_stripe_beyond_its_slot_fails_the_job(make_worker: MakeWorker, daemon: Daemon) -> None:
    """It would be written into somebody else's slot."""
    tensors = ONE_BLOCK.tensors(seed=1)
    worker = make_worker(pages_of(ONE_BLOCK, tensors), daemon, rank=1)
    [slot] = daemon.slots(1, 127)
    neighbour = Slot(slot.offset + slot.length, 64, 0)
    worker.submit_store(1, ONE_BLOCK.blocks(2), describe(daemon, [[slot]], rank_offsets=[[0, 64]]))
    ended(worker, 1)
    assert worker.take_failed() == (set(), {1})
    assert not any(daemon.read(slot)) and not any(daemon.read(neighbour))


@pytest.mark.parametrize("is_load", [True, False])
def test_a_fault_fails_its_job_and_the_next_one_is_done(
    make_worker: MakeWorker, daemon: Daemon, is_load: bool
) -> None:
    faults: list[Exception] = [RuntimeError("the copy went wrong")]

    def fail_once() -> None:
        if faults:
            raise faults.pop()

    tiny = Tiny(make_worker, daemon, during=fail_once)
    slots = [tiny.filled(), tiny.filled()] if is_load else [tiny.slot(), tiny.slot()]
    for number, slot in enumerate(slots, 1):
        (tiny.load if is_load else tiny.store)(number, slot, block=number)
    results = ended(tiny.worker, 1, 2)
    assert tiny.worker.take_failed() == (({"r1"}, set()) if is_load else (set(), {101}))
    assert [results[number].transfer_size for number in (1, 2)] == [0, 64]
    assert tiny.is_loaded(2) if is_load else tiny.is_stored(slots[1], 2)
    assert Background(tiny.worker.disconnected).ended(), "the failed store is not in progress"


def test_a_block_outside_the_tensors_fails_its_job(tiny: Tiny) -> None:
    tiny.load(1, tiny.filled(), block=BLOCKS)
    tiny.load(2, tiny.filled())
    ended(tiny.worker, 1, 2)
    assert tiny.worker.take_failed() == ({"r1"}, set())
    assert tiny.is_loaded()


# -- waiting and the end ----------------------------------------------------------------


def test_wait_returns_when_its_jobs_have_ended(make_worker: MakeWorker, daemon: Daemon) -> None:
    gate = Gate()
    tiny = Tiny(make_worker, daemon, during=gate)
    tiny.store(1, tiny.slot())
    gate.wait_for_copy()
    tiny.store(2, tiny.slot())
    waiting = Background(lambda: tiny.worker.wait({1, 2}))
    assert Background(lambda: tiny.worker.wait({3})).ended(), "nothing of that number is queued"
    assert not waiting.ended(STILL_THERE_S)
    gate.open()
    assert waiting.ended()
    assert {result.job_id for result in tiny.worker.get_finished()} == {1, 2}
    assert Background(lambda: tiny.worker.wait({1, 2})).ended()


def test_wait_returns_for_jobs_that_failed(tiny: Tiny) -> None:
    tiny.worker.disconnected()
    tiny.store(1, tiny.slot())
    assert Background(lambda: tiny.worker.wait({1})).ended()
    assert [result.job_id for result in tiny.worker.get_finished()] == [1]


def test_shutdown_finishes_the_copy_in_progress_and_leaves_what_is_queued(
    make_worker: MakeWorker, daemon: Daemon
) -> None:
    gate = Gate()
    tiny = Tiny(make_worker, daemon, during=gate)
    running, queued = tiny.slot(), tiny.slot()
    tiny.store(1, running)
    gate.wait_for_copy()
    tiny.store(2, queued)
    waiting = Background(lambda: tiny.worker.wait({2}))
    stopping = Background(tiny.worker.shutdown)
    assert waiting.ended(), "nobody waits for what will not be done"
    assert not stopping.ended(STILL_THERE_S)
    gate.open()
    assert stopping.ended()
    assert not any(thread.is_alive() for thread in tiny.worker._threads)
    assert tiny.is_stored(running) and not tiny.is_stored(queued)
