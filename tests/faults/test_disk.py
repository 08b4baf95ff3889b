"""The SSD at fault under a running daemon: flipped bits, a file cut short, no space, a full map.

Through all of them an engine gets a chunk's own bytes or none, the daemon lives, and a counter and
a log line say what happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from kvbm.stand_in import StandIn
from storage_tiers.testing import make_items
from tests.faults.conftest import CHUNK, WAIT_S, MakeWatched, assert_never_wrong, keys_of
from tests.faults.disk import SmallDisk, cannot_mount, flip_bit
from tests.waiting import wait_until

SMALL = 4096
WHY_NOT = cannot_mount()


def test_flipped_bits_in_extents_are_misses_and_are_told(make_daemon: MakeWatched) -> None:
    daemon = make_daemon()
    items = make_items("flipped", 24, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        daemon.await_kept("G3", len(items))
    daemon.restart()
    extents = daemon.ssd_folder / "extents"
    content = extents.read_bytes()
    for index in (0, 7, 23):
        flip_bit(extents, content.index(bytes(items[index].data)) + index * 100)
    with StandIn(daemon.socket, CHUNK) as engine:
        assert assert_never_wrong(engine, items) == 21
        assert daemon.counted("kvbm_corrupt_chunks_total", tier="G3") == 3
        assert daemon.counted("kvbm_errors_total", op="load_G3", kind="corrupt") == 3
        assert daemon.counted("kvbm_quarantined_bytes", tier="G3") == 3 * CHUNK
        assert len(daemon.said("chunk_damaged", tier="G3", level="error")) == 3
        engine.store(items)  # computed anew, and kept anew
        daemon.await_kept("G3", len(items))
    daemon.restart()
    with StandIn(daemon.socket, CHUNK) as engine:
        assert engine.fetch(keys_of(items)) == [bytes(item.data) for item in items]
    daemon.process.check()


def test_a_file_cut_short_under_the_daemon_costs_hits_only(make_daemon: MakeWatched) -> None:
    daemon = make_daemon()
    items = make_items("cut", 24, CHUNK)
    later = make_items("later", 24, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        daemon.await_kept("G3", len(items))
    daemon.restart()
    extents = daemon.ssd_folder / "extents"
    middle = extents.read_bytes().index(bytes(items[12].data)) + 100
    with extents.open("r+b") as file:
        file.truncate(middle)
    with StandIn(daemon.socket, CHUNK) as engine:
        came = assert_never_wrong(engine, items)
        assert 0 < came < len(items)
        assert daemon.counted("kvbm_tier_errors_total", tier="G3", op="load") >= 1
        assert daemon.counted("kvbm_errors_total", op="load_G3", kind="failed") >= 1
        assert daemon.said("tier_failed", tier="G3", op="load")
        before = daemon.kept_chunks()["G3"]
        engine.store(later)
        daemon.await_kept("G3", before + len(later))
    daemon.process.check()
    daemon.restart()
    with StandIn(daemon.socket, CHUNK) as engine:
        assert engine.fetch(keys_of(later)) == [bytes(item.data) for item in later]
        assert_never_wrong(engine, items)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if WHY_NOT is not None:
        pytest.skip(f"no filesystem of a test's own here: {WHY_NOT}")
    with SmallDisk(tmp_path / "node-1" / "ssd", 72 << 20) as made:
        yield made


def test_a_filesystem_that_fills_up_costs_stores_only_until_there_is_room(
    disk: SmallDisk, make_daemon: MakeWatched
) -> None:
    """First the catalogue finds no room, then the extents themselves, which lost their blocks."""
    daemon = make_daemon()
    daemon.process._command = [*disk.prefix, *daemon.process._command]
    daemon.start()
    disk.fill()
    crowded = make_items("crowded", 1200, SMALL)
    with StandIn(daemon.socket, SMALL, lease_chunks=256) as engine:
        engine.store(crowded)
        daemon.await_counted("kvbm_dropped_chunks_total", queue="offload_G3", reason="failed")
        assert daemon.counted("kvbm_tier_errors_total", tier="G3", op="catalogue") >= 1
        assert daemon.counted("kvbm_errors_total", op="store_G3", kind="failed") >= 3
        (line, *_) = daemon.said("tier_failed", tier="G3", op="store")
        assert "No space left on device" in line["reason"]
        assert assert_never_wrong(engine, crowded[::60]) == 20, "host memory has them"
        disk.empty()
        roomy = make_items("roomy", 200, SMALL)
        engine.store(roomy)
        assert assert_never_wrong(engine, roomy[::50]) == 4, "it has taken them"
        wait_until(lambda: not daemon.waiting(), WAIT_S, "nothing waits")
        assert daemon.kept_chunks()["G3"] >= len(roomy)
    daemon.restart()
    with StandIn(daemon.socket, SMALL) as engine:
        listed = daemon.kept_chunks()["G3"]
        came = assert_never_wrong(engine, roomy)
        assert came == len(roomy)
        assert assert_never_wrong(engine, crowded) == listed - came
        disk.punch("extents")
        disk.fill()
        failed = daemon.counted("kvbm_tier_errors_total", tier="G3", op="store")
        engine.store(make_items("no blocks", 500, SMALL))
        daemon.await_counted("kvbm_tier_errors_total", failed + 1, tier="G3", op="store")
        assert_never_wrong(engine, crowded[::10])
    daemon.process.check()
    daemon.process.kill()  # its end would wait for room until its deadline


def test_a_disk_too_small_at_the_start_is_told_and_ends_the_daemon(
    disk: SmallDisk, make_daemon: MakeWatched
) -> None:
    daemon = make_daemon(ssd="1GiB")
    daemon.process._command = [*disk.prefix, *daemon.process._command]
    daemon._write_settings()
    daemon.process.start()
    wait_until(lambda: not daemon.process.running, WAIT_S, "it ended")
    assert daemon.process.stop() == 1
    (line,) = daemon.said("cannot_run")
    assert "lower the capacity or make room" in line["reason"]


def test_a_full_map_of_the_catalogue_grows_and_is_told(make_daemon: MakeWatched) -> None:
    """Filled to its last page with a table of somebody else's: not even a delete fits any more."""
    daemon = make_daemon()
    items = make_items("before", 20, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        daemon.await_kept("G3", len(items))
    daemon.stop()
    map_bytes = (64 << 20) + (64 << 20) // 8  # what a capacity of 64 MiB gets
    with lmdb.open(
        str(daemon.ssd_folder / "catalogue"), map_size=map_bytes, max_dbs=4, sync=False
    ) as env:
        ballast = env.open_db(b"ballast")
        for size in (1 << 20, 8192, 1000):
            _fill(env, ballast, size)
    daemon.start()
    more = make_items("after", 200, CHUNK)
    with StandIn(daemon.socket, CHUNK, lease_chunks=64) as engine:
        engine.store(more)
        daemon.await_kept("G3", len(items) + len(more))
        assert daemon.counted("kvbm_tier_errors_total", tier="G3", op="catalogue_full") >= 1
        assert daemon.said("catalogue_map_was_full")
    daemon.restart()
    with StandIn(daemon.socket, CHUNK) as engine:
        everything = [*items, *more]
        assert assert_never_wrong(engine, everything) == len(everything)
    daemon.process.check()


def _fill(env: lmdb.Environment, table: Any, size: int) -> None:
    number = 0
    while True:
        try:
            with env.begin(table, write=True) as writer:
                writer.put(f"{size} {number}".encode(), bytes(size))
        except lmdb.MapFullError:
            return
        number += 1
