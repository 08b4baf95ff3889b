"""The patrol of a real SSD tier: what it finds, how fast it goes, and for whom it waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvbm import patrol as patrol_module
from kvbm.complaints import PAUSE_S, Complaints
from kvbm.manager import Catalogue
from kvbm.meter import CountingMeter
from kvbm.note_dict import NoteDict
from kvbm.patrol import Patrol
from storage_tiers.base import LoadItem, StoreItem, TierName
from storage_tiers.files import MoveOutcome, Piece
from storage_tiers.ssd import SsdTier
from storage_tiers.testing import make_items, store_all
from tests.kvbm.builders import WAIT_S, RecordingEvents, background, until
from tests.storage_tiers.test_ssd import flip_bit, offset_of

CHUNK = 64 << 10
FAST = 1e12


class Bay:
    """An SSD tier with something in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meter = CountingMeter()
        notes = NoteDict(RecordingEvents())
        self.listener = Catalogue(notes, notes)
        self.tier = SsdTier(path, 4 << 20, self.listener, mover="plain")

    async def fill(self, count: int) -> list[StoreItem]:
        items = make_items("patrolled", count, CHUNK)
        await store_all(self.tier, items)
        return items

    def patrol(self, *, pass_s: float = 0, bytes_per_s: float = FAST) -> Patrol:
        return Patrol(
            self.tier, self.meter, self.listener.quarantine, pass_s=pass_s, bytes_per_s=bytes_per_s
        )


@pytest.fixture
async def bay(tmp_path: Path) -> AsyncIterator[Bay]:
    bay = Bay(tmp_path)
    await bay.tier.open()
    yield bay
    bay.tier.check_integrity()
    await bay.tier.close()


async def test_the_steady_patrol_finds_damage_before_anybody_asks(bay: Bay) -> None:
    items = await bay.fill(6)
    bad = items[2].chunk.key
    flip_bit(bay.path, offset_of(bay.tier, bad))
    patrol = bay.patrol(pass_s=0.05)
    with capture_logs() as lines:
        async with background(patrol.run):
            await until(lambda: patrol.passes >= 2)
    assert bay.tier.find([bad]) == [None]
    (entry,) = bay.listener.quarantine.entries()
    assert (entry.tier, entry.key) == (TierName.SSD, bad)
    assert entry.why.endswith("said the scrub")
    assert bay.meter.errors == {("scrub", "corrupt"): 1}
    assert bay.meter.scrubs["G3", "damaged"] == 1 and bay.meter.scrubs["G3", "sound"] >= 10
    (line,) = [line for line in lines if line["event"] == "chunk_damaged"]
    assert (line["tier"], line["key"]) == ("G3", bad.hex())


async def test_a_pass_that_is_asked_for_ends_and_tells(bay: Bay) -> None:
    await bay.fill(6)
    patrol = bay.patrol()
    run = patrol.ask()
    assert patrol.ask() is run, "joined"
    async with background(patrol.run):
        await asyncio.wait_for(run.ended.wait(), WAIT_S)
        assert (run.total, run.checked, run.damaged, run.unreadable) == (6, 6, 0, 0)
        assert patrol.ask() is not run
        await until(lambda: patrol.latest is not None and patrol.latest.ended.is_set())
    assert patrol.passes == 0, "a length of 0 is no steady passes"


async def test_a_medium_that_cannot_be_read_is_told_and_nothing_is_dropped(bay: Bay) -> None:
    items = await bay.fill(6)
    with (bay.path / "extents").open("r+b") as file:
        file.truncate(offset_of(bay.tier, items[0].chunk.key))
    patrol = bay.patrol()
    run = patrol.ask()
    with capture_logs() as lines:
        async with background(patrol.run):
            await asyncio.wait_for(run.ended.wait(), WAIT_S)
    assert run.unreadable > 1 and run.damaged == 0
    assert bay.meter.scrubs["G3", "unreadable"] == run.unreadable
    assert bay.meter.errors == {("scrub", "failed"): run.unreadable}
    (line,) = [line for line in lines if line["event"] == "tier_failed"]
    assert (line["op"], line["log_level"]) == ("scrub", "warning") and "bytes" in line["reason"]
    assert None not in bay.tier.find([item.chunk.key for item in items])


async def test_no_more_is_read_in_a_second_than_was_said(bay: Bay) -> None:
    await bay.fill(20)
    bound = 10 * CHUNK  # a second: the pass has to take about two, less what may be made up for
    patrol = bay.patrol(bytes_per_s=bound)
    began = time.monotonic()
    run = patrol.ask()
    async with background(patrol.run):
        await asyncio.wait_for(run.ended.wait(), WAIT_S)
    took_s = time.monotonic() - began
    assert bound * (took_s + patrol_module.CATCH_UP_S) + CHUNK >= 20 * CHUNK


async def test_engines_go_first_but_not_for_ever(bay: Bay, monkeypatch: pytest.MonkeyPatch) -> None:
    items = await bay.fill(4)
    read = bay.tier._directory.mover.read
    held, let_go = asyncio.Event(), asyncio.Event()

    async def slow_read(pieces: list[Piece]) -> list[MoveOutcome]:
        held.set()
        await let_go.wait()
        return await read(pieces)

    monkeypatch.setattr(bay.tier._directory.mover, "read", slow_read)
    buffer = memoryview(bytearray(CHUNK))
    loading = asyncio.create_task(bay.tier.load([LoadItem(items[0].chunk.key, buffer)]))
    await held.wait()
    monkeypatch.setattr(bay.tier._directory.mover, "read", read)
    monkeypatch.setattr(patrol_module, "GIVE_WAY_S_MAX", 3600.0)
    patrol = bay.patrol()
    run = patrol.ask()
    async with background(patrol.run):
        await until(lambda: run.total)
        assert bay.tier.busy and run.checked == 0
        monkeypatch.setattr(patrol_module, "GIVE_WAY_S_MAX", 0.01)
        let_go.set()
        await loading
        await asyncio.wait_for(run.ended.wait(), WAIT_S)
        let_go.clear()
        held.clear()
        monkeypatch.setattr(bay.tier._directory.mover, "read", slow_read)
        loading = asyncio.create_task(bay.tier.load([LoadItem(items[1].chunk.key, buffer)]))
        await held.wait()
        monkeypatch.setattr(bay.tier._directory.mover, "read", read)
        second = patrol.ask()
        await asyncio.wait_for(second.ended.wait(), WAIT_S)
        assert bay.tier.busy, "the load is still under way"
        let_go.set()
        await loading


def test_a_medium_that_goes_on_failing_is_complained_of_once_a_minute() -> None:
    now = [0.0]
    said: list[dict[str, object]] = []

    class Log:
        def warning(self, event: str, **facts: object) -> None:
            said.append(facts)

    complaints = Complaints(Log(), lambda: now[0])
    for _ in range(100):
        complaints.failed(TierName.SSD, "store", "no space")
    complaints.failed(TierName.SSD, "load", "short")
    assert [facts["op"] for facts in said] == ["store", "load"]
    now[0] = PAUSE_S
    complaints.failed(TierName.SSD, "store", "no space")
    assert said[-1] == {"tier": "G3", "op": "store", "reason": "no space", "unsaid": 99}
