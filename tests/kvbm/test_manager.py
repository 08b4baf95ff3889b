"""The block manager: what a match says, what a ticket holds, and what is announced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.manager import Catalogue, Wanted
from kvbm.note_dict import NoteDict
from kvbm.offload import LaneSettings
from kvbm.protocol import COMING, HERE, MISS, PRESENT, unpack_slots
from storage_tiers.arena import Slot
from storage_tiers.base import Chunk, LoadItem, RemovalReason, StoreItem, TierName
from storage_tiers.faulty import Faults, Faulty
from storage_tiers.memory import MemoryTier
from storage_tiers.testing import make_key, store_all
from storage_tiers.throttled import Throttled
from tests.kvbm import builders
from tests.kvbm.builders import (
    CHUNK_BYTES,
    Gate,
    Node,
    RecordingEvents,
    chunks_of,
    keys_of,
    until,
    wanted,
)

MakeNode = Callable[..., Node]


async def place(node: Node, items: Sequence[StoreItem], tiers: str) -> None:
    """Put the n-th chunk where the n-th letter says: 2, 3, 4 for that tier, a dot for nowhere."""
    for item, where in zip(items, tiers, strict=True):
        if where == "2":
            node.commit([item])
        elif where != ".":
            await store_all(node.memories[int(where) - 3], [item])


def spell(states: Sequence[int]) -> str:
    letters = {MISS: ".", HERE: "H", COMING: "C", PRESENT: "p"}
    return "".join(letters[state] for state in states)


# -- matches ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiers", "states"),
    [
        ("22222", "HHHHH"),
        ("22344", "HHCCC"),
        ("43232", "CCHCH"),
        ("22.22", "HH.pp"),
        (".2343", ".pppp"),
        ("3....", "C...."),
        (".....", "....."),
        ("2.3.4", "H.p.p"),
    ],
)
async def test_without_a_window_everything_before_the_first_gap_is_used(
    node: Node, tiers: str, states: str
) -> None:
    items = chunks_of("a", 5)
    await place(node, items, tiers)
    asked = node.match(wanted(items))
    assert spell(asked.states) == states
    assert asked.here == {index: 2 for index, state in enumerate(states) if state == "H"}
    async with node.running():
        await node.settle()
    coming = {index for index, state in enumerate(states) if state == "C"}
    assert asked.landed == {index: int(tiers[index]) for index in coming}
    assert not asked.failed
    node.manager.close(asked.ticket)
    assert node.dram.claims == 0


@pytest.mark.parametrize(
    ("full", "sliding", "window", "states"),
    [
        # the sliding group reaches as far as the other does, its window ends there
        ("222222", "333333", 2, "HHHHHHpppCCC"),
        ("2222..", "333333", 2, "HHHH..pCCCpp"),
        ("2222..", "222222", 2, "HHHH..HHHHpp"),
        ("......", "333333", 2, "......pppppp"),
        ("222222", "3.3.33", 1, "HHHHHHp.p.CC"),
        ("222222", "333333", 9, "HHHHHHCCCCCC"),
        ("222222", "333.33", 2, "HHHHHHppp.CC"),
    ],
)
async def test_of_a_sliding_window_only_the_end_comes_up(
    node: Node, full: str, sliding: str, window: int, states: str
) -> None:
    items, others = chunks_of("full", 6), chunks_of("sliding", 6)
    await place(node, items, full)
    await place(node, others, sliding)
    asked = node.match(wanted(items), wanted(others, window=window))
    assert spell(asked.states) == states
    node.manager.close(asked.ticket)


async def test_a_sliding_window_alone_ends_with_the_request(node: Node) -> None:
    items = chunks_of("a", 6)
    await place(node, items, "333.33")
    asked = node.match(wanted(items, window=1))
    assert spell(asked.states) == "ppp.CC"
    node.manager.close(asked.ticket)


async def test_groups_of_different_chunk_sizes_reach_equally_many_tokens(node: Node) -> None:
    """48 tokens: three chunks of 16, and of the 32-token chunks the second only in part."""
    small, large = chunks_of("small", 6), chunks_of("large", 3)
    await place(node, small, "222.22")
    await place(node, large, "333")
    asked = node.match(wanted(small), wanted(large, window=3, tokens_per_chunk=32))
    assert spell(asked.states) == "HHH.ppCCp"
    node.manager.close(asked.ticket)


PLACES = st.text("234.", min_size=1, max_size=6)
GROUPS = st.lists(st.tuples(PLACES, st.integers(0, 3), st.sampled_from([16, 32])), max_size=3)


@given(GROUPS)
@settings(max_examples=80, deadline=None)
def test_any_match_is_as_long_as_its_full_groups_allow(
    groups: list[tuple[str, int, int]],
) -> None:
    async def run() -> None:
        node = builders.make_node()
        asked_for: list[Wanted] = []
        for number, (tiers, window, tokens) in enumerate(groups):
            items = chunks_of(f"group{number}", len(tiers), 4096)
            await place(node, items, tiers)
            asked_for.append(wanted(items, window=window, tokens_per_chunk=tokens))
        ends = [len(tiers) * tokens for tiers, _, tokens in groups] + [
            (tiers + ".").index(".") * tokens for tiers, window, tokens in groups if not window
        ]
        expected = ""
        for tiers, window, tokens in groups:
            end = -(-min(ends) // tokens)
            for index, tier in enumerate(tiers):
                in_window = not window or index >= end - window - 1
                if tier == ".":
                    expected += "."
                elif index >= end or (tier != "2" and not in_window):
                    expected += "p"
                else:
                    expected += "H" if tier == "2" else "C"
        asked = node.match(*asked_for)
        assert spell(asked.states) == expected
        assert node.dram.claims == expected.count("H")
        async with node.running():
            await node.settle()
        assert node.dram.claims == expected.count("H") + expected.count("C")
        node.manager.close(asked.ticket)
        assert node.dram.claims == 0
        node.check()
        node.arena.close()

    asyncio.run(run())


async def test_the_answer_names_the_slots_that_hold_the_bytes(node: Node) -> None:
    items = chunks_of("a", 3)
    await place(node, items, "232")
    asked = node.match(wanted(items))
    async with node.running():
        await node.settle()
    slots = {index: slot for index, _, slot in unpack_slots(asked.ticket.here)}
    slots |= {i: slot for told in asked.arrivals for i, _, slot in told.landed}
    assert sorted(slots) == [0, 1, 2]
    for index, slot in slots.items():
        assert node.dram.view(slot) == items[index].data
        assert node.arena.generation(slot.offset) == slot.generation
    node.manager.close(asked.ticket)


async def test_a_match_counts_its_lookups_tier_by_tier(node: Node) -> None:
    items = chunks_of("a", 4)
    await place(node, items, "234.")
    asked = node.match(wanted(items))
    assert node.meter.lookups == {
        ("G2", "hit"): 1,
        ("G2", "miss"): 3,
        ("G3", "hit"): 1,
        ("G3", "miss"): 2,
        ("G4", "hit"): 1,
        ("G4", "miss"): 1,
    }
    node.manager.close(asked.ticket)


async def test_a_matched_chunk_outlives_one_that_nobody_asked_for(make_node: MakeNode) -> None:
    node = make_node(dram_bytes=8 * CHUNK_BYTES)
    asked_for, other = chunks_of("asked for", 3), chunks_of("other", 3)
    node.commit(asked_for)
    node.commit(other)
    node.manager.close(node.match(wanted(asked_for)).ticket)
    node.commit(chunks_of("new", 5, chained=False))
    assert all(node.dram.find(keys_of(asked_for)))
    assert not any(node.dram.find(keys_of(other)))


# -- tickets ----------------------------------------------------------------------------


async def test_what_is_here_stays_until_its_ticket_is_closed(make_node: MakeNode) -> None:
    node = make_node(dram_bytes=8 * CHUNK_BYTES)
    items = chunks_of("a", 3)
    node.commit(items)
    asked = node.match(wanted(items))
    for index in range(20):
        node.commit(chunks_of(f"other{index}", 1))
    for index, _, slot in unpack_slots(asked.ticket.here):
        assert node.dram.view(slot) == items[index].data
        assert node.arena.generation(slot.offset) == slot.generation
    node.manager.close(asked.ticket)
    node.manager.close(asked.ticket)
    assert node.dram.claims == 0
    for index in range(20):
        node.commit(chunks_of(f"more{index}", 1))
    assert not any(node.dram.find(keys_of(items)))


async def test_everyone_who_waits_for_a_chunk_gets_it_from_one_load(node: Node) -> None:
    items = chunks_of("a", 4)
    await place(node, items, "3344")
    whole, part = node.match(wanted(items)), node.match(wanted(items[:3]))
    reverse = node.match(wanted(items[3:]), wanted(items[2:3]))
    assert spell(reverse.states) == "CC"
    async with node.running():
        await node.settle()
    assert whole.landed == {0: 3, 1: 3, 2: 4, 3: 4}
    assert part.landed == {0: 3, 1: 3, 2: 4}
    assert reverse.landed == {0: 4, 1: 4}
    assert node.meter.transfer_bytes["G3", "G2"] == 2 * CHUNK_BYTES
    assert node.dram.claims == 9
    for asked in (whole, part, reverse):
        node.manager.close(asked.ticket)
    assert node.dram.claims == 0


async def test_closing_a_ticket_withdraws_what_only_it_waits_for(node: Node) -> None:
    items = chunks_of("a", 3)
    await place(node, items, "333")
    one, other = node.match(wanted(items)), node.match(wanted(items[:1]))
    node.manager.close(one.ticket)
    node.check()
    assert node.manager.onboarder.depth == {"G3": 1, "G4": 0}
    async with node.running():
        await node.settle()
    assert not one.arrivals
    assert other.landed == {0: 3}
    assert not any(node.dram.find(keys_of(items[1:])))
    node.manager.close(other.ticket)


async def test_a_chunk_whose_ticket_closed_on_its_way_lands_unclaimed(make_node: MakeNode) -> None:
    gate = Gate()
    node = make_node(lambda tier: Throttled(tier, bytes_per_s=1, sleep=gate))
    items = chunks_of("a", 2)
    for item in items:
        await node.memories[0].store([item])
    async with node.running():
        gone, late = node.match(wanted(items)), node.match(wanted(items[:1]))
        await until(lambda: gate.waiting)
        node.manager.close(gone.ticket)
        later = node.match(wanted(items))
        assert spell(later.states) == "CC", "it is still on its way"
        gate.open()
        await node.settle()
    assert not gone.arrivals
    assert late.landed == {0: 3}
    assert later.landed == {0: 3, 1: 3}
    assert node.dram.claims == 3
    node.manager.close(late.ticket)
    node.manager.close(later.ticket)
    assert node.dram.claims == 0


async def test_what_cannot_come_is_told_as_failed(make_node: MakeNode) -> None:
    node = make_node(lambda tier: Faulty(tier, Faults(fail=1.0), seed=1))
    items = chunks_of("a", 3)
    await place(node, items[1:2], "4")
    for item in items[:2]:
        await node.memories[0].store([item])
    asked = node.match(wanted(items))
    assert spell(asked.states) == "CC."
    async with node.running():
        await node.settle()
    assert asked.failed == [0]
    assert asked.landed == {1: 4}
    node.manager.close(asked.ticket)


async def test_what_finds_no_room_is_told_as_failed(make_node: MakeNode) -> None:
    node = make_node(dram_bytes=4 * CHUNK_BYTES)
    items = chunks_of("a", 6)
    await place(node, items, "333333")
    asked = node.match(wanted(items))
    async with node.running():
        await node.settle()
    assert len(asked.landed) + len(asked.failed) == 6
    assert len(asked.failed) == 2
    node.manager.close(asked.ticket)


async def test_what_finds_the_queue_full_is_present_but_not_coming(node: Node) -> None:
    node.manager.onboarder._lanes[0].capacity_chunks = 2
    items = chunks_of("a", 4)
    await place(node, items, "3333")
    asked = node.match(wanted(items))
    assert spell(asked.states) == "CCpp"
    assert node.meter.drops == {("onboard", "queue_full"): 2}
    async with node.running():
        await node.settle()
    assert asked.landed == {0: 3, 1: 3}
    node.manager.close(asked.ticket)


async def test_a_ticket_may_be_closed_from_within_its_notification(node: Node) -> None:
    [item] = chunks_of("a", 1)
    await place(node, [item], "3")
    told = []

    def notify(arrivals: object) -> None:
        told.append(arrivals)
        node.manager.close(ticket)

    ticket = node.manager.match([wanted([item])], notify)
    async with node.running():
        await node.settle()
    assert len(told) == 1
    assert node.dram.claims == 0


# -- slots ------------------------------------------------------------------------------


async def test_committing_a_known_key_frees_its_slot(node: Node) -> None:
    items = chunks_of("a", 2)
    node.commit(items[:1])
    used = node.dram.usage().used_bytes
    slots = node.manager.lease(CHUNK_BYTES, 2)
    node.manager.commit(node.fill(slots, items))
    assert node.dram.usage().used_bytes == used + CHUNK_BYTES
    assert node.dram.leased_bytes == 0
    announced = [key for _, _, key in node.events.announced]
    assert announced == keys_of(items), "each once"
    assert node.manager.offloader.depth["seal"] == 2


async def test_the_same_key_twice_in_one_commit_is_kept_once(node: Node) -> None:
    [item] = chunks_of("a", 1)
    slots = node.manager.lease(CHUNK_BYTES, 2)
    node.manager.commit(node.fill(slots, [item, item]))
    assert node.dram.usage().used_bytes == CHUNK_BYTES
    assert len(node.events.announced) == 1


@pytest.mark.parametrize("length", [4096, 5000, 8192, 10_000])
async def test_leases_stay_within_their_bound(make_node: MakeNode, length: int) -> None:
    bound = 22_000  # no multiple of what a slot takes
    node = make_node(lease_bytes_max=bound)
    slots = node.manager.lease(length, 100)
    assert slots
    assert node.dram.leased_bytes <= bound
    assert node.manager.lease(length, 1) == []
    assert not node.meter.drops, "a spent budget is no lack of room"
    node.manager.give_back(slots[:1])
    assert len(node.manager.lease(length, 100)) == 1
    node.manager.give_back(slots[1:])


async def test_a_lease_without_room_is_shorter_and_counted(make_node: MakeNode) -> None:
    node = make_node(dram_bytes=8 * CHUNK_BYTES)
    node.commit(chunks_of("claimed", 5))
    asked = node.match(wanted(chunks_of("claimed", 5)))
    slots = node.manager.lease(CHUNK_BYTES, 10)
    assert len(slots) == 3
    assert len({slot.offset for slot in slots}) == 3
    assert node.meter.drops == {("lease", "no_room"): 7}
    node.manager.close(asked.ticket)
    slots += node.manager.lease(CHUNK_BYTES, 10)
    assert len(slots) == 8
    node.manager.give_back(slots)
    assert node.dram.leased_bytes == 0


async def test_a_slot_that_is_not_leased_can_neither_be_given_back_nor_committed(
    node: Node,
) -> None:
    [slot] = node.manager.lease(CHUNK_BYTES, 1)
    stale = Slot(slot.offset, slot.length, slot.generation - 1)
    with pytest.raises(ValueError, match="not leased"):
        node.manager.give_back([stale])
    with pytest.raises(ValueError, match="not leased"):
        node.manager.commit([(stale, Chunk(make_key("a"), CHUNK_BYTES, 0, None, 0))])
    node.manager.give_back([slot])


# -- announcements ----------------------------------------------------------------------


async def test_what_is_announced_is_what_is_there(make_node: MakeNode) -> None:
    """Everything at once in tiers too small for it: the announcements replay to the truth."""
    sizes = {"dram_bytes": 16 * CHUNK_BYTES, "lower_bytes": (24 * CHUNK_BYTES, 40 * CHUNK_BYTES)}
    node = make_node(**sizes, settings=LaneSettings(batch_chunks=4))
    async with node.running():
        for index in range(40):
            items = chunks_of(f"sequence{index % 15}", 1 + index % 5)
            node.commit(items)
            if index % 3 == 0:
                await node.settle()
            if index % 7 == 0 and node.memories[0].contents:
                key = next(iter(node.memories[0].contents))
                node.memories[0].contents[key][0] ^= 1
            asked = node.match(wanted(chunks_of(f"sequence{(index + 4) % 15}", 5)))
            await node.settle()
            assert node.events.replay() == node.residencies()
            node.manager.close(asked.ticket)
    kinds = {(change, tier) for change, tier, _ in node.events.announced}
    assert len(kinds) == 6, "every tier gained and lost chunks"
    assert node.dram.claims == node.dram.leased_bytes == 0


async def test_a_chunk_evicted_by_its_own_batch_is_not_announced_as_there(
    make_node: MakeNode,
) -> None:
    """A tier smaller than a batch evicts the batch's first chunks for its last ones."""
    node = make_node(lower_bytes=(2 * CHUNK_BYTES, 1 << 22))
    node.commit(chunks_of("a", 5, chained=False))
    async with node.running():
        await node.settle()
    assert len(node.memories[0].contents) == 2
    assert node.events.replay() == node.residencies()


async def test_a_chunk_found_damaged_while_its_store_returns_is_not_announced_as_there(
    make_node: MakeNode,
) -> None:
    """Known to the tier, but its store has not returned yet, when somebody loads it."""
    gate = Gate()
    slow: list[Throttled] = []

    def wrap(tier: MemoryTier) -> Throttled:
        slow.append(Throttled(tier, bytes_per_s=1, sleep=gate))
        return slow[-1]

    node = make_node(wrap)
    [item] = chunks_of("a", 1)
    async with node.running():
        node.commit([item])
        await until(lambda: gate.waiting)
        node.memories[0].contents[item.chunk.key][0] ^= 1
        buffer = memoryview(bytearray(CHUNK_BYTES))
        await node.memories[0].load([LoadItem(item.chunk.key, buffer)])
        gate.open()
        await node.settle()
    assert not node.memories[0].contents
    assert node.events.replay() == node.residencies()


async def test_a_chunk_that_lands_is_announced_and_goes_to_the_tiers_that_lack_it(
    node: Node,
) -> None:
    items = chunks_of("a", 3)
    await place(node, items, "444")
    asked = node.match(wanted(items))
    async with node.running():
        await node.settle()
    assert {(TierName.DRAM, key) for key in keys_of(items)} <= node.events.replay()
    assert {(TierName.SSD, key) for key in keys_of(items)} <= node.events.replay()
    assert node.memories[0].contents.keys() == set(keys_of(items))
    node.manager.close(asked.ticket)


async def test_what_a_tier_finds_by_itself_is_announced() -> None:
    events = RecordingEvents()
    notes = NoteDict(events)
    catalogue = Catalogue(notes, notes)
    keys = [make_key("a"), make_key("b")]
    catalogue.appeared(TierName.S3, keys)
    assert events.replay() == {(TierName.S3, key) for key in keys}
    catalogue.removed(TierName.S3, keys[:1], RemovalReason.AGE)
    assert events.replay() == {(TierName.S3, keys[1])}
