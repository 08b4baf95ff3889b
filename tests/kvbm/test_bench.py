"""`kvbm bench` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import making_daemons
from tests.kvbm.conftest import Kvbm


def test_bench_moves_chunks_through_a_daemon_of_its_own_and_leaves_nothing(
    tmp_path: Path, kvbm: Kvbm
) -> None:
    size = ("--chunk", "64KiB", "--total", "4MiB", "--rounds", "2")
    told = kvbm("bench", "tiers", *size, "--folder", tmp_path, "--json").json()
    assert told["benchmark"] == "tiers"
    names = ["engine to G2", "G2 to engine", "engine to G3", "G3 to engine"]
    assert [row["name"] for row in told["results"]] == [f"{name}, 64KiB" for name in names]
    for row in told["results"]:
        assert row["against"] in {"memcpy", "O_DIRECT"}
        assert 0 < row["min"] <= row["value"] <= row["max"] and row["ratio"] > 0
    assert list(tmp_path.iterdir()) == []


def test_bench_measures_a_daemon_that_runs_without_restarting_it(
    tmp_path: Path, kvbm: Kvbm
) -> None:
    size = ("--chunk", "64KiB", "--total", "4MiB", "--rounds", "1")
    with making_daemons(tmp_path) as make:
        daemon = make()
        daemon.start()
        told = kvbm("bench", "tiers", *size, "--running", "--url", daemon.url, "--json").json()
        assert len(told["results"]) == 3 and all(row["value"] > 0 for row in told["results"])
        assert daemon.kept_chunks()["G3"] == 64
        daemon.process.check()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--chunk", "1000"), "multiple of 4KiB"),
        (("--chunk", "a lot"), "accepted"),
        (("--total", "4KiB"), "from one chunk"),
        (("--folder", "/nonexistent"), "see --folder"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(
    kvbm: Kvbm, option: tuple[str, str], said: str
) -> None:
    done = kvbm("bench", "tiers", *option)
    assert done.status == 1 and said in done.err and len(done.err.splitlines()) == 1
