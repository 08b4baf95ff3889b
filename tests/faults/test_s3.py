"""S3 that refuses, hangs, cuts answers short or gives wrong bytes: faults on the wire to a server.

Through all of them an engine gets a chunk's own bytes or none, the daemon lives, and a counter and
a log line say what happened; when the wire is sound again, so is everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from kvbm.protocol import COMING, HERE, MatchGroup
from kvbm.stand_in import TOKENS_PER_CHUNK, StandIn
from runtime.embedded import EmbeddedS3
from storage_tiers.bucket import S3Bucket
from storage_tiers.testing import make_items
from tests.faults.conftest import (
    BUCKET,
    CHUNK,
    WAIT_S,
    MakeWatched,
    Watched,
    assert_never_wrong,
    keys_of,
)
from tests.faults.proxy import Mode, Proxy
from tests.waiting import wait_until


@pytest.fixture
def wire(s3: EmbeddedS3) -> Iterator[Proxy]:
    with Proxy(s3.port) as proxy:
        yield proxy


TIMEOUT_S = 5.0


@pytest.fixture
def daemon(make_daemon: MakeWatched, s3: EmbeddedS3, wire: Proxy) -> Watched:
    """Only host memory and S3, so that what comes after a restart comes over the wire."""
    section = {
        **s3.settings(BUCKET),
        "endpoint_url": f"http://127.0.0.1:{wire.port}",
        "prefix": f"wire-{wire.port}",
        "linger": "50ms",
        "object_bytes": "256KiB",
        "refresh": "500ms",
        "timeout": TIMEOUT_S,
    }
    return make_daemon(ssd=None, s3=section)


def test_flipped_bits_in_objects_are_misses_and_are_told(
    daemon: Watched, s3: EmbeddedS3, wire: Proxy
) -> None:
    items = make_items("flipped objects", 8, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        daemon.await_kept("G4", len(items))
    assert asyncio.run(_flip_first_records(s3, f"wire-{wire.port}/")) >= 2
    daemon.restart()
    with StandIn(daemon.socket, CHUNK) as engine:
        came = assert_never_wrong(engine, items)
        damaged = daemon.counted("kvbm_corrupt_chunks_total", tier="G4")
        assert damaged >= 2 and came == len(items) - damaged
        assert len(daemon.said("chunk_damaged", tier="G4", level="error")) == damaged
    daemon.process.check()


async def _flip_first_records(server: EmbeddedS3, prefix: str) -> int:
    """One bit of the first record of every object; how many objects."""
    settings: dict[str, Any] = {**server.settings(BUCKET)}
    bucket = S3Bucket(**settings)
    await bucket.open()
    try:
        objects = await bucket.list_after(prefix, "")
        for listed in objects:
            body = bytearray(await bucket.get_range(listed.name, 0, listed.size_bytes))
            body[1000] ^= 1
            await bucket.put(listed.name, body)
    finally:
        await bucket.close()
    return len(objects)


@pytest.mark.parametrize("mode", ["refuse", "cut", "garble"])
def test_loads_over_a_bad_wire_are_misses_and_are_told(
    daemon: Watched, wire: Proxy, mode: Mode
) -> None:
    items = make_items(f"loads {mode}", 12, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        daemon.await_kept("G4", len(items))
    daemon.restart()
    with StandIn(daemon.socket, CHUNK) as engine:
        wire.mode = mode
        assert assert_never_wrong(engine, items[:4]) == 0
        assert wire.spoilt > 0
        wire.mode = "pass"
        if mode == "garble":
            assert daemon.counted("kvbm_corrupt_chunks_total", tier="G4") >= 1
            assert daemon.counted("kvbm_errors_total", op="load_G4", kind="corrupt") >= 1
            assert daemon.said("chunk_damaged", tier="G4")
        else:
            assert daemon.counted("kvbm_tier_errors_total", tier="G4", op="load") >= 1
            assert daemon.counted("kvbm_errors_total", op="load_G4", kind="failed") >= 1
            (line,) = daemon.said("tier_failed", tier="G4", op="load")
            assert line["reason"].startswith("GET")
            assert engine.fetch(keys_of(items[:4])) == [bytes(i.data) for i in items[:4]]
        assert engine.fetch(keys_of(items[4:])) == [bytes(i.data) for i in items[4:]]
    daemon.process.check()


def test_stores_that_s3_refuses_are_tried_again_and_then_dropped_and_told(
    daemon: Watched, wire: Proxy
) -> None:
    items = make_items("refused stores", 4, CHUNK)
    later = make_items("later stores", 4, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        wire.mode = "refuse"
        wire.sever()
        engine.store(items)
        daemon.await_counted("kvbm_dropped_chunks_total", 4, queue="offload_G4", reason="failed")
        assert daemon.counted("kvbm_errors_total", op="store_G4", kind="failed") == 3 * len(items)
        assert daemon.counted("kvbm_tier_errors_total", tier="G4", op="store") >= 3
        lines = daemon.said("tier_failed", tier="G4", op="store")
        assert lines and lines[0]["reason"]
        assert engine.fetch(keys_of(items)) == [bytes(i.data) for i in items], "from host memory"
        wire.mode = "pass"
        engine.store(later)
        daemon.await_kept("G4", len(later))
    daemon.process.check()


def test_an_s3_that_hangs_delays_nobody_beyond_the_deadline_and_is_told(
    daemon: Watched, wire: Proxy
) -> None:
    """The engine's own deadline is the connector's; here the daemon's: that of the tier."""
    items = make_items("hang", 8, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        daemon.await_kept("G4", len(items))
    daemon.restart()
    fresh = make_items("meanwhile", 4, CHUNK)
    with StandIn(daemon.socket, CHUNK) as engine, StandIn(daemon.socket, CHUNK) as other:
        wire.mode = "hang"
        keys = keys_of(items)
        group = MatchGroup(TOKENS_PER_CHUNK, 0, b"".join(keys))
        waiting = engine.client.look_up([group], keys)
        assert waiting is not None
        other.store(fresh)  # nobody else is held up by what hangs
        assert other.fetch(keys_of(fresh)) == [bytes(i.data) for i in fresh]

        def told() -> bool:
            engine.client.pump()
            return waiting.answered and COMING not in waiting.states

        wait_until(told, WAIT_S, "the engine is told that nothing comes")
        assert HERE not in waiting.states
        wire.mode = "pass"
        wire.sever()
        engine.client.forget(waiting)
        daemon.await_counted("kvbm_tier_errors_total", tier="G4", op="load")
        (line, *_) = daemon.said("tier_failed", tier="G4", op="load")
        assert line["reason"] == f"no answer within {TIMEOUT_S:g} s"
        assert assert_never_wrong(engine, items) == len(items)
    daemon.process.check()
