"""Extents out of use: over restarts, given back; and the scrub that finds what belongs there."""

from __future__ import annotations

from pathlib import Path

import lmdb

from storage_tiers.base import Corrupt, Failed, Loaded, StoreItem, SupportsScrub
from storage_tiers.leaves import NONE
from storage_tiers.ssd import SsdTier
from storage_tiers.testing import load_one, make_items, store_all
from tests.storage_tiers.test_ssd import flip_bit, offset_of, tier_at

MIB = 1 << 20
CHUNK = 65536


async def spoilt(tier: SsdTier, path: Path, name: str) -> tuple[StoreItem, int]:
    """A chunk whose extent was set aside, and where that is."""
    [item] = make_items(name, 1, CHUNK)
    await store_all(tier, [item])
    offset = offset_of(tier, item.chunk.key)
    flip_bit(path, offset)
    assert isinstance((await load_one(tier, item))[0], Corrupt)
    return item, offset


async def test_an_extent_set_aside_stays_out_of_use_over_restarts(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    item, offset = await spoilt(tier, tmp_path, "bad")
    listed = list(tier.aside())
    await tier.close()
    for recover in ("quiet", "strict"):
        tier = tier_at(tmp_path, recover=recover)
        assert (await tier.open()).dropped == {}
        assert list(tier.aside()) == listed
        assert tier.usage().used_bytes >= CHUNK
        for index in range(40):  # more than there is room for
            await tier.store(make_items(f"{recover}{index}", 1, CHUNK))
            assert tier._resident_at(offset) == NONE
        tier.check_integrity()
        await tier.close()
    assert item.chunk.key == listed[0].key


async def test_what_was_set_aside_when_the_daemon_died_is_remembered(tmp_path: Path) -> None:
    """The load that found it has told the catalogue before it returns."""
    tier = tier_at(tmp_path)
    await tier.open()
    _, offset = await spoilt(tier, tmp_path, "bad")
    assert [extent.at for extent in await tier._directory.catalogue.aside()] == [offset]
    await tier.close()


async def test_extents_given_back_are_used_again(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    item, offset = await spoilt(tier, tmp_path, "bad")
    other, _ = await spoilt(tier, tmp_path, "other")
    assert await tier.give_back([make_items("unknown", 1, CHUNK)[0].chunk.key]) == []
    assert [extent.at for extent in await tier.give_back([item.chunk.key])] == [offset]
    tier.check_integrity()
    await tier.close()
    again = tier_at(tmp_path)
    await again.open()
    assert [extent.key for extent in again.aside()] == [other.chunk.key]
    await store_all(again, make_items("new", 15, CHUNK, chained=False))
    assert again._resident_at(offset) != NONE
    again.check_integrity()
    await again.close()


async def test_what_no_longer_fits_is_not_kept_aside(tmp_path: Path) -> None:
    tier = tier_at(tmp_path, 4 * MIB)
    await tier.open()
    await store_all(tier, make_items("before", 40, CHUNK))
    await spoilt(tier, tmp_path, "bad")
    assert tier.aside()[0].at > MIB
    await tier.close()
    small = tier_at(tmp_path, MIB)
    await small.open()
    assert list(small.aside()) == []
    small.check_integrity()
    await small.close()


async def test_a_catalogue_that_knows_of_no_extents_aside_opens(tmp_path: Path) -> None:
    """As the first release left it."""
    tier = tier_at(tmp_path)
    await tier.open()
    items = make_items("kept", 3, CHUNK)
    await store_all(tier, items)
    await tier.close()
    with lmdb.open(str(tmp_path / "catalogue"), max_dbs=3) as env:
        table = env.open_db(b"aside")
        with env.begin(write=True) as writer:
            writer.drop(table)
    again = tier_at(tmp_path, recover="strict")
    assert (await again.open()).chunks == 3
    await spoilt(again, tmp_path, "bad")
    await again.close()
    last = tier_at(tmp_path)
    await last.open()
    assert len(last.aside()) == 1
    await last.close()


async def test_records_of_extents_that_make_no_sense_are_passed_over(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    [item] = make_items("kept", 1, CHUNK)
    await store_all(tier, [item])
    taken = offset_of(tier, item.chunk.key)
    await tier.close()
    sound = bytes(16) + CHUNK.to_bytes(8, "little") + bytes(8)
    with lmdb.open(str(tmp_path / "catalogue"), max_dbs=3) as env:
        table = env.open_db(b"aside")
        with env.begin(table, write=True) as writer:
            writer.put(taken.to_bytes(8, "little"), sound)  # a chunk lies there
            writer.put((1 << 60).to_bytes(8, "little"), sound)
            writer.put((123).to_bytes(8, "little"), sound)
            writer.put((CHUNK * 2).to_bytes(8, "little"), bytes(32))  # no length
            writer.put(b"odd", sound)
            writer.put((CHUNK * 3).to_bytes(8, "little"), b"torn")
    again = tier_at(tmp_path)
    assert (await again.open()).chunks == 1
    assert list(again.aside()) == []
    assert (await load_one(again, item))[0] == Loaded(item.chunk)
    again.check_integrity()
    await again.close()


# -- scrubbing ----------------------------------------------------------------------------


async def scrubbed(tier: SsdTier, place: int) -> type:
    found = await tier.scrub(place)
    assert found is not None
    return type(found[1])


async def test_a_scrub_reads_back_every_chunk_in_the_order_of_extents(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    assert isinstance(tier, SupportsScrub)
    items = make_items("a", 6, 50_000, chained=False)
    await store_all(tier, items)
    bad = items[3]
    flip_bit(tmp_path, offset_of(tier, bad.chunk.key) + 49_999)
    before = list(tier._index.evictable())
    places = await tier.places()
    assert list(places) == sorted(offset_of(tier, item.chunk.key) for item in items)
    outcomes = [await scrubbed(tier, place) for place in places]
    assert outcomes.count(Loaded) == 5 and outcomes.count(Corrupt) == 1
    (extent,) = tier.aside()
    assert (extent.key, extent.at) == (bad.chunk.key, places[outcomes.index(Corrupt)])
    assert tier.usage().loaded_bytes_total == 0, "nobody loaded anything"
    left = [record for record in before if tier._index.is_resident(record)]
    assert list(tier._index.evictable()) == left, "nor used it"
    assert await tier.scrub(extent.at) is None
    tier.check_integrity()
    await tier.close()


async def test_what_cannot_be_read_is_told_and_stays(tmp_path: Path) -> None:
    """The medium may come back; the file is really cut short."""
    tier = tier_at(tmp_path)
    await tier.open()
    items = make_items("a", 4, CHUNK)
    await store_all(tier, items)
    places = await tier.places()
    with (tmp_path / "extents").open("r+b") as file:
        whole = file.read()
        file.truncate(places[2])
    found = [await scrubbed(tier, place) for place in places]
    assert found == [Loaded, Loaded, Failed, Failed]
    assert tier.usage().errors_total == {"scrub": 2}
    (tmp_path / "extents").write_bytes(whole)
    assert [await scrubbed(tier, place) for place in places] == [Loaded] * 4
    assert list(tier.aside()) == []
    tier.check_integrity()
    await tier.close()


async def test_a_closed_tier_is_not_scrubbed(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    assert list(await tier.places()) == []
    await store_all(tier, make_items("a", 1, CHUNK))
    (place,) = await tier.places()
    assert not tier.busy
    await tier.close()
    assert await tier.scrub(place) is None
    assert await tier.give_back([]) == []
