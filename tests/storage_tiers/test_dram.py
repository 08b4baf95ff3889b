"""Host memory: the contract of every tier, then leases and claims."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage_tiers.arena import Arena
from storage_tiers.base import Chunk, Key, Known, RemovalReason, Stored, Tier, TierListener
from storage_tiers.dram import DramTier
from storage_tiers.testing import RecordingListener, TierConformance, make_items, make_key


class TestDramTier(TierConformance):
    def make(self, listener: TierListener) -> DramTier:
        return DramTier(Arena.create(self.capacity_bytes), listener)

    async def corrupt(self, tier: Tier, key: Key) -> None:
        assert isinstance(tier, DramTier)
        resident = tier.claim(key)
        assert resident is not None
        tier.view(tier.slot(resident))[0] ^= 1
        tier.unclaim(resident)


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture
def dram(listener: RecordingListener) -> Iterator[DramTier]:
    tier = DramTier(Arena.create(1 << 20), listener)
    yield tier
    tier.check_integrity()


def put(tier: DramTier, name: str, length: int = 65536, parent: Key | None = None) -> Chunk:
    slot = tier.reserve(length)
    assert slot is not None
    position = 0 if parent is None else 1
    chunk = Chunk(make_key(name), length, 0, parent, position)
    assert tier.commit(slot, chunk) == Stored()
    return chunk


def test_a_claimed_chunk_is_not_evicted(dram: DramTier) -> None:
    kept = dram.claim(put(dram, "kept").key)
    assert kept is not None
    for index in range(40):
        put(dram, f"other{index}")
    assert make_key("kept") in dram
    dram.unclaim(kept)
    for index in range(40, 80):
        put(dram, f"other{index}")
    assert make_key("kept") not in dram


def test_when_everything_is_claimed_or_leased_there_is_no_room(dram: DramTier) -> None:
    slots = []
    while (slot := dram.reserve(65536)) is not None:
        slots.append(slot)
    assert len(slots) == 16
    assert dram.leased_bytes == 1 << 20
    dram.release(slots.pop())
    assert dram.reserve(65536) is not None


def test_a_slot_changes_its_generation_whenever_it_changes_hands(dram: DramTier) -> None:
    slot = dram.reserve(4096)
    assert slot is not None
    assert dram.arena.generation(slot.offset) == slot.generation
    chunk = Chunk(make_key("a"), 4096, 0, None, 0)
    dram.commit(slot, chunk)
    assert dram.arena.generation(slot.offset) == slot.generation, "committing keeps the holder"
    dram.quarantine(chunk.key)
    assert dram.arena.generation(slot.offset) != slot.generation


def test_committing_a_known_key_frees_the_second_slot(dram: DramTier) -> None:
    chunk = put(dram, "a")
    used = dram.usage().used_bytes
    slot = dram.reserve(65536)
    assert slot is not None
    assert dram.commit(slot, chunk) == Known()
    assert dram.usage().used_bytes == used
    with pytest.raises(ValueError, match="not leased"):
        dram.release(slot)


def test_a_chunk_removed_while_claimed_keeps_its_bytes_until_the_last_claim(
    dram: DramTier,
) -> None:
    chunk = put(dram, "a")
    first, second = dram.claim(chunk.key), dram.claim(chunk.key)
    assert first is not None and second is not None
    used = dram.usage().used_bytes
    dram.quarantine(chunk.key)
    assert chunk.key not in dram
    dram.unclaim(first)
    assert dram.usage().used_bytes == used
    dram.unclaim(second)
    assert dram.usage().used_bytes == used - 65536


def test_memory_moves_between_chunk_sizes(dram: DramTier, listener: RecordingListener) -> None:
    for index in range(16):
        put(dram, f"small{index}", 65536)
    big = put(dram, "big", 300_000)
    assert big.key in dram
    for index in range(30):
        put(dram, f"tiny{index}", 4096)
    assert {reason for _, reason in listener.went} == {RemovalReason.CAPACITY}


async def test_a_parent_link_that_forms_a_circle_does_no_harm(dram: DramTier) -> None:
    """Keys and parents come from engines; nothing they claim may hang the daemon."""
    one, other = make_key("one"), make_key("other")
    for key, parent in ((one, other), (other, one)):
        slot = dram.reserve(4096)
        assert slot is not None
        dram.commit(slot, Chunk(key, 4096, 0, parent, 3))
        dram.touch([key])
    dram.touch([one, other])
    assert one in dram and other in dram


async def test_touching_a_leaf_makes_its_ancestors_more_recent(dram: DramTier) -> None:
    items = make_items("a", 4, 65536)
    await dram.store(items)
    put(dram, "other")
    dram.touch([items[3].chunk.key])
    while make_key("other") in dram:
        put(dram, f"filler{dram.usage().stored_bytes_total}")
    assert all(item.chunk.key in dram for item in items)
    left: list[Key] = []
    while any(item.chunk.key in dram for item in items):
        there = [item for item in items if item.chunk.key in dram]
        put(dram, f"more{dram.usage().stored_bytes_total}")
        left += [item.chunk.key for item in there if item.chunk.key not in dram]
    assert left == [item.chunk.key for item in reversed(items)]
