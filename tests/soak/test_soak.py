"""A daemon under mixed load for KVBM_SOAK_S seconds: right bytes, and nothing that grows.

Engines of several chunk sizes come, go and are killed while host memory, SSD (real files), S3 and
NATS (real servers) are at work. `make soak` does it for an hour. In a short run the caches still
fill, so that memory and speed are told and not judged; bytes and what must be over at the end are.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from kvbm.cli.figures import Row, tell
from runtime.embedded import EmbeddedNats, EmbeddedS3
from tests.plain_http import PLAIN
from tests.soak.flat import Trend, trend_of
from tests.soak.fleet import Fleet
from tests.soak.probe import Probe
from tests.waiting import wait_until

SECONDS = float(os.environ.get("KVBM_SOAK_S", "30"))
LIFE_S_MAX = SECONDS / 3  # of an engine, so that some come and go in a short soak
WAIT_S = 120.0  # a busy machine needs longer until each tier has been read from
JUDGED_S_MIN = 600.0  # a shorter soak cannot tell a leak from a cache that fills
WARM_UP = 0.25  # of the soak, not looked at
INTERVALS = 80
ASK_S = 0.25
BUCKET = "soak"
RESULT = Path("build/soak.json")

# Figure -> unit, growth allowed as a share of the first quarter, growth allowed in any case.
# Latencies are judged as multiples of the echo's, so that a machine that gets busier is no leak.
FIGURES = {
    "memory": ("MiB", 0.05, 2.0),
    "descriptors": ("", 0.05, 3.0),
    "threads": ("", 0.0, 1.0),
    "lookup p50": ("ms", 0.5, 0.0),
    "lookup p99": ("ms", 1.0, 0.0),
    "answer p50": ("ms", 0.5, 0.0),
    "answer p99": ("ms", 1.0, 0.0),
}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with ExitStack() as cleanup:
        s3 = cleanup.enter_context(EmbeddedS3(tmp_path / "s3", buckets=[BUCKET]))
        nats = cleanup.enter_context(EmbeddedNats(tmp_path / "nats"))
        runtime = Path(tempfile.mkdtemp(prefix="kvbm-soak-"))
        cleanup.callback(shutil.rmtree, runtime, ignore_errors=True)
        folder = tmp_path / "daemon"
        daemon = Daemon(
            DaemonConfig(
                folder=folder,
                socket=runtime / "s",
                logs=folder,
                records=folder,
                s3={
                    **s3.settings(BUCKET),
                    "linger": "200ms",
                    "object_bytes": "1MiB",
                    "capacity": "128MiB",
                    "refresh": "2s",
                },
                events={
                    "plane": "nats",
                    "nats_url": nats.url,
                    "nats_user": nats.user,
                    "nats_password": nats.password,
                    "ring_keys": 4096,  # full before the warm-up ends
                },
                dram="24MiB",
                ssd="64MiB",
            )
        )
        cleanup.callback(daemon.process.stop)
        daemon.start()
        yield daemon


@pytest.mark.timeout(SECONDS + 300)
def test_nothing_grows_and_no_byte_is_wrong(
    daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("KVBM_SOAK_SEED", random.randrange(1 << 32)))
    fleet = Fleet(daemon.socket, random.Random(seed), tmp_path / "engines.log", LIFE_S_MAX)
    try:
        with Probe(daemon) as probe:
            _load(fleet, probe)
            _until_all_was_seen(fleet, daemon)
            fleet.end()
            wait_until(lambda: daemon.engines() == 1, WAIT_S, "only the probe is connected")
            wait_until(lambda: daemon.claims() == 0, WAIT_S, "no chunk is claimed")
            wait_until(lambda: _waiting(daemon) == 0, WAIT_S, "nothing waits in a queue")
        wait_until(lambda: daemon.leased_bytes() == 0, WAIT_S, "no slot is lent")
    finally:
        fleet.kill()
    loaded, tiers = daemon.loaded_bytes(), daemon.tiers()
    rows = [*_rows(probe.series), *_facts(fleet, loaded)]
    with capsys.disabled():
        sys.stderr.write(f"\nKVBM_SOAK_SEED={seed}\n")
        tell("soak", rows)
    assert not any(tier["corrupt"] for tier in tiers), tiers
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]


def _load(fleet: Fleet, probe: Probe) -> None:
    began = time.monotonic()
    for number in range(1, INTERVALS + 1):
        end = began + number * SECONDS / INTERVALS
        while True:
            fleet.tend()
            probe.ask()
            if (left_s := end - time.monotonic()) <= 0:
                break
            time.sleep(min(ASK_S, left_s))
        probe.take()
        if SECONDS >= JUDGED_S_MIN:  # also for whoever looks on, or finds that it failed
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps({"interval_s": SECONDS / INTERVALS, **probe.series}))


def _until_all_was_seen(fleet: Fleet, daemon: Daemon) -> None:
    """Each tier was read from, an engine was killed and one ended by itself."""

    def seen() -> bool:
        fleet.tend()
        counts = fleet.counts
        return all(daemon.loaded_bytes().values()) and counts["killed"] > 0 and counts["ended"] > 0

    wait_until(seen, WAIT_S, "each tier was read from, engines were killed and ended")


def _waiting(daemon: Daemon) -> int:
    answer = httpx2.get(f"{daemon.url}/v1/tiers", timeout=10.0, trust_env=False, verify=PLAIN)
    queues: list[dict[str, Any]] = answer.raise_for_status().json()["queues"]
    return sum(queue["depth"] for queue in queues)


def _rows(series: dict[str, list[float]]) -> list[Row]:
    """One row a figure: the last quarter against the first after the warm-up."""
    rows: list[Row] = []
    for name, (unit, tolerance, floor) in FIGURES.items():
        values = series[name][int(WARM_UP * INTERVALS) :]
        trend = judged = trend_of(values)
        if unit == "ms":
            echoes = series[f"echo {name[-3:]}"][int(WARM_UP * INTERVALS) :]
            judged = trend_of([ms / echo for ms, echo in zip(values, echoes, strict=True)])
        rows.append(
            {
                "name": name,
                "value": round(trend.last, 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
                "unit": unit,
                "against": "in the first quarter",
                "against_value": round(trend.first, 3),
                "ratio": round(trend.last / max(trend.first, 1e-9), 3),
                "growth_per_h": round(_per_hour(trend), 3),
                "judged_growth": round(judged.growth / max(judged.first, 1e-9), 3),
                "z": round(judged.z, 2),
                "target": None,
                "ok": SECONDS < JUDGED_S_MIN or not judged.grows(tolerance, floor),
            }
        )
    return rows


def _per_hour(trend: Trend) -> float:
    return trend.growth * 3600 / (SECONDS * (1 - WARM_UP))


def _facts(fleet: Fleet, loaded: dict[str, int]) -> list[Row]:
    """What was done meanwhile."""
    counted = {
        "soak": (SECONDS, "s"),
        "engines": (fleet.counts["engines"], ""),
        "engines killed": (fleet.counts["killed"], ""),
        "chunks stored": (fleet.counts["stored"], ""),
        "chunks checked": (fleet.counts["fetched"], ""),
        **{f"read from {tier}": (size / (1 << 20), "MiB") for tier, size in loaded.items()},
    }
    return [
        {"name": name, "value": round(value, 1), "unit": unit, "target": None, "ok": True}
        for name, (value, unit) in counted.items()
    ]
