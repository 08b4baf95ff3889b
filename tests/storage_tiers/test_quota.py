"""A tenant's quota in each tier: beyond it, it displaces its own chunks and nobody else's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from storage_tiers.arena import Arena
from storage_tiers.base import (
    Full,
    Known,
    RemovalReason,
    SilentListener,
    Stored,
    StoreItem,
    Tier,
    tenant_of,
)
from storage_tiers.dram import DramTier
from storage_tiers.ssd import SsdTier
from storage_tiers.testing import RecordingListener, make_items, make_key

LENGTH = 65536
GREEDY, MODEST = 1, 2


def items_of(tenant: int, name: str, count: int) -> list[StoreItem]:
    """Chunks of no sequence, all of one tenant."""
    return [
        replace(item, chunk=replace(item.chunk, key=make_key(f"{name}{n}", tenant)))
        for n, item in enumerate(make_items(name, count, LENGTH, chained=False))
    ]


def kept(tier: Tier, items: list[StoreItem]) -> list[bool]:
    return [found is not None for found in tier.find([item.chunk.key for item in items])]


def test_in_host_memory_a_tenant_beyond_its_quota_gives_up_its_own() -> None:
    listener = RecordingListener()
    dram = DramTier(Arena.create(64 * LENGTH), listener, quotas={GREEDY: 4 * LENGTH})
    modest, greedy = items_of(MODEST, "modest", 10), items_of(GREEDY, "greedy", 12)
    for item in (*modest, *greedy):
        slot = dram.reserve(LENGTH)
        assert slot is not None
        assert dram.refusal(item.chunk) is None
        assert dram.commit(slot, item.chunk) == Stored()
    assert all(kept(dram, modest))
    assert kept(dram, greedy) == [False] * 8 + [True] * 4
    assert {reason for _, reason in listener.went} == {RemovalReason.QUOTA}
    dram.check_integrity()


def test_in_host_memory_a_tenant_that_holds_all_it_has_gets_no_more() -> None:
    dram = DramTier(Arena.create(64 * LENGTH), SilentListener(), quotas={GREEDY: 2 * LENGTH})
    first, second, third = items_of(GREEDY, "greedy", 3)
    for item in (first, second):
        slot = dram.reserve(LENGTH)
        assert slot is not None
        dram.commit(slot, item.chunk)
        assert dram.claim(item.chunk.key) is not None
    assert dram.refusal(third.chunk) == "quota"


async def test_on_the_ssd_too_also_within_one_batch(tmp_path: Path) -> None:
    listener = RecordingListener()
    tier = SsdTier(tmp_path, 64 * LENGTH, listener, quotas={GREEDY: 4 * LENGTH})
    await tier.open()
    modest, greedy = items_of(MODEST, "modest", 10), items_of(GREEDY, "greedy", 12)
    await tier.store(modest)
    for batch in (greedy[:3], greedy[3:6], greedy[6:]):
        outcomes = await tier.store(batch)
        assert all(isinstance(outcome, Stored | Full) for outcome in outcomes)
        assert sum(kept(tier, greedy)) <= 4
        tier.check_integrity()
    assert {o.cause for o in outcomes if isinstance(o, Full)} == {"quota"}
    assert all(kept(tier, modest)) and sum(kept(tier, greedy)) == 4
    assert {reason for _, reason in listener.went} == {RemovalReason.QUOTA}
    await tier.close()


async def test_a_quota_holds_over_a_restart(tmp_path: Path) -> None:
    """Whose a chunk is, its key says."""
    tier = SsdTier(tmp_path, 64 * LENGTH, SilentListener())
    await tier.open()
    greedy = items_of(GREEDY, "greedy", 8)
    await tier.store(greedy)
    await tier.close()
    again = SsdTier(tmp_path, 64 * LENGTH, SilentListener(), quotas={GREEDY: 8 * LENGTH})
    await again.open()
    [more] = items_of(GREEDY, "more", 1)
    assert await again.store([more]) == [Stored()]
    assert sum(kept(again, greedy)) == 7
    assert await again.store([more]) == [Known()]
    await again.close()


@pytest.mark.parametrize("tag", [0, 7, 255])
def test_the_tag_is_the_key_s_last_byte(tag: int) -> None:
    key = make_key("a", tag)
    assert tenant_of(key) == tag and key[:-1] == make_key("a")[:-1]
