"""The SSD tier: the contract with both movers, recovery, quarantine, capacity changes."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import lmdb
import pytest

from storage_tiers.admission import AdmitSeenTwice, AdmitValue
from storage_tiers.base import (
    Corrupt,
    Failed,
    Full,
    Key,
    Loaded,
    Missing,
    SilentListener,
    Stored,
    StoreItem,
    Tier,
    TierError,
    TierListener,
)
from storage_tiers.budget import Budget
from storage_tiers.catalogue import CatalogueError, Changes, Meta
from storage_tiers.files import MoveOutcome, NotMoved, Piece
from storage_tiers.leaves import NONE
from storage_tiers.nixl import availability
from storage_tiers.ssd import SsdTier
from storage_tiers.testing import (
    RecordingListener,
    TierConformance,
    load_one,
    make_items,
    notes_of,
    store_all,
    with_notes,
)

MIB = 1 << 20


class SsdConformance(TierConformance):
    durable = True
    mover: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.path = tmp_path / "ssd"

    def make(self, listener: TierListener) -> SsdTier:
        return SsdTier(self.path, self.capacity_bytes, listener, mover=self.mover)

    async def corrupt(self, tier: Tier, key: Key) -> None:
        assert isinstance(tier, SsdTier)
        flip_bit(self.path, offset_of(tier, key))


class TestSsdTierWithThreads(SsdConformance):
    mover = "plain"


@pytest.mark.skipif(availability() is not None, reason=f"NIXL: {availability()}")
class TestSsdTierWithNixl(SsdConformance):
    mover = "nixl"


async def test_a_directory_of_before_there_were_notes_opens(tmp_path: Path) -> None:
    items = make_items("a", 3)
    tier = tier_at(tmp_path, 1 << 22)
    await tier.open()
    await store_all(tier, items)
    await tier.close()
    listener = RecordingListener()
    tier = SsdTier(tmp_path, 1 << 22, listener, mover="plain", recover="strict")
    report = await tier.open()
    assert report.chunks == 3 and not report.dropped and not listener.notes
    noted = with_notes(make_items("b", 3))
    await store_all(tier, noted)
    tier.touch([item.chunk.key for item in (*items, *noted)])  # stamps leave notes as they are
    await tier.close()
    listener = RecordingListener()
    tier = SsdTier(tmp_path, 1 << 22, listener, mover="plain", recover="strict")
    assert (await tier.open()).chunks == 6
    assert listener.notes == notes_of(noted)
    await tier.close()


def offset_of(tier: SsdTier, key: Key) -> int:
    record = tier._index.record(key)
    assert record != NONE
    return tier._index.place(record)


def flip_bit(path: Path, offset: int) -> None:
    with open(path / "extents", "r+b", buffering=0) as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
        os.fsync(file.fileno())


def tier_at(path: Path, capacity_bytes: int = MIB, **options: str) -> SsdTier:
    return SsdTier(path, capacity_bytes, SilentListener(), mover="plain", **options)  # type: ignore[arg-type]


async def test_a_second_daemon_cannot_open_the_directory(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    with pytest.raises(TierError, match="in use by another daemon"):
        await tier_at(tmp_path).open()
    await tier.close()
    second = tier_at(tmp_path)
    await second.open()
    await second.close()


async def filled(path: Path, names: str, capacity_bytes: int = MIB) -> list[StoreItem]:
    """A closed directory with one chunk of 64 KiB a name, in this order of use."""
    tier = tier_at(path, capacity_bytes)
    await tier.open()
    items = [make_items(name, 1, 65536)[0] for name in names]
    for item in items:
        await store_all(tier, [item])
    await tier.close()
    return items


def catalogued(path: Path) -> dict[bytes, bytes]:
    """The catalogue's records as they lie in LMDB."""
    env = lmdb.open(str(path / "catalogue"), max_dbs=2)
    with env.begin(env.open_db(b"chunks")) as reader:
        found = {bytes(key): bytes(value) for key, value in reader.cursor()}
    env.close()
    return found


def recatalogue(path: Path, table: bytes, records: dict[bytes, bytes]) -> None:
    env = lmdb.open(str(path / "catalogue"), max_dbs=2)
    with env.begin(env.open_db(table), write=True) as writer:
        for key, value in records.items():
            writer.put(key, value)
    env.close()


async def test_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    items = await filled(tmp_path, "abc")
    tier = tier_at(tmp_path)
    await tier.open()
    tier.touch([items[0].chunk.key])
    await tier.close()
    listener = RecordingListener()
    again = SsdTier(tmp_path, MIB, listener, mover="plain")
    await again.open()
    index = 0
    while len(listener.went) < 3:
        await store_all(again, make_items(f"new{index}", 1, 65536))
        index += 1
    assert [key for key, _ in listener.went] == [items[i].chunk.key for i in (1, 2, 0)]
    again.check_integrity()
    await again.close()


async def test_a_quarantined_extent_is_kept_aside(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    [item] = make_items("a", 1, 65536)
    await store_all(tier, [item])
    offset = offset_of(tier, item.chunk.key)
    flip_bit(tmp_path, offset + 65535)
    assert isinstance((await load_one(tier, item))[0], Corrupt)
    (extent,) = tier.aside()
    assert (extent.key, extent.at, extent.length) == (item.chunk.key, offset, item.chunk.length)
    for index in range(40):
        await tier.store(make_items(f"other{index}", 1, 65536))
        tier.check_integrity()  # which knows what is kept aside
    tier.check_integrity()
    await tier.close()
    assert item.chunk.key not in catalogued(tmp_path)


async def test_quarantine_is_bounded(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    items = make_items("a", 80, 4096, chained=False)
    await store_all(tier, items)
    for item in items:
        flip_bit(tmp_path, offset_of(tier, item.chunk.key))
        assert isinstance((await load_one(tier, item))[0], Corrupt)
    assert [extent.key for extent in tier.aside()] == [item.chunk.key for item in items[16:]]
    tier.check_integrity()
    await tier.close()


async def test_mode_none_starts_empty(tmp_path: Path) -> None:
    items = await filled(tmp_path, "ab")
    tier = tier_at(tmp_path, recover="none")
    report = await tier.open()
    assert (report.chunks, report.dropped) == (0, {})
    assert tier.find([items[0].chunk.key]) == [None]
    await tier.close()
    assert catalogued(tmp_path) == {}


async def test_quiet_drops_and_counts_what_cannot_be_true(tmp_path: Path) -> None:
    items = await filled(tmp_path, "abcd")
    records = catalogued(tmp_path)
    key = [bytes(item.chunk.key) for item in items]
    beyond = (1 << 40).to_bytes(8, "little") + records[key[1]][8:]
    over = records[key[0]][:8] + records[key[2]][8:]
    recatalogue(
        tmp_path, b"chunks", {key[1]: beyond, key[2]: over, key[3]: b"torn", b"odd": b"key"}
    )
    tier = tier_at(tmp_path)
    report = await tier.open()
    assert report.dropped == {
        "outside the extents file": 1,
        "overlaps another chunk": 1,
        "unreadable record": 2,
    }
    assert report.chunks == 1
    tier.check_integrity()
    await tier.close()
    assert len(catalogued(tmp_path)) == 1


async def test_strict_names_what_is_wrong_and_changes_nothing(tmp_path: Path) -> None:
    items = await filled(tmp_path, "abc")
    good = tier_at(tmp_path, recover="strict")
    assert (await good.open()).chunks == 3
    offset = offset_of(good, items[1].chunk.key)
    await good.close()
    flip_bit(tmp_path, offset)
    before = catalogued(tmp_path)
    with pytest.raises(TierError, match=f"{items[1].chunk.key.hex()} does not match its checksum"):
        await tier_at(tmp_path, recover="strict").open()
    assert catalogued(tmp_path) == before
    quiet = tier_at(tmp_path)
    await quiet.open()
    assert isinstance((await load_one(quiet, items[1]))[0], Corrupt)
    await quiet.close()
    sound = tier_at(tmp_path, recover="strict")
    assert (await sound.open()).chunks == 2
    await sound.close()


async def test_lost_extents_are_dropped(tmp_path: Path) -> None:
    await filled(tmp_path, "ab")
    (tmp_path / "extents").unlink()
    tier = tier_at(tmp_path)
    report = await tier.open()
    assert report.dropped == {"outside the extents file": 2}
    await tier.close()


async def test_another_format_is_refused_and_kept(tmp_path: Path) -> None:
    await filled(tmp_path, "a")
    meta = Meta(99, MIB, 4096, clean=True)
    packed = struct.pack("<IQI?", meta.version, meta.capacity_bytes, meta.granule_bytes, meta.clean)
    recatalogue(tmp_path, b"meta", {b"meta": packed})
    with pytest.raises(TierError, match="has format 99, this program format 1"):
        await tier_at(tmp_path).open()
    assert len(catalogued(tmp_path)) == 1
    fresh = tier_at(tmp_path, recover="none")
    await fresh.open()
    await fresh.close()


async def test_a_damaged_catalogue_is_refused_with_the_way_out(tmp_path: Path) -> None:
    await filled(tmp_path, "a")
    (tmp_path / "catalogue" / "data.mdb").write_bytes(b"x" * 65536)
    with pytest.raises(TierError, match="start with recover=none"):
        await tier_at(tmp_path).open()
    fresh = tier_at(tmp_path, recover="none")
    await fresh.open()
    await fresh.close()


async def test_growing_keeps_everything_and_uses_the_new_room(tmp_path: Path) -> None:
    items = await filled(tmp_path, "abcdefghij")
    tier = tier_at(tmp_path, 4 * MIB, recover="strict")
    report = await tier.open()
    assert (report.chunks, report.dropped) == (10, {})
    await store_all(tier, make_items("more", 40, 65536))
    for item in items:
        assert (await load_one(tier, item))[0] == Loaded(item.chunk)
    tier.check_integrity()
    await tier.close()


async def test_shrinking_evicts_down_and_says_so(tmp_path: Path) -> None:
    items = await filled(tmp_path, "abcdefghij")
    for capacity_bytes in (512 << 10, 300_000):
        tier = tier_at(tmp_path, capacity_bytes, recover="strict")
        report = await tier.open()
        assert report.dropped.get("beyond the smaller capacity", 0) > 0
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes <= capacity_bytes
        assert report.chunks == usage.chunks > 0
        for item in items:
            outcome, data = await load_one(tier, item)
            assert isinstance(outcome, Missing) or data == item.data
        tier.check_integrity()
        await tier.close()
        assert (tmp_path / "extents").stat().st_size == usage.capacity_bytes


async def test_a_full_disk_at_the_start_is_a_clear_error(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    with pytest.raises(TierError, match=r"cannot reserve .* lower the capacity or make room"):
        await tier_at(tmp_path, 2 * disk.f_blocks * disk.f_frsize).open()
    small = tier_at(tmp_path)  # nothing was left locked
    await small.open()
    await small.close()


async def test_failing_writes_leave_the_tier_as_it_was(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    kept = make_items("kept", 2, 65536)
    await store_all(tier, kept)
    mover = tier._directory.mover
    write, sync, commit = mover.write, mover.sync, tier._directory.catalogue.commit

    async def no_write(pieces: Sequence[Piece]) -> list[NotMoved]:
        return [NotMoved("No space left on device") for _ in pieces]

    async def no_sync() -> NotMoved:
        return NotMoved("Input/output error")

    async def no_commit(changes: Changes) -> None:
        raise CatalogueError("catalogue: No space left on device")

    for name, broken in (("write", no_write), ("sync", no_sync)):
        setattr(mover, name, broken)
        for outcome in await tier.store(make_items("new", 3, 65536)):
            assert isinstance(outcome, Failed)
        mover.write, mover.sync = write, sync  # type: ignore[method-assign]
        tier.check_integrity()
    tier._directory.catalogue.commit = no_commit  # type: ignore[method-assign]
    for outcome in await tier.store(make_items("new", 40, 65536)):
        assert isinstance(outcome, Failed | Full)
    await tier.remove([kept[1].chunk.key])
    tier.check_integrity()
    tier._directory.catalogue.commit = commit  # type: ignore[method-assign]
    assert await tier.store(make_items("new", 3, 65536)) == [Stored()] * 3
    assert tier.usage().errors_total["store"] >= 9
    tier.check_integrity()
    await tier.close()
    again = tier_at(tmp_path, recover="strict")
    await again.open()
    assert again.find([kept[1].chunk.key]) == [None]
    await again.close()


async def test_a_chunk_being_loaded_is_not_evicted(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    [item] = make_items("a", 1, 65536)
    await store_all(tier, [item])
    read = tier._directory.mover.read

    async def slow_read(pieces: Sequence[Piece]) -> list[MoveOutcome]:
        for index in range(40):
            await tier.store(make_items(f"other{index}", 1, 65536))
        await tier.remove([item.chunk.key])
        for index in range(40):
            await tier.store(make_items(f"more{index}", 1, 65536))
        return await read(pieces)

    tier._directory.mover.read = slow_read  # type: ignore[method-assign]
    outcome, data = await load_one(tier, item)
    assert outcome == Loaded(item.chunk)
    assert data == item.data
    assert tier.find([item.chunk.key]) == [None]
    tier.check_integrity()
    await tier.close()


async def test_chunks_of_very_different_sizes_share_the_capacity(tmp_path: Path) -> None:
    tier = tier_at(tmp_path, 4 * MIB)
    await tier.open()
    for index in range(6):
        await store_all(tier, make_items(f"small{index}", 20, 20_000))
        await store_all(tier, make_items(f"big{index}", 2, 900_000))
        tier.check_integrity()
    assert tier.usage().evictions_total["capacity"] > 0
    await tier.close()


# -- what it takes in -------------------------------------------------------------------


async def test_what_is_written_counts_against_the_budget_until_it_is_spent(tmp_path: Path) -> None:
    budget = Budget(24 * 200_000, clock=lambda: 0.0)
    tier = SsdTier(tmp_path, 1 << 22, SilentListener(), write_budget=budget)
    await tier.open()
    items = make_items("a", 4, 100_000)  # 102400 on the disk
    await store_all(tier, items[:1])
    assert budget.left == 200_000 - 102_400
    assert tier.refusal(items[1].chunk) is None
    await store_all(tier, items[1:2])
    assert tier.refusal(items[2].chunk) == "budget"
    assert isinstance((await load_one(tier, items[0]))[0], Loaded), "reading is free"
    await tier.close()


class Worthless:
    """A policy that finds every arrival worth less than what would go for it."""

    def arrival_worth(self, now_s: float, parent: int, cost_s: float, size_bytes: int) -> float:
        return 1.0

    def victim_worth(self, now_s: float) -> float:
        return 2.0


async def test_value_admission_refuses_only_where_something_would_have_to_go(
    tmp_path: Path,
) -> None:
    tier = SsdTier(tmp_path, 8 * 65536, SilentListener(), admission=AdmitValue(Worthless()))
    await tier.open()
    for item in make_items("a", 8, 65536):
        assert tier.refusal(item.chunk) is None
        await store_all(tier, [item])
    [more] = make_items("more", 1, 65536)
    assert tier.refusal(more.chunk) == "admission"
    await tier.remove([make_items("a", 8, 65536)[7].chunk.key])
    assert tier.refusal(more.chunk) is None
    await tier.close()


async def test_seen_twice_takes_what_comes_again(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path, 1 << 22, SilentListener(), admission=AdmitSeenTwice(1024))
    await tier.open()
    [item] = make_items("a", 1, 4096)
    assert tier.refusal(item.chunk) == "admission"
    assert tier.refusal(item.chunk) is None
    await tier.close()


async def test_recency_outlives_a_restart_to_the_second(tmp_path: Path) -> None:
    """A policy that knows ages goes on where it was."""
    clock = [1e9]
    tier = SsdTier(tmp_path, 1 << 22, SilentListener(), clock=lambda: clock[0])
    await tier.open()
    items = make_items("a", 3, 65536, chained=False)
    await store_all(tier, items)
    clock[0] += 3600
    tier.touch([items[0].chunk.key])
    await tier.close()
    again = tier_at(tmp_path)
    await again.open()
    order = list(again._index.evictable())
    assert again._index.key(order[-1]) == items[0].chunk.key
    assert [again._index.tag(record) >> 24 for record in order] == [10**9] * 2 + [10**9 + 3600]
    again.check_integrity()
    await again.close()


async def test_a_capacity_beyond_what_a_row_can_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="at most 16 TiB"):
        await SsdTier(tmp_path, 17 << 40, SilentListener()).open()
