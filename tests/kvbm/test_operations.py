"""What operators see and ask for, below the API: rates, quarantine, scrub, flush and drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from kvbm.daemon.operations import Operations
from kvbm.daemon.rates import Rates
from kvbm.offload import LaneSettings
from kvbm.protocol import Share
from kvbm.quarantine import ENTRIES_MAX, Quarantine
from kvbm.scrub import Scrubber
from kvbm.session import Sessions
from storage_tiers.base import TierName, TierUsage
from storage_tiers.testing import make_key
from tests.kvbm.builders import (
    CHUNK_BYTES,
    WAIT_S,
    Node,
    background,
    chunks_of,
    keys_of,
    until,
    wanted,
)
from tests.kvbm.members import join_engine, said

LINGERING = LaneSettings(enough_bytes=1 << 30, linger_s=3600.0)


def operations_of(
    node: Node, scrubber: Scrubber | None = None, *, sessions: Sessions | None = None
) -> Operations:
    scrubber = scrubber or Scrubber(node.dram, node.meter, 0)
    return Operations(
        sessions or Sessions(node.manager),
        node.manager.offloader,
        {TierName.DRAM: scrubber},
        node.manager.quarantine,
        node.manager.tiers,
    )


# -- rates --------------------------------------------------------------------------------


class Counters:
    """A tier's counters and a clock, set by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.stored = self.loaded = 0
        self.rates = Rates(self._usages, lambda: self.now_s)

    def pass_seconds(self, seconds: int, stored: int = 0, loaded: int = 0) -> None:
        """Bytes per second, evenly."""
        for _ in range(seconds):
            self.rates.sample()
            self.now_s += 1
            self.stored += stored
            self.loaded += loaded

    def seen(self) -> dict[int, tuple[float, float]]:
        return {
            rate.window_s: (rate.in_bytes_per_s, rate.out_bytes_per_s)
            for rate in self.rates.now()[TierName.SSD]
        }

    def _usages(self) -> list[TierUsage]:
        usage = TierUsage(
            TierName.SSD,
            "x",
            1,
            0,
            0,
            stored_bytes_total=self.stored,
            loaded_bytes_total=self.loaded,
        )
        return [usage]


def test_a_rate_is_the_mean_over_its_window() -> None:
    counters = Counters()
    counters.pass_seconds(100, stored=600, loaded=60)
    assert counters.seen() == {10: (600, 60), 60: (600, 60)}
    counters.pass_seconds(10)
    assert counters.seen() == {10: (0, 0), 60: (500, 50)}
    counters.pass_seconds(60)
    assert counters.seen() == {10: (0, 0), 60: (0, 0)}


def test_a_rate_over_less_than_its_window_is_the_mean_since_the_start() -> None:
    counters = Counters()
    counters.stored = 1 << 40
    assert counters.seen() == {10: (0, 0), 60: (0, 0)}
    counters.pass_seconds(4, stored=100)
    assert counters.seen() == {10: (100, 0), 60: (100, 0)}


def test_counters_that_begin_anew_give_no_negative_rate() -> None:
    counters = Counters()
    counters.stored = counters.loaded = 1000
    counters.pass_seconds(5)
    counters.stored = counters.loaded = 0
    assert counters.seen()[10] == (0, 0)


# -- quarantine ---------------------------------------------------------------------------


def test_quarantine_keeps_the_latest_and_counts_all() -> None:
    quarantine = Quarantine(lambda: 12.5)
    keys = [make_key(f"{number}") for number in range(ENTRIES_MAX + 10)]
    for key in keys:
        quarantine.add(TierName.SSD, [key])
    assert quarantine.total == len(keys)
    assert [entry.key for entry in quarantine.entries()] == keys[10:]
    assert quarantine.entries()[-1].at == 12.5


async def test_what_a_tier_gave_damaged_is_listed_with_the_reason(node: Node) -> None:
    (item,) = chunks_of("damaged", 1)
    await node.memories[0].store([item])
    node.memories[0].contents[item.chunk.key][0] ^= 1
    async with node.running():
        asked = node.match(wanted([item]))
        await until(lambda: asked.failed)
    (entry,) = node.manager.quarantine.entries()
    assert (entry.tier, entry.key) == (TierName.SSD, item.chunk.key)
    assert entry.why == "the bytes do not match the checksum"
    node.manager.close(asked.ticket)


async def test_a_damaged_chunk_read_again_for_a_lower_tier_is_listed(
    make_node: Callable[..., Node],
) -> None:
    """Host memory has evicted it before S3's lane came to it; the SSD's copy is damaged."""
    node = make_node()
    (item,) = chunks_of("reread", 1)
    await node.memories[0].store([item])
    node.memories[0].contents[item.chunk.key][0] ^= 1
    node.manager.offloader._lanes[1].offer(item.chunk)
    async with node.running():
        await until(lambda: node.meter.drops)
    (entry,) = node.manager.quarantine.entries()
    assert entry.why == "the bytes do not match the checksum"


# -- scrub --------------------------------------------------------------------------------


async def test_a_pass_that_is_asked_for_finds_what_is_damaged(node: Node) -> None:
    items = chunks_of("scrubbed", 8)
    scrubber = Scrubber(node.dram, node.meter, 0)  # no passes but those asked for
    operations = operations_of(node, scrubber)
    node.commit(items)
    async with node.running(), background(scrubber.run):
        await node.settle()
        victim = node.dram.claim(items[3].chunk.key)
        assert victim is not None
        node.dram.view(node.dram.slot(victim))[5] ^= 1
        node.dram.unclaim(victim)
        found = await operations.scrub(TierName.DRAM, WAIT_S)
        assert (found.done, found.total_chunks, found.checked_chunks) == (True, 8, 8)
        assert found.damaged_chunks == 1
        again = await operations.scrub(TierName.DRAM, WAIT_S)
        assert (again.total_chunks, again.damaged_chunks) == (7, 0)
    (entry,) = node.manager.quarantine.entries()
    assert (entry.tier, entry.key) == (TierName.DRAM, items[3].chunk.key)
    assert node.meter.errors == {("scrub", "corrupt"): 1}


async def test_a_second_request_joins_the_pass_under_way(node: Node) -> None:
    scrubber = Scrubber(node.dram, node.meter, 0)
    operations = operations_of(node, scrubber)
    node.commit(chunks_of("joined", 4))
    first = await operations.scrub(TierName.DRAM, 0)  # nobody runs it yet
    assert not first.done
    run = scrubber.latest
    assert scrubber.ask() is run
    async with background(scrubber.run):
        assert (await operations.scrub(TierName.DRAM, WAIT_S)).done
    assert scrubber.latest is run
    status = operations.scrub_status(TierName.DRAM)
    assert status is not None and status.checked_chunks == 4


async def test_the_steady_scrub_goes_round(node: Node) -> None:
    items = chunks_of("steady", 4)
    node.commit(items)
    scrubber = Scrubber(node.dram, node.meter, 0.01)
    async with node.running(), background(scrubber.run):
        await node.settle()
        victim = node.dram.claim(items[0].chunk.key)
        assert victim is not None
        node.dram.view(node.dram.slot(victim))[0] ^= 1
        node.dram.unclaim(victim)
        await until(lambda: items[0].chunk.key not in node.dram)
        before = scrubber.passes
        await until(lambda: scrubber.passes > before)
    assert len(node.dram) == 3


# -- flush and drain ----------------------------------------------------------------------


async def test_a_flush_writes_what_lingers(make_node: Callable[..., Node]) -> None:
    node = make_node(settings=LINGERING)
    items = chunks_of("lingering", 4)
    operations = operations_of(node)
    async with node.running():
        node.commit(items)
        flushed = await operations.flush(WAIT_S)
        assert (flushed.done, flushed.left_chunks) == (True, 0)
        assert node.memories[1].contents.keys() == set(keys_of(items))


async def test_a_flush_ends_at_its_deadline_and_says_what_is_left(
    make_node: Callable[..., Node],
) -> None:
    node = make_node()
    node.commit(chunks_of("nobody writes", 4))  # nothing runs
    flushed = await operations_of(node).flush(0.05)
    assert (flushed.done, flushed.left_chunks) == (False, 4)
    assert flushed.seconds >= 0.05


async def test_draining_outlasts_a_flush(make_node: Callable[..., Node]) -> None:
    """Lanes go on not lingering when a flush that came meanwhile has ended."""
    node = make_node(settings=LINGERING)
    operations = operations_of(node)
    async with node.running():
        assert not operations.drain_status().draining
        first = operations.drain()
        assert (first.draining, first.left_chunks, first.done) == (True, 0, True)
        assert (await operations.flush(WAIT_S)).done
        node.commit(chunks_of("late", 2))
        assert operations.drain().left_chunks > 0
        await until(lambda: operations.drain_status().done)
    assert operations.drain().since == first.since


async def test_a_drain_ends_with_resume_and_engines_lease_again(
    make_node: Callable[..., Node],
) -> None:
    node = make_node(settings=LINGERING)
    sessions = Sessions(node.manager)
    operations = operations_of(node, sessions=sessions)
    engine = join_engine(sessions)
    assert len(engine.lease(4)) == 4
    operations.drain()
    assert said(engine.scheduler, Share)[-1].bytes == 0 and not engine.lease(1)
    assert not operations.resume().draining
    assert said(engine.scheduler, Share)[-1].bytes > 0 and len(engine.lease(1)) == 1
    assert operations.resume() == operations.drain_status(), "again is no error"
    async with node.running():
        node.commit(chunks_of("lingers", 2))
        await until(lambda: not node.manager.offloader.depth["seal"])
        with pytest.raises(TimeoutError):
            await until(lambda: node.memories[1].contents, within_s=0.2)
        assert operations.drain().since is not None
        await until(lambda: len(node.memories[1].contents) == 2)


async def test_without_draining_a_flush_leaves_lanes_as_they_were(
    make_node: Callable[..., Node],
) -> None:
    node = make_node(settings=LINGERING)
    operations = operations_of(node)
    async with node.running():
        await asyncio.gather(operations.flush(WAIT_S), operations.flush(WAIT_S))
        node.commit(chunks_of("lingers again", 2))
        await until(lambda: not node.manager.offloader.depth["seal"])
        with pytest.raises(TimeoutError):
            await until(lambda: node.memories[1].contents, within_s=0.2)
        await operations.flush(WAIT_S)
    assert sum(map(len, node.memories[1].contents.values())) == CHUNK_BYTES * 2
