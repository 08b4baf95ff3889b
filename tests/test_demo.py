"""The demo's own parts: processes that never outlive it, and reports that do not flatter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import httpx2
import pytest

from examples.demo import report
from examples.demo.client import Answer
from examples.demo.engine import EngineConfig
from examples.demo.frontend import Candidate
from examples.demo.measure import SOURCES, Row, Sample
from examples.demo.planner import Planner, settings_of
from examples.demo.process import (
    Process,
    ProcessError,
    end_recorded,
    free_port,
    kill_tree,
    start_time,
    write_record,
)
from examples.demo.routed import RoutedRow, is_soonest, is_where_kv_is, why
from tests.plain_http import PLAIN
from tests.waiting import wait_until

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]

ROUTED = RoutedRow(
    request="conversation A, turn 2",
    engine="engine-a",
    ttft_s=0.1,
    prompt_tokens=100,
    tokens_known=96,
    tokens_expected=96,
    tokens_reused=96,
    why="engine-a: 96 in G1 of 100 tokens",
    is_where_kv_is=True,
    is_soonest=True,
    output_equal=True,
)


def sample(source: str, *served_by: str, cached: int = 96, equal: bool = True) -> Sample:
    answer = Answer(1.0, 2.0, "text", (1, 2), prompt_tokens=100, cached_tokens=cached)
    return Sample(source, "types", answer, frozenset(served_by), output_equal=equal)


def rows() -> list[Row]:
    return [Row(source, 1.0, 0.9, 1.1, 100, 96, True, "-") for source in SOURCES]


def test_stopping_a_process_ends_what_it_started_too(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({SLEEP!r})\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    log = tmp_path / "log"
    with Process("parent", [sys.executable, "-c", script], log=log) as process:
        process.wait_until(lambda: bool(log.read_text().strip()), 20.0)
        child = int(log.read_text())
        assert start_time(child) is not None
    deadline_s = time.monotonic() + 10.0
    while start_time(child) is not None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert start_time(child) is None


def test_a_process_that_ends_early_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    process = Process("engine", command, log=tmp_path / "log")
    process.start()
    with pytest.raises(ProcessError, match="no such model"):
        process.wait_until(lambda: False, 20.0)
    process.stop()


def test_a_process_deaf_to_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); "
    log = tmp_path / "log"
    command = [sys.executable, "-c", script + "time.sleep(60)"]
    process = Process("deaf", command, log=log, grace_s=0.3)
    process.start()
    process.wait_until(lambda: "up" in log.read_text(), 20.0)
    assert process.stop() == -signal.SIGKILL


def test_what_a_killed_run_left_is_ended_by_its_record(tmp_path: Path) -> None:
    left = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        write_record(tmp_path / "left.pid", left.pid)
        assert end_recorded(tmp_path, grace_s=5.0) == ["left"]
        assert left.wait(60.0) != 0
    finally:
        left.kill()
        left.wait()
    assert not list(tmp_path.iterdir())


def test_a_pid_that_is_now_somebody_elses_is_not_signalled(tmp_path: Path) -> None:
    other = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        (tmp_path / "left.pid").write_text(f"{other.pid} 12345\n")
        assert end_recorded(tmp_path) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_process_has_a_start_time_until_it_is_gone() -> None:
    assert start_time(os.getpid()) is not None
    assert start_time(2**22 + 1) is None


def test_free_ports_are_usable_numbers() -> None:
    assert 1024 <= free_port() <= 65535


def test_the_connector_is_configured_only_with_a_socket(tmp_path: Path) -> None:
    assert "--kv-transfer-config" not in EngineConfig("m").command(1)
    socket = tmp_path / "kvbm.sock"
    command = EngineConfig("m", socket, connector_options=(("tenant", "a"),)).command(1)
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert config["kv_connector"] == "KvbmConnector"
    assert config["kv_connector_extra_config"] == {"socket": str(socket), "tenant": "a"}


@pytest.mark.parametrize(
    ("right", "wrong", "word"),
    [
        (sample("G3", "G3"), sample("G3", "G4"), "instead of G3"),
        (sample("G2", "G2"), sample("G2", "G2", equal=False), "differs"),
        (sample("G1"), sample("G1", "G2"), "the engine alone"),
        (sample("cold", cached=0), sample("cold"), "never seen"),
        (sample("G4", "G4"), sample("G4", "G4", cached=64), "only 64 of 100"),
    ],
)
def test_a_hit_is_only_right_from_the_tier_that_was_meant(
    right: Sample, wrong: Sample, word: str
) -> None:
    assert right.fault(32) is None
    assert word in str(wrong.fault(32))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (replace(ROUTED, output_equal=False), "differs"),
        (replace(ROUTED, is_where_kv_is=False), "more of it at hand"),
        (replace(ROUTED, is_soonest=False), "sooner"),
        (replace(ROUTED, tokens_expected=64), "64 tokens expected"),
        (replace(ROUTED, tokens_reused=64), "64 reused"),
    ],
)
def test_a_routed_request_is_only_right_where_its_kv_is(wrong: RoutedRow, word: str) -> None:
    assert ROUTED.fault() is None
    assert word in str(wrong.fault())


def test_why_an_engine_was_chosen_is_one_sentence() -> None:
    near = Candidate("a.0", {"g1": 1920, "g2": 96, "g3": 0, "g4": 0}, 0.1, chosen=True)
    far = Candidate("b.0", dict.fromkeys(near.tokens_by_tier, 0), 4.0, False, "assumed")
    assert why([near, far], {"a.0": "engine-a"}, 2112) == (
        "engine-a: 1,920 in G1 and 96 in G2 of 2,112 tokens, first token in 0.10 s; "
        "b.0: none of 2,112 tokens, first token in 4.00 s at an assumed speed"
    )
    assert is_where_kv_is([near, far], "a.0")
    assert not is_where_kv_is([near, far], "b.0")
    assert not is_where_kv_is([near, far], "gone.0")
    assert is_soonest([near, far], "a.0") and not is_soonest([near, far], "b.0")


def test_killing_a_tree_ends_what_leads_a_session_of_its_own(tmp_path: Path) -> None:
    script = (
        "import subprocess, time\n"
        f"child = subprocess.Popen({SLEEP!r}, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    log = tmp_path / "log"
    with Process("parent", [sys.executable, "-c", script], log=log) as process:
        process.wait_until(lambda: bool(log.read_text().strip()), 20.0)
        child = int(log.read_text())
        kill_tree(process.pid)
        wait_until(lambda: start_time(child) is None, 10.0, "the child has ended")


def test_with_a_nodes_settings_the_launcher_starts_the_engine(tmp_path: Path) -> None:
    command = EngineConfig("m", node_settings=tmp_path / "kvbm.yaml").command(1)
    assert "connectors.vllm.launch" in command
    assert command[command.index("--") + 1] == "m"
    assert command[command.index("--config") + 1] == str(tmp_path / "kvbm.yaml")


def test_a_planner_starts_engines_like_the_stacks_and_ends_them_with_itself(
    tmp_path: Path,
) -> None:
    found = {"discovery": "file", "file_directory": str(tmp_path / "found")}
    config = EngineConfig("model", node_settings=tmp_path / "node.yaml")
    given = settings_of(config, "http://127.0.0.1:9", tmp_path, {}, found)
    assert "--port '{port}'" in given["processes"]["command"]
    given["processes"] |= {
        "command": f"{sys.executable} -m mocker serve --set port={{port}}",
        "environment": {"KVBM_MOCK_DISCOVERY__FILE_DIRECTORY": found["file_directory"]},
    }
    planner = Planner(tmp_path, tmp_path, tmp_path)
    try:
        planner.start(given, least=1, most=1)
        wait_until(lambda: '"phase":"serving"' in plan_of(planner), 120.0, "an engine serves")
        [port] = [path.stem.removeprefix("engine-") for path in tmp_path.glob("engine-*.log")]
        assert (
            httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False, verify=PLAIN).status_code
            == 200
        )
    finally:
        planner.stop()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False, verify=PLAIN)


def plan_of(planner: Planner) -> str:
    return httpx2.get(f"{planner.url}/v1/plan", trust_env=False, verify=PLAIN).text


def test_the_json_report_has_a_row_for_each_source(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    report.write_json(path, ok=True, model="m", engine="e", rows=rows(), routed=[ROUTED])
    content = json.loads(path.read_text())
    assert content["ok"] is True
    assert [row["source"] for row in content["rows"]] == list(SOURCES)
    expected = {"source", "ttft_s", "prompt_tokens", "tokens_reused", "output_equal"}
    assert all(row.keys() == expected for row in content["rows"])
    assert content["routed"] == [asdict(ROUTED)]


def test_the_chart_does_not_claim_equal_answers_when_they_differ(tmp_path: Path) -> None:
    path = tmp_path / "demo.svg"
    report.write_svg(path, rows(), model="m <1>", engine="e")
    assert "same tokens as the cold" in path.read_text()
    assert "m &lt;1&gt;" in path.read_text()
    differing = [*rows()[:-1], Row("G4", 1.0, 0.9, 1.1, 100, 96, False, "G4")]
    report.write_svg(path, differing, model="m", engine="e")
    assert "differ" in path.read_text()
