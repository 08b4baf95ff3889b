"""Offload: every committed chunk goes down to every tier, or its loss is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from kvbm import offload
from kvbm.offload import LaneSettings
from storage_tiers.base import Chunk, Key, StoreItem, Tier, TierName
from storage_tiers.codec import checksum
from storage_tiers.faulty import Faults, Faulty
from storage_tiers.instrumented import Instrumented, TierCall
from storage_tiers.memory import MemoryTier
from storage_tiers.testing import load_one, store_all
from storage_tiers.throttled import Throttled
from tests.kvbm.builders import (
    CHUNK_BYTES,
    WAIT_S,
    Gate,
    Node,
    Wrap,
    chunks_of,
    keys_of,
    until,
    wanted,
)

MakeNode = Callable[..., Node]
NEVER_S = 3600.0


def gated(gate: Gate) -> Wrap:
    """A tier whose calls do nothing until the gate opens."""
    return lambda tier: Faulty(tier, Faults(delay=1.0), seed=1, sleep=gate)


def failing(tiers: list[Faulty]) -> Wrap:
    """A tier whose medium fails until told otherwise; it is put into `tiers`."""

    def wrap(tier: MemoryTier) -> Tier:
        tiers.append(Faulty(tier, Faults(fail=1.0), seed=1))
        return tiers[-1]

    return wrap


def plain(tier: MemoryTier) -> Tier:
    return tier


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed medium is tried again after a moment."""
    monkeypatch.setattr(offload, "BACKOFF_S_MAX", 0.005)


async def assert_kept(tier: Tier, items: Sequence[StoreItem]) -> None:
    for item in items:
        assert tier.find([item.chunk.key]) == [item.chunk]
        _, data = await load_one(tier, item)
        assert data == item.data


# -- what arrives -----------------------------------------------------------------------


async def test_a_committed_chunk_is_sealed_with_the_checksum_of_its_bytes(node: Node) -> None:
    items = chunks_of("a", 40)
    node.commit(items)
    assert [c.checksum for c in node.dram.find(keys_of(items)) if c] == [0] * 40
    async with node.running():
        await node.settle()
    assert node.dram.find(keys_of(items)) == [item.chunk for item in items]
    assert items[7].chunk.checksum == checksum(bytes(items[7].data))


async def test_every_lower_tier_gets_the_chunk_as_it_is(node: Node) -> None:
    items = chunks_of("a", 5)
    node.commit(items)
    async with node.running():
        await node.settle()
    for memory in node.memories:
        await assert_kept(memory, items)
    size = 5 * CHUNK_BYTES
    assert node.meter.transfer_bytes["G2", "G3"] == node.meter.transfer_bytes["G2", "G4"] == size
    assert not node.meter.drops
    assert node.dram.claims == 0


async def test_a_tier_gets_only_what_it_lacks(node: Node) -> None:
    items = chunks_of("a", 4)
    await store_all(node.memories[0], items[:3])
    stored = node.memories[0].usage().stored_bytes_total
    node.commit(items)
    async with node.running():
        await node.settle()
    assert node.memories[0].usage().stored_bytes_total == stored + CHUNK_BYTES
    announced = [key for change, tier, key in node.events.announced if tier is TierName.SSD]
    assert announced == keys_of(items[3:]), "announced is what was stored, and nothing else"
    assert len(node.memories[1].contents) == 4


async def test_a_chunk_is_stored_once_although_it_is_offered_often(make_node: MakeNode) -> None:
    calls: list[TierCall] = []
    node = make_node(lambda tier: Instrumented(tier, calls.append))
    items = chunks_of("a", 1)
    node.commit(items)
    for _ in range(3):
        node.manager.offloader.offer(items[0].chunk)
    async with node.running():
        await node.settle()
        node.manager.offloader.offer(items[0].chunk)
        await node.settle()
    assert [call.outcomes for call in calls] == [{"stored": 1}]


async def test_chunks_are_gathered_into_the_batches_their_tier_wants(make_node: MakeNode) -> None:
    calls: list[TierCall] = []
    settings = LaneSettings(enough_bytes=6 * CHUNK_BYTES, linger_s=NEVER_S, batch_chunks=8)
    node = make_node(lambda tier: Instrumented(tier, calls.append), settings=settings)
    items = chunks_of("a", 6)
    async with node.running():
        for item in items:
            node.commit([item])
            await asyncio.sleep(0.01)
        await until(lambda: len(node.memories[0].contents) == 6)
    assert [call.bytes for call in calls] == [6 * CHUNK_BYTES]


# -- evicted before it was moved --------------------------------------------------------


async def test_a_chunk_evicted_first_and_nowhere_else_is_counted_as_dropped(node: Node) -> None:
    [item] = chunks_of("a", 1)
    node.manager.offloader.offer_sealed(item.chunk)
    async with node.running():
        await node.settle()
    assert node.meter.drops["offload_G3", "evicted_first"] == 1
    assert node.meter.drops["offload_G4", "evicted_first"] == 1
    assert not node.residencies()


async def test_a_chunk_evicted_first_is_read_from_the_tier_above(node: Node) -> None:
    items = chunks_of("a", 3)
    await store_all(node.memories[0], items)
    for item in items:
        node.manager.offloader.offer_sealed(item.chunk)
    assert node.manager.offloader.depth == {"seal": 0, "G3": 0, "G4": 3}
    async with node.running():
        await node.settle()
    await assert_kept(node.memories[1], items)
    assert not node.meter.drops


async def test_a_chunk_damaged_in_the_tier_above_is_not_passed_down(node: Node) -> None:
    items = chunks_of("a", 2)
    await store_all(node.memories[0], items)
    node.memories[0].contents[items[0].chunk.key][5] ^= 1
    for item in items:
        node.manager.offloader.offer_sealed(item.chunk)
    async with node.running():
        await node.settle()
    assert keys_of(items[1:]) == list(node.memories[1].contents)
    assert node.meter.drops["offload_G4", "evicted_first"] == 1


async def test_a_chunk_evicted_before_it_was_sealed_is_counted_as_dropped(node: Node) -> None:
    items = chunks_of("a", 3)
    node.commit(items)
    await node.dram.remove(keys_of(items[:2]))
    async with node.running():
        await node.settle()
    assert list(node.memories[0].contents) == keys_of(items[2:])
    assert sum(node.meter.drops.values()) == 2, "two chunks were lost without a trace"


async def test_a_chunk_that_comes_again_unsealed_is_not_written_without_its_checksum(
    make_node: MakeNode,
) -> None:
    """Its lane still holds it from its first residency when the engine commits it anew.

    What a tier gets must be loadable, so it may not be written before it is sealed again.
    """
    gate = Gate()
    node = make_node(gated(gate), settings=LaneSettings(batch_chunks=1))
    first, item = (chunks_of(name, 1)[0] for name in ("first", "again"))
    async with node.running():
        node.commit([first])
        await until(lambda: gate.waiting)
        node.commit([item])
        await until(lambda: node.manager.offloader.depth == {"seal": 0, "G3": 1, "G4": 0})
        await node.dram.remove([item.chunk.key])
        held = threading.Event()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    offload, "checksum", lambda view: held.wait(WAIT_S) and checksum(view)
                )
                node.commit([item])
                gate.open()
                await until(lambda: not node.manager.offloader.depth["G3"])
                await asyncio.sleep(0.02)
                held.set()
                await node.settle()
        finally:
            held.set()
    await assert_kept(node.memories[0], [item])


# -- a medium that fails ----------------------------------------------------------------


@pytest.mark.usefixtures("quick")
async def test_a_failed_store_is_tried_again_until_it_works(make_node: MakeNode) -> None:
    tiers: list[Faulty] = []
    node = make_node(failing(tiers), settings=LaneSettings(attempts=1000))
    items = chunks_of("a", 3)
    async with node.running():
        node.commit(items)
        await until(lambda: node.meter.errors["store_G3", "failed"] >= 6)
        assert not node.memories[0].contents
        tiers[0].faults = Faults()
        await node.settle()
    await assert_kept(node.memories[0], items)
    assert not node.meter.drops
    assert node.dram.claims == 0


@pytest.mark.usefixtures("quick")
async def test_a_store_that_fails_every_attempt_is_dropped_and_counted(
    make_node: MakeNode,
) -> None:
    tiers: list[Faulty] = []
    node = make_node(failing(tiers), settings=LaneSettings(attempts=3))
    items = chunks_of("a", 2)
    async with node.running():
        node.commit(items)
        await node.settle()
        assert node.meter.errors["store_G3", "failed"] == 6
        assert node.meter.drops == {("offload_G3", "failed"): 2}
        await assert_kept(node.memories[1], items)
        assert node.events.replay() == node.residencies()
        tiers[0].faults = Faults()
        later = chunks_of("later", 1)
        node.commit(later)
        await node.settle()
    await assert_kept(node.memories[0], later)
    assert node.dram.claims == 0


@pytest.mark.usefixtures("quick")
async def test_failures_of_a_chunk_that_was_given_up_do_not_count_when_it_comes_again(
    make_node: MakeNode,
) -> None:
    tiers: list[Faulty] = []
    node = make_node(failing(tiers), settings=LaneSettings(attempts=2))
    [item] = chunks_of("a", 1)
    node.manager.offloader._lanes[1].capacity_chunks = 0  # only G3 is looked at
    async with node.running():
        node.commit([item])
        await until(lambda: node.meter.errors["store_G3", "failed"] == 1)
        await node.dram.remove([item.chunk.key])
        await until(lambda: node.meter.drops["offload_G3", "evicted_first"])
        node.commit([item])
        await node.settle()
    assert node.meter.errors["store_G3", "failed"] == 3, "it had two attempts again"
    assert not node.manager.offloader._attempts, "forgotten chunks are remembered for ever"


async def test_a_full_tier_is_counted_and_not_tried_again(make_node: MakeNode) -> None:
    node = make_node(lower_bytes=(CHUNK_BYTES // 2, 1 << 22))
    items = chunks_of("a", 2)
    node.commit(items)
    async with node.running():
        await node.settle()
    assert node.meter.drops == {("offload_G3", "full"): 2}
    assert not node.meter.errors
    await assert_kept(node.memories[1], items)


async def test_a_fault_in_a_tier_ends_neither_its_lane_nor_the_others(make_node: MakeNode) -> None:
    faults = [RuntimeError("a bug")]

    async def sleep(seconds: float) -> None:
        if faults:
            raise faults.pop()

    def wrap(tier: MemoryTier) -> Tier:
        return Faulty(tier, Faults(delay=1.0), seed=1, sleep=sleep)

    node = make_node(wrap)
    items = chunks_of("a", 2, chained=False)
    async with node.running():
        node.commit(items[:1])
        await node.settle()
        assert node.dram.claims == 0
        node.commit(items[1:])
        await node.settle()
    assert list(node.memories[0].contents) == keys_of(items[1:])
    await assert_kept(node.memories[1], items)
    assert node.meter.drops == {("offload_G3", "fault"): 1}


# -- a medium that is slow --------------------------------------------------------------


async def test_a_slow_tier_does_not_delay_another(make_node: MakeNode) -> None:
    gate = Gate()
    node = make_node(lambda tier: Throttled(tier, bytes_per_s=1.0, sleep=gate))
    items = chunks_of("a", 60)
    async with node.running():
        for item in items:
            node.commit([item])
            await asyncio.sleep(0)
        await until(lambda: len(node.memories[1].contents) == 60)
        assert gate.waiting == 1
        assert len(node.memories[0].contents) < 60
        assert 0 < node.dram.claims <= LaneSettings().batch_chunks, "claimed only while copied"
        gate.open()
        await node.settle()
    assert len(node.memories[0].contents) == 60


async def test_what_a_full_queue_refuses_is_counted(make_node: MakeNode) -> None:
    gate = Gate()
    node = make_node(gated(gate), settings=LaneSettings(batch_chunks=2, queue_chunks=5))
    async with node.running():
        for item in chunks_of("a", 12):
            node.commit([item])
            await until(lambda: not node.manager.offloader.depth["seal"])
            await until(lambda: len(node.memories[1].contents) == len(node.dram))
        on_its_way = node.dram.claims
        assert 0 < on_its_way <= 2
        assert node.manager.offloader.depth == {"seal": 0, "G3": 5, "G4": 0}
        refused = 12 - 5 - on_its_way
        assert node.meter.drops == {("offload_G3", "queue_full"): refused}
        gate.open()
        await node.settle()
    assert len(node.memories[0].contents) == 12 - refused
    assert len(node.memories[1].contents) == 12


async def test_a_full_sealing_queue_is_counted(make_node: MakeNode) -> None:
    node = make_node(settings=LaneSettings(queue_chunks=3))
    node.commit(chunks_of("a", 10))
    assert node.meter.drops == {("seal", "queue_full"): 7}
    assert node.manager.offloader.depth == {"seal": 3, "G3": 0, "G4": 0}
    assert node.manager.offloader.limits == {"seal": 3, "G3": 3, "G4": 3}


# -- ending -----------------------------------------------------------------------------


async def test_draining_waits_until_everything_is_down(make_node: MakeNode) -> None:
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0.01)

    node = make_node(
        lambda tier: Faulty(tier, Faults(delay=1.0), seed=1, sleep=sleep),
        settings=LaneSettings(batch_chunks=4),
    )
    items = chunks_of("a", 20)
    async with node.running():
        node.commit(items)
        assert await node.manager.offloader.drain(WAIT_S) == 0
        assert all(len(memory.contents) == 20 for memory in node.memories)


async def test_draining_ends_at_its_deadline_and_says_what_still_waits(
    make_node: MakeNode,
) -> None:
    node = make_node(gated(Gate()), settings=LaneSettings(batch_chunks=4))
    async with node.running():
        node.commit(chunks_of("a", 20))
        async with asyncio.timeout(WAIT_S):
            left = await node.manager.offloader.drain(0.1)
    assert 16 <= left <= 20
    assert node.dram.claims == 0


async def test_draining_counts_what_hangs_on_its_way_as_left(make_node: MakeNode) -> None:
    """The daemon logs what was not offloaded; a batch that a tier never finished is such."""
    node = make_node(gated(Gate()))
    async with node.running():
        node.commit(chunks_of("a", 3))
        assert await node.manager.offloader.drain(0.1) == 3


async def test_draining_does_not_linger(make_node: MakeNode) -> None:
    settings = LaneSettings(enough_bytes=1 << 40, linger_s=NEVER_S)
    node = make_node(settings=settings)
    async with node.running():
        node.commit(chunks_of("a", 3))
        await until(lambda: node.manager.offloader.depth == {"seal": 0, "G3": 3, "G4": 3})
        assert await node.manager.offloader.drain(1.0) == 0
    assert all(len(memory.contents) == 3 for memory in node.memories)


async def test_ending_during_a_store_leaves_no_claim(make_node: MakeNode) -> None:
    gate = Gate()
    node = make_node(gated(gate), gated(gate))
    async with node.running():
        node.commit(chunks_of("a", 5))
        await until(lambda: gate.waiting == 2)
        assert node.dram.claims == 10
    assert node.dram.claims == 0


async def test_ending_while_a_chunk_is_read_again_leaves_no_claim(make_node: MakeNode) -> None:
    """Part of the batch is in host memory and claimed while the rest is read from above."""
    gate = Gate()
    node = make_node(gated(gate), plain)
    kept, gone = chunks_of("kept", 2), chunks_of("gone", 1)
    await store_all(node.memories[0], [*kept, *gone])
    await node.dram.store(kept)
    for item in (*kept, *gone):
        node.manager.offloader.offer_sealed(item.chunk)
    async with node.running():
        await until(lambda: gate.waiting)
        assert node.dram.claims == 2
    assert node.dram.claims == 0


async def test_ending_while_chunks_are_sealed_leaves_no_claim(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, entered = threading.Event(), threading.Event()

    def slow_checksum(view: memoryview) -> int:
        entered.set()
        held.wait(WAIT_S)
        return checksum(view)

    monkeypatch.setattr(offload, "checksum", slow_checksum)
    try:
        async with node.running():
            node.commit(chunks_of("a", 5))
            await until(entered.is_set)
            assert node.dram.claims == 5
        assert node.dram.claims == 0
    finally:
        held.set()


async def test_a_chunk_is_not_evicted_while_it_is_sealed_or_stored(make_node: MakeNode) -> None:
    gate = Gate()
    node = make_node(gated(gate), gated(gate), dram_bytes=16 * CHUNK_BYTES)
    items = chunks_of("a", 4, chained=False)
    async with node.running():
        node.commit(items)
        await until(lambda: gate.waiting == 2)
        for index in range(40):
            node.commit(chunks_of(f"other{index}", 1))
        assert all(chunk is not None for chunk in node.dram.find(keys_of(items)))
        gate.open()
        await node.settle()
    await assert_kept(node.memories[0], items)


def test_a_chunk_knows_nothing_of_its_checksum_until_it_is_sealed(node: Node) -> None:
    [item] = chunks_of("a", 1)
    node.commit([item])
    resident = node.dram.claim(item.chunk.key)
    assert resident is not None and not node.dram.is_sealed(resident)
    node.dram.unclaim(resident)
    assert node.dram.find([item.chunk.key]) == [
        Chunk(item.chunk.key, CHUNK_BYTES, 0, item.chunk.parent, 0)
    ]


# -- what a tier does not want ----------------------------------------------------------


async def test_what_a_tier_refuses_is_counted_by_reason_and_not_written(node: Node) -> None:
    ssd, s3 = node.memories
    ssd.refuse = lambda chunk: "admission" if chunk.position % 2 else None
    s3.refuse = lambda _: "budget"
    items = chunks_of("a", 6)
    node.commit(items)
    async with node.running():
        await node.settle()
    assert set(ssd.contents) == {item.chunk.key for item in items[::2]}
    assert not s3.contents
    assert node.meter.drops == {("offload_G3", "admission"): 3, ("offload_G4", "budget"): 6}


async def test_what_was_refused_is_offered_again_when_it_is_used(node: Node) -> None:
    ssd, s3 = node.memories
    ssd.refuse = s3.refuse = lambda _: "admission"
    items = chunks_of("a", 6)
    node.commit(items)
    async with node.running():
        await node.settle()
        asked: list[int] = []

        def after_the_third(chunk: Chunk) -> str | None:
            asked.append(chunk.position)
            return "admission" if chunk.position >= 3 else None

        ssd.refuse = after_the_third
        s3.refuse = lambda _: None
        node.manager.close(node.match(wanted(items)).ticket)
        await node.settle()
    assert set(ssd.contents) == {item.chunk.key for item in items[:3]}
    assert asked == [0, 1, 2, 3], "what follows a refused chunk is of no use without it"
    await assert_kept(s3, items)


# -- evacuating ---------------------------------------------------------------------------


def stored_order(node: Node, place: int = 0) -> list[Key]:
    """Keys in the order in which a tier got them."""
    name = node.memories[place].name
    return [key for what, tier, key in node.events.announced if (what, tier) == ("stored", name)]


async def test_the_hottest_go_first_and_parents_before_children(make_node: MakeNode) -> None:
    node = make_node(settings=LaneSettings(batch_chunks=1))
    now_s = [1e9]
    node.dram._index._clock = lambda: now_s[0]
    chains = [chunks_of(f"chain {number}", 3) for number in range(4)]
    for chain in chains:
        node.commit(chain)
        now_s[0] += 10
    node.dram.touch(keys_of(chains[1])[::-1])
    node.manager.offloader.evacuate()
    async with node.running():
        assert await node.manager.offloader.drain(WAIT_S) == 0
    hottest = keys_of([*chains[1], *chains[3], *chains[2], *chains[0]])
    assert stored_order(node) == hottest


async def test_what_no_queue_had_room_for_goes_down_too(make_node: MakeNode) -> None:
    node = make_node(settings=LaneSettings(batch_chunks=2, queue_chunks=4))
    items = chunks_of("too many", 30)
    for first in range(0, 30, 10):
        node.commit(items[first : first + 10])
    assert node.meter.drops == {("seal", "queue_full"): 26}
    offloader = node.manager.offloader
    async with node.running():
        await node.settle()
        assert len(node.memories[0].contents) == 4
        offloader.evacuate()
        assert offloader.left > 0, "not done before it has looked"
        assert await offloader.drain(WAIT_S) == 0
    assert node.memories[0].contents.keys() == set(keys_of(items))


async def test_what_is_left_at_the_deadline_is_the_coldest_and_counted(
    make_node: MakeNode,
) -> None:
    gate = Gate()
    node = make_node(gated(gate), settings=LaneSettings(batch_chunks=3, queue_chunks=3))
    now_s = [1e9]
    node.dram._index._clock = lambda: now_s[0]
    items = chunks_of("cold", 12, chained=False)
    for item in items:  # the queue has room for the coldest alone
        node.commit([item])
        now_s[0] += 1
    offloader = node.manager.offloader
    offloader.evacuate()
    async with node.running():
        await until(lambda: gate.waiting)
        assert await offloader.drain(0.2) == 12
        gate.open()
        assert await offloader.drain(WAIT_S) == 0
    assert stored_order(node) == keys_of(items)[::-1]


async def test_staying_ends_the_order_and_the_search(make_node: MakeNode) -> None:
    gate = Gate()
    node = make_node(gated(gate), settings=LaneSettings(batch_chunks=2, queue_chunks=2))
    items = chunks_of("stays", 10, chained=False)
    offloader = node.manager.offloader
    for item in items:
        node.commit([item])
    async with node.running():
        offloader.evacuate()
        await until(lambda: gate.waiting and offloader._unqueued)
        offloader.stay()
        await until(lambda: not offloader._unqueued)
        gate.open()
        assert await offloader.drain(WAIT_S) == 0
    assert all(lane.order is None for lane in (offloader._to_seal, *offloader._lanes))
    assert len(node.memories[0].contents) < len(items), "the rest stays where it is"
