"""Onboard: each chunk comes up once, from the first tier that still has it, or its failure does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from kvbm.onboard import BATCH_CHUNKS, NO_ROOM, WORKERS_PER_TIER, Onboarder
from storage_tiers.base import Key, StoreItem, Tier
from storage_tiers.faulty import Faults, Faulty
from storage_tiers.memory import MemoryTier
from storage_tiers.testing import store_all
from storage_tiers.throttled import Throttled
from tests.kvbm.builders import CHUNK_BYTES, Gate, Node, background, chunks_of, keys_of, until

MakeNode = Callable[..., Node]


@dataclass
class Bay:
    """An onboarder of its own over a node's tiers, and what it reported."""

    node: Node
    tiers: list[Tier]
    onboarder: Onboarder
    ended: list[tuple[Key, int]] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with background(self.onboarder.run):
            yield

    def request(self, items: Sequence[StoreItem], tier: int = 0) -> bool:
        return all(self.onboarder.request(item.chunk, tier) for item in items)

    async def settle(self) -> None:
        await until(lambda: not self.onboarder._pending)

    def assert_here(self, items: Sequence[StoreItem]) -> None:
        """In host memory with its bytes, ready to be used as the checksum is known."""
        for item in items:
            resident = self.node.dram.claim(item.chunk.key)
            assert resident is not None and self.node.dram.is_sealed(resident)
            assert self.node.dram.chunk(resident) == item.chunk
            assert self.node.dram.view(self.node.dram.slot(resident)) == item.data
            self.node.dram.unclaim(resident)


@pytest.fixture
def make_bay(make_node: MakeNode) -> Callable[..., Bay]:
    def make(
        *wraps: Callable[[MemoryTier], Tier],
        dram_bytes: int = 1 << 20,
        queue_chunks: int = 1000,
        bytes_in_flight: int = 1 << 20,
    ) -> Bay:
        node = make_node(dram_bytes=dram_bytes)
        tiers: list[Tier] = [*node.memories]
        for place, wrap in enumerate(wraps):
            tiers[place] = wrap(node.memories[place])
        ended: list[tuple[Key, int]] = []

        def landed(told: Sequence[tuple[Key, int]]) -> None:
            ended.extend(told)
            node.dram.touch([key for key, _ in reversed(told)])  # as the manager does

        onboarder = Onboarder(
            node.dram,
            tiers,
            landed,
            node.meter,
            node.notes,
            queue_chunks=queue_chunks,
            bytes_in_flight=bytes_in_flight,
        )
        return Bay(node, tiers, onboarder, ended)

    return make


MakeBay = Callable[..., Bay]


def gated(gate: Gate) -> Callable[[MemoryTier], Tier]:
    return lambda tier: Faulty(tier, Faults(delay=1.0), seed=1, sleep=gate)


# -- what lands -------------------------------------------------------------------------


async def test_a_requested_chunk_lands_with_its_bytes_and_checksum(make_bay: MakeBay) -> None:
    bay = make_bay()
    items = chunks_of("a", 20)
    await store_all(bay.node.memories[1], items)
    assert bay.request(items, tier=1)
    assert bay.onboarder.depth == {"G3": 0, "G4": 20}
    async with bay.running():
        await bay.settle()
    bay.assert_here(items)
    assert sorted(bay.ended) == sorted((key, 1) for key in keys_of(items))
    assert bay.node.meter.transfer_bytes == {("G4", "G2"): 20 * CHUNK_BYTES}
    assert bay.node.dram.leased_bytes == bay.node.dram.claims == 0


async def test_a_chunk_is_loaded_once_however_many_ask_for_it(make_bay: MakeBay) -> None:
    gate = Gate()
    bay = make_bay(gated(gate))
    [item] = chunks_of("a", 1)
    await bay.node.memories[0].store([item])
    async with bay.running():
        for _ in range(3):
            assert bay.request([item])
        await until(lambda: gate.waiting)
        for _ in range(3):
            assert bay.request([item]), "asked again while on its way"
        assert item.chunk.key in bay.onboarder
        gate.open()
        await bay.settle()
    assert bay.ended == [(item.chunk.key, 0)]
    assert bay.node.memories[0].usage().loaded_bytes_total == CHUNK_BYTES
    assert item.chunk.key not in bay.onboarder


async def test_a_chunk_committed_meanwhile_lands_without_a_second_residency(
    make_bay: MakeBay,
) -> None:
    gate = Gate()
    bay = make_bay(gated(gate))
    [item] = chunks_of("a", 1)
    await store_all(bay.node.memories[0], [item])
    async with bay.running():
        bay.request([item])
        await until(lambda: gate.waiting)
        bay.node.commit([item])
        used = bay.node.dram.usage().used_bytes
        gate.open()
        await bay.settle()
    assert bay.ended == [(item.chunk.key, 0)]
    assert bay.node.dram.usage().used_bytes == used - CHUNK_BYTES
    assert bay.node.dram.leased_bytes == 0


# -- what does not ----------------------------------------------------------------------


async def test_a_damaged_chunk_is_taken_from_the_next_tier(make_bay: MakeBay) -> None:
    bay = make_bay()
    items = chunks_of("a", 3)
    for memory in bay.node.memories:
        await store_all(memory, items)
    bay.node.memories[0].contents[items[1].chunk.key][0] ^= 1
    bay.request(items)
    async with bay.running():
        await bay.settle()
    bay.assert_here(items)
    assert dict(bay.ended) == dict(zip(keys_of(items), [0, 1, 0], strict=True))
    assert bay.node.meter.errors == {("load_G3", "corrupt"): 1}
    assert bay.node.dram.leased_bytes == 0


async def test_a_chunk_that_is_gone_is_taken_from_the_next_tier(make_bay: MakeBay) -> None:
    bay = make_bay()
    [item] = chunks_of("a", 1)
    for memory in bay.node.memories:
        await store_all(memory, [item])
    bay.request([item])
    await bay.node.memories[0].remove([item.chunk.key])
    async with bay.running():
        await bay.settle()
    bay.assert_here([item])
    assert bay.ended == [(item.chunk.key, 1)]
    assert not bay.node.meter.errors, "being gone is no error"


async def test_a_chunk_that_cannot_be_read_is_taken_from_the_next_tier(make_bay: MakeBay) -> None:
    bay = make_bay(lambda tier: Faulty(tier, Faults(fail=1.0), seed=1))
    items = chunks_of("a", 3)
    for memory in bay.node.memories:
        await store_all(memory, items)
    bay.request(items)
    async with bay.running():
        await bay.settle()
    bay.assert_here(items)
    assert dict(bay.ended) == dict.fromkeys(keys_of(items), 1)
    assert bay.node.meter.errors == {("load_G3", "failed"): 3}


@pytest.mark.parametrize("damaged", [0, 1])
async def test_a_chunk_that_no_tier_can_give_ends_as_failed(
    make_bay: MakeBay, damaged: int
) -> None:
    bay = make_bay()
    [item] = chunks_of("a", 1)
    for memory in bay.node.memories[damaged:]:
        await store_all(memory, [item])
        memory.contents[item.chunk.key][-1] ^= 1
    bay.request([item], tier=damaged)
    async with bay.running():
        await bay.settle()
    assert bay.ended == [(item.chunk.key, -1)]
    assert item.chunk.key not in bay.node.dram
    assert bay.node.dram.leased_bytes == bay.node.dram.usage().used_bytes == 0
    assert sum(bay.node.meter.errors.values()) == 2 - damaged


async def test_without_room_a_request_ends_as_failed(make_bay: MakeBay) -> None:
    bay = make_bay(dram_bytes=4 * CHUNK_BYTES)
    items = chunks_of("a", 6)
    await store_all(bay.node.memories[0], items)
    slots = bay.node.manager.lease(CHUNK_BYTES, 2)
    assert len(slots) == 2
    assert bay.request(items)
    async with bay.running():
        await bay.settle()
        ended = dict(bay.ended)
        assert sorted(ended.values()) == [NO_ROOM] * 4 + [0, 0]
        assert bay.node.meter.drops == {("onboard", "no_room"): 4}
        bay.node.manager.give_back(slots)
        bay.request([item for item in items if ended[item.chunk.key] == NO_ROOM][:2])
        await bay.settle()
    assert [tier for _, tier in bay.ended[6:]] == [0, 0], "room came back"


async def test_room_is_made_of_chunks_that_nobody_claims(make_bay: MakeBay) -> None:
    bay = make_bay(dram_bytes=4 * CHUNK_BYTES)
    resident = chunks_of("resident", 4, chained=False)
    bay.node.commit(resident)
    claimed = [bay.node.dram.claim(key) for key in keys_of(resident[:2])]
    items = chunks_of("a", 2)
    await store_all(bay.node.memories[0], items)
    bay.request(items)
    async with bay.running():
        await bay.settle()
    bay.assert_here(items)
    kept = [chunk is not None for chunk in bay.node.dram.find(keys_of(resident))]
    assert kept == [True, True, False, False]
    for each in claimed:
        assert each is not None
        bay.node.dram.unclaim(each)


async def test_a_full_queue_answers_at_once_and_is_counted(make_bay: MakeBay) -> None:
    bay = make_bay(queue_chunks=3)
    items = chunks_of("a", 5)
    await store_all(bay.node.memories[0], items)
    assert [bay.request([item]) for item in items] == [True, True, True, False, False]
    assert bay.request(items[:1]), "it waits already"
    assert bay.node.meter.drops == {("onboard", "queue_full"): 2}
    assert items[4].chunk.key not in bay.onboarder
    async with bay.running():
        await bay.settle()
        assert [key for key, _ in bay.ended] == keys_of(items[:3])
        assert bay.request(items[3:])
        await bay.settle()
    bay.assert_here(items)


async def test_a_chunk_that_finds_the_next_queue_full_ends_as_failed(make_bay: MakeBay) -> None:
    gate = Gate()
    bay = make_bay(lambda tier: tier, gated(gate), queue_chunks=WORKERS_PER_TIER * BATCH_CHUNKS)
    fill = chunks_of("fill", 4 * WORKERS_PER_TIER * BATCH_CHUNKS)
    [item] = chunks_of("a", 1)
    for memory in bay.node.memories:
        await store_all(memory, [item])
    await store_all(bay.node.memories[1], fill)
    async with bay.running():
        while bay.request([fill.pop()], tier=1):
            await asyncio.sleep(0)
        bay.node.memories[0].contents[item.chunk.key][0] ^= 1
        bay.request([item])
        await until(lambda: bay.ended)
        assert bay.ended == [(item.chunk.key, -1)]
        gate.open()
        await bay.settle()
    assert bay.node.dram.leased_bytes == 0


async def test_a_fault_in_a_tier_fails_what_it_had_and_no_more(make_bay: MakeBay) -> None:
    faults = [RuntimeError("a bug")]

    async def sleep(seconds: float) -> None:
        if faults:
            raise faults.pop()

    bay = make_bay(lambda tier: Faulty(tier, Faults(delay=1.0), seed=1, sleep=sleep))
    first, second = chunks_of("first", 3), chunks_of("second", 3)
    await store_all(bay.node.memories[0], [*first, *second])
    async with bay.running():
        bay.request(first)
        await bay.settle()
        assert dict(bay.ended) == dict.fromkeys(keys_of(first), -1)
        assert bay.node.dram.leased_bytes == 0
        bay.request(second)
        await bay.settle()
    bay.assert_here(second)
    assert bay.node.meter.errors == {("load_G3", "fault"): 1}


# -- withdrawn --------------------------------------------------------------------------


async def test_a_withdrawn_chunk_is_not_loaded(make_bay: MakeBay) -> None:
    bay = make_bay()
    items = chunks_of("a", 3)
    await store_all(bay.node.memories[0], items)
    bay.request(items)
    bay.onboarder.withdraw(items[1].chunk.key)
    bay.onboarder.withdraw(chunks_of("never asked for", 1)[0].chunk.key)
    assert items[1].chunk.key not in bay.onboarder
    async with bay.running():
        await bay.settle()
    assert [key for key, _ in bay.ended] == keys_of([items[0], items[2]])
    assert items[1].chunk.key not in bay.node.dram
    assert bay.node.memories[0].usage().loaded_bytes_total == 2 * CHUNK_BYTES


async def test_a_withdrawn_chunk_can_be_asked_for_again(make_bay: MakeBay) -> None:
    bay = make_bay()
    [item] = chunks_of("a", 1)
    await store_all(bay.node.memories[1], [item])
    bay.request([item], tier=1)
    bay.onboarder.withdraw(item.chunk.key)
    bay.request([item], tier=1)
    async with bay.running():
        await bay.settle()
    assert bay.ended == [(item.chunk.key, 1)]


async def test_a_chunk_withdrawn_on_its_way_still_lands(make_bay: MakeBay) -> None:
    gate = Gate()
    bay = make_bay(gated(gate))
    [item] = chunks_of("a", 1)
    await store_all(bay.node.memories[0], [item])
    async with bay.running():
        bay.request([item])
        await until(lambda: gate.waiting)
        bay.onboarder.withdraw(item.chunk.key)
        assert item.chunk.key in bay.onboarder
        gate.open()
        await bay.settle()
    bay.assert_here([item])
    assert bay.ended == [(item.chunk.key, 0)]


async def test_a_chunk_passed_on_can_be_withdrawn_from_the_next_queue(make_bay: MakeBay) -> None:
    gate = Gate()
    bay = make_bay(lambda tier: tier, gated(gate))
    busy = chunks_of("busy", WORKERS_PER_TIER * BATCH_CHUNKS, 4096)
    [item] = chunks_of("a", 1)
    for memory in bay.node.memories:
        await store_all(memory, [item])
    await store_all(bay.node.memories[1], busy)
    bay.node.memories[0].contents[item.chunk.key][0] ^= 1
    async with bay.running():
        bay.request(busy, tier=1)
        await until(lambda: gate.waiting == WORKERS_PER_TIER)
        bay.request([item])
        await until(lambda: bay.onboarder.depth == {"G3": 0, "G4": 1})
        bay.onboarder.withdraw(item.chunk.key)
        assert bay.onboarder.depth == {"G3": 0, "G4": 0}
        gate.open()
        await bay.settle()
    assert item.chunk.key not in dict(bay.ended)
    assert item.chunk.key not in bay.node.dram


# -- slow tiers and bounds --------------------------------------------------------------


async def test_a_slow_tier_does_not_delay_another(make_bay: MakeBay) -> None:
    gate = Gate()
    bay = make_bay(lambda tier: tier, lambda tier: Throttled(tier, bytes_per_s=1.0, sleep=gate))
    slow, fast = chunks_of("slow", 30), chunks_of("fast", 30)
    for memory, items in zip(bay.node.memories, (fast, slow), strict=True):
        await store_all(memory, items)
    async with bay.running():
        bay.request(slow, tier=1)
        await until(lambda: gate.waiting)
        bay.request(fast)
        await until(lambda: len(bay.ended) == len(fast))
        bay.assert_here(fast)
        gate.open()
        await bay.settle()
    bay.assert_here(slow)


async def test_bytes_in_flight_stay_within_their_bound(make_bay: MakeBay) -> None:
    gate = Gate()
    bound = 4 * CHUNK_BYTES  # half for each of the two tiers
    bay = make_bay(gated(gate), gated(gate), bytes_in_flight=bound)
    items = chunks_of("a", 20)
    await store_all(bay.node.memories[0], items[:10])
    await store_all(bay.node.memories[1], items[10:])
    most = 0
    async with bay.running():
        bay.request(items[:10])
        bay.request(items[10:], tier=1)
        await until(lambda: gate.waiting)
        for _ in range(20):
            most = max(most, bay.node.dram.leased_bytes)
            await asyncio.sleep(0.001)
        assert most == bound
        gate.open()
        while bay.onboarder._pending:
            most = max(most, bay.node.dram.leased_bytes)
            await asyncio.sleep(0)
    assert most == bound
    bay.assert_here(items)


async def test_a_chunk_larger_than_the_bound_comes_up_alone(make_bay: MakeBay) -> None:
    bay = make_bay(bytes_in_flight=CHUNK_BYTES // 2)
    items = chunks_of("a", 5)
    await store_all(bay.node.memories[0], items)
    bay.request(items)
    async with bay.running():
        await bay.settle()
    bay.assert_here(items)
    assert bay.onboarder.limits == {"G3": 1000, "G4": 1000}
