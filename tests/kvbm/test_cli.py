"""`kvbm` as an operator uses it, against a real daemon with a stand-in for an engine."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from examples.demo.daemon import Daemon, DaemonConfig
from kvbm.cli import __main__ as cli
from kvbm.cli.event_feed import Printer
from kvbm.note import Note
from kvbm.protocol import MatchGroup
from kvbm.stand_in import TOKENS_PER_CHUNK, StandIn
from runtime.embedded import EmbeddedNats
from runtime.events.blocks import BlockBatch, Removed, Stored
from storage_tiers.base import Key, StoreItem
from storage_tiers.testing import make_items, make_key
from tests.faults.disk import flip_bit
from tests.kvbm.conftest import Kvbm, Run
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).parent / "kvbm"
NOWHERE = "http://127.0.0.1:1"
CHUNK = 64 << 10
TOKEN = "a-token-of-16-up"
WAIT_S = 60.0


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, nats: EmbeddedNats) -> Iterator[Daemon]:
    """One daemon for all tests that leave it as it was."""
    events = {
        "plane": "nats",
        "nats_url": nats.url,
        "nats_user": nats.user,
        "nats_password": nats.password,
    }
    with running_daemon(tmp_path_factory.mktemp("node"), events=events) as daemon:
        daemon.start()
        yield daemon


@pytest.fixture(scope="module")
def engine(daemon: Daemon) -> Iterator[StandIn]:
    with StandIn(daemon.socket, CHUNK) as engine:
        yield engine


class running_daemon(ExitStack):  # noqa: N801 (used as a function)
    """A daemon that is not started yet and ends with the block."""

    def __init__(self, folder: Path, **config: Any) -> None:
        super().__init__()
        runtime = Path(tempfile.mkdtemp(prefix="kvbm-test-"))
        self.callback(shutil.rmtree, runtime, ignore_errors=True)
        self._daemon = Daemon(
            DaemonConfig(
                folder=folder,
                socket=runtime / "s",
                logs=folder,
                records=folder,
                node="node-1",
                dram="64MiB",
                ssd="128MiB",
                **config,
            )
        )
        self.callback(self._daemon.process.stop)

    def __enter__(self) -> Daemon:  # type: ignore[override]
        return self._daemon


def keys_of(items: list[StoreItem]) -> list[Key]:
    return [item.chunk.key for item in items]


def store(daemon: Daemon, engine: StandIn, name: str, count: int) -> list[StoreItem]:
    """Chunks that the daemon has in host memory when this returns."""
    items = make_items(name, count, CHUNK)
    before = daemon.kept_chunks()["G2"]
    engine.store(items)
    wait_until(lambda: daemon.kept_chunks()["G2"] == before + count, WAIT_S, "the daemon has them")
    return items


def damage_in_host_memory(engine: StandIn, key: Key) -> None:
    """Write where an engine should not."""
    lookup = engine.client.look_up([MatchGroup(TOKENS_PER_CHUNK, 0, key)], [key])
    assert lookup is not None and engine._arena is not None
    engine.wait(lambda: lookup.answered, "the daemon answers")
    slot, _ = lookup.slot(0) or pytest.fail("the chunk is not here")
    engine._arena.view(slot.offset, slot.length)[100] ^= 1
    engine.client.forget(lookup)
    engine.client.pump()


# -- what is the case ---------------------------------------------------------------------


def test_status_tells_that_the_node_is_ready_and_who_is_connected(
    daemon: Daemon, engine: StandIn, kvbm: Kvbm
) -> None:
    told = kvbm("status", "--json", "--url", daemon.url).json()
    assert told["ready"] is True
    assert told["checks"] == dict.fromkeys(("G2", "G3", "socket", "stores"), "ok")
    assert [tier["tier"] for tier in told["tiers"]] == ["G2", "G3"]
    assert told["process"]["pid"] == daemon.process.pid
    assert {session["role"] for session in told["sessions"]} == {"scheduler", "worker"}
    shown = kvbm("status", "--url", daemon.url)
    assert shown.status == 0
    assert "node-1" in shown.out and ", ready, up" in shown.out
    assert "1 engines in 2 connections" in shown.out
    assert f"of publisher {told['stream']['stream']['publisher']}; G2 " in shown.out


def test_tiers_tell_how_fast_bytes_come_and_go(daemon: Daemon, engine: StandIn, kvbm: Kvbm) -> None:
    items = store(daemon, engine, "rates", 64)
    assert kvbm("flush", "--url", daemon.url).status == 0
    engine.fetch(keys_of(items))
    tiers = {t["tier"]: t for t in kvbm("tiers", "--json", "--url", daemon.url).json()["tiers"]}
    for tier in tiers.values():
        fast, slow = tier["rates"]
        assert (fast["window_s"], slow["window_s"]) == (10, 60)
        assert 0 < fast["in_bytes_per_s"] <= 64 * CHUNK
        assert fast["in_bytes_per_s"] <= tier["stored_bytes"]
    table = kvbm("tiers", "--url", daemon.url).out
    assert all(word in table for word in ("G2", "G3", "in/s", "offload_G3", "MiB"))


def test_a_chunk_is_found_in_every_tier_that_has_it(
    daemon: Daemon, engine: StandIn, kvbm: Kvbm
) -> None:
    items = store(daemon, engine, "found", 3)
    assert kvbm("flush", "--url", daemon.url).status == 0
    told = kvbm("chunks", items[2].chunk.key.hex(), "--json", "--url", daemon.url).json()
    assert [residency["tier"] for residency in told["residencies"]] == ["G2", "G3"]
    for residency in told["residencies"]:
        assert (residency["length"], residency["position"]) == (CHUNK, 2)
        assert residency["parent"] == items[1].chunk.key.hex()
        assert residency["checksum"] == f"{items[2].chunk.checksum:016x}"
    assert told["residencies"][0]["claims"] == 0
    lookup = engine.client.look_up(
        [MatchGroup(TOKENS_PER_CHUNK, 0, b"".join(keys_of(items)))], keys_of(items)
    )
    assert lookup is not None
    engine.wait(lambda: lookup.answered, "the daemon answers")
    told = kvbm("chunks", items[2].chunk.key.hex(), "--json", "--url", daemon.url).json()
    assert told["residencies"][0]["claims"] == 1, "a request holds it"
    engine.client.forget(lookup)
    assert "64 KiB" in kvbm("chunks", items[0].chunk.key.hex(), "--url", daemon.url).out


def test_what_routers_are_told_of_a_chunk_is_shown(
    daemon: Daemon, engine: StandIn, kvbm: Kvbm
) -> None:
    items = [
        replace(item, chunk=replace(item.chunk, note=Note(7, parent, hashes).encode()))
        for item, parent, hashes in zip(
            make_items("noted", 2, CHUNK),
            (None, 0xAB),
            (np.array([1, 2], np.uint64), np.array([3], np.uint64)),
            strict=True,
        )
    ]
    engine.store(items)
    first, second = (item.chunk.key.hex() for item in items)
    wait_until(lambda: bool(shown(kvbm, daemon, second)), WAIT_S, "the daemon has it")
    told = shown(kvbm, daemon, first)
    assert "2 blocks from the beginning, in domain 0000000000000007" in told
    assert "1 blocks after 00000000000000ab" in shown(kvbm, daemon, second)


def shown(kvbm: Kvbm, daemon: Daemon, key: str) -> str:
    return kvbm("chunks", key, "--url", daemon.url).out


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (make_key("nobody's").hex(), "no tier of this node has"),
        ("abc", "key"),
        ("../tiers", "kvbm: "),
    ],
)
def test_a_chunk_that_is_nowhere_is_said_in_one_sentence(
    daemon: Daemon, kvbm: Kvbm, key: str, said: str
) -> None:
    done = kvbm("chunks", key, "--url", daemon.url)
    assert done.status == 1 and not done.out
    assert said in done.err and len(done.err.splitlines()) == 1


# -- what can be done ---------------------------------------------------------------------


def test_flush_ends_when_everything_is_on_the_ssd(
    daemon: Daemon, engine: StandIn, kvbm: Kvbm
) -> None:
    items = store(daemon, engine, "flushed", 100)
    told = kvbm("flush", "--json", "--url", daemon.url).json()
    assert (told["done"], told["left_chunks"]) == (True, 0)
    assert daemon.kept_chunks()["G3"] >= len(items)


def test_scrub_finds_what_an_engine_damaged_and_quarantines_it(
    daemon: Daemon, engine: StandIn, kvbm: Kvbm
) -> None:
    items = store(daemon, engine, "damaged", 4)
    assert kvbm("flush", "--url", daemon.url).status == 0
    before = kvbm("quarantine", "--json", "--url", daemon.url).json()["total"]
    sound = kvbm("scrub", "--url", daemon.url)
    assert sound.status == 0 and " 0 damaged" in sound.out
    key = items[1].chunk.key
    damage_in_host_memory(engine, key)
    found = kvbm("scrub", "--json", "--url", daemon.url)
    assert found.status == 1
    assert json.loads(found.out)["damaged_chunks"] == 1
    kept = kvbm("quarantine", "--json", "--url", daemon.url).json()
    assert kept["total"] == before + 1
    last = kept["entries"][-1]
    assert (last["tier"], last["key"]) == ("G2", key.hex())
    assert abs(last["at"] - time.time()) < 60 and "checksum" in last["why"]
    assert key.hex() in kvbm("quarantine", "--url", daemon.url).out
    told = kvbm("chunks", key.hex(), "--json", "--url", daemon.url).json()
    assert [residency["tier"] for residency in told["residencies"]] == ["G3"]
    assert engine.fetch([key]) == [bytes(items[1].data)], "the SSD's copy is sound"


def test_what_rots_on_the_ssd_is_found_kept_aside_over_a_restart_and_given_back(
    tmp_path: Path, kvbm: Kvbm
) -> None:
    items = make_items("rots", 8, CHUNK)
    bad = items[5]
    with running_daemon(tmp_path) as daemon:
        at = ("--url", daemon.url)
        daemon.start()
        with StandIn(daemon.socket, CHUNK) as engine:
            engine.store(items)
            assert engine.fetch(keys_of(items)) == [bytes(i.data) for i in items], "taken"
            assert kvbm("flush", *at).status == 0
            assert kvbm("scrub", "--tier", "G3", *at).status == 0
            extents = daemon.ssd_folder / "extents"
            flip_bit(extents, extents.read_bytes().index(bytes(bad.data)) + 17)
            found = kvbm("scrub", "--tier", "G3", "--json", *at)
            assert found.status == 1
            answer = json.loads(found.out)
            assert (answer["total_chunks"], answer["damaged_chunks"]) == (8, 1)
            assert engine.fetch(keys_of(items)) == [bytes(i.data) for i in items], "G2 has it"
        assert '"chunk_damaged"' in daemon.process.log.read_text()
        (listed,) = kvbm("quarantine", "--json", *at).json()["entries"]
        assert (listed["tier"], listed["key"]) == ("G3", bad.chunk.key.hex())
        assert listed["held_bytes"] == CHUNK
        daemon.stop()
        daemon.start()
        recalled = kvbm("quarantine", "--json", *at).json()
        assert recalled["total"] == 0, "since this start"
        (again,) = recalled["entries"]
        assert (again["key"], again["held_bytes"]) == (listed["key"], CHUNK)
        assert again["at"] == pytest.approx(listed["at"], abs=5)
        assert kvbm("scrub", "--tier", "G3", *at).status == 0
        assert kvbm("quarantine", "clear", make_key("other").hex(), *at).status == 1
        done = kvbm("quarantine", "clear", listed["key"], "--json", *at).json()
        assert done == {"cleared": 1, "freed_bytes": CHUNK}
        assert kvbm("quarantine", "--json", *at).json()["entries"] == []
        daemon.stop()
        daemon.start()
        assert kvbm("quarantine", "--json", *at).json()["entries"] == []


def test_draining_stops_stores_keeps_loads_and_loses_nothing(
    tmp_path: Path, kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a token, so that it is needed for all of it; then the SSD's bytes are damaged."""
    monkeypatch.setenv("KVBM_ADMIN__TOKEN", TOKEN)
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    with running_daemon(tmp_path) as daemon:
        daemon.start()
        ask = ("--url", daemon.url, "--token", f"file:{secret}")
        refused = kvbm("drain", "--url", daemon.url)
        assert refused.status == 1 and "no token was given" in refused.err
        with StandIn(daemon.socket, CHUNK) as engine:
            items = make_items("drained", 40, CHUNK)
            engine.store(items)
            done = kvbm("drain", *ask, "--json")
            assert done.status == 0 and json.loads(done.out)["done"]
            assert json.loads(done.out)["leased_bytes"] == 0
            engine.wait(lambda: not engine.client.take_slots(0, 1), "no slot is left")
            assert engine.fetch(keys_of(items)) == [bytes(item.data) for item in items]
            with StandIn(daemon.socket, CHUNK) as late:
                assert not late.client.take_slots(0, 1)
                assert late.fetch(keys_of(items)[:1]) == [bytes(items[0].data)]
            shown = kvbm("status", *ask)
            assert shown.status == 3 and "draining" in shown.out
            again = json.loads(kvbm("drain", *ask, "--json").out)
            assert again["since"] == json.loads(done.out)["since"]
            resumed = kvbm("resume", *ask, "--json")
            assert resumed.status == 0 and not json.loads(resumed.out)["draining"]
            assert kvbm("status", *ask).status == 0
            more = make_items("after it", 8, CHUNK)
            engine.store(more)
            assert json.loads(kvbm("drain", *ask, "--json").out)["done"]
            items += more
        daemon.stop()
        extents = daemon.ssd_folder / "extents"
        extents.write_bytes(bytes(extents.stat().st_size))
        daemon.start()
        assert daemon_chunks(kvbm, ask)["G3"] == len(items), "drained means written"
        with StandIn(daemon.socket, CHUNK) as engine:
            assert engine.fetch(keys_of(items)[:1]) == [None]
        (entry,) = kvbm("quarantine", "--json", *ask).json()["entries"]
        assert (entry["tier"], entry["key"]) == ("G3", items[0].chunk.key.hex())
        assert entry["why"] == "the bytes do not match the checksum"


def daemon_chunks(kvbm: Kvbm, ask: tuple[str, ...]) -> dict[str, int]:
    return {t["tier"]: t["chunks"] for t in kvbm("tiers", "--json", *ask).json()["tiers"]}


# -- top ----------------------------------------------------------------------------------


def test_top_prints_once_where_there_is_no_terminal(
    daemon: Daemon, engine: StandIn, kvbm: Kvbm
) -> None:
    shown = kvbm("top", "--url", daemon.url)
    assert shown.status == 0
    assert shown.out.count("offload_G3") == 1 and "stand-in" in shown.out
    assert "\x1b" not in shown.out
    assert kvbm("top", "--json", "--url", daemon.url).json()["node"] == "node-1"


def test_top_on_a_terminal_is_live_and_ends_on_q(daemon: Daemon) -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    child = subprocess.Popen(
        [PROGRAM, "top", "--url", daemon.url, "--interval", "0.1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environ,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        seen = b""
        while seen.count(b"offload_G3") < 3:
            seen += os.read(ours, 65536)
        os.write(ours, b"xq")
        while child.poll() is None:
            try:
                os.read(ours, 65536)
            except OSError:  # the other side has closed
                break
        assert child.wait(WAIT_S) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)


# -- events -------------------------------------------------------------------------------


def test_events_are_followed_where_the_daemon_says_they_are(
    daemon: Daemon, engine: StandIn, nats: EmbeddedNats
) -> None:
    environ = {
        **os.environ,
        "KVBM_EVENTS__NATS_USER": str(nats.user),
        "KVBM_EVENTS__NATS_PASSWORD": str(nats.password),
    }
    command = [str(PROGRAM), "events", "tail", "--json", "--url", daemon.url, "--count", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as child:
        try:
            assert child.stderr is not None
            assert child.stderr.readline() == "following kvbm.default.*.blocks\n"
            items = store(daemon, engine, "events", 1)
            out, err = child.communicate(timeout=WAIT_S)
        finally:
            child.kill()
    assert child.returncode == 0 and not err
    lines = [json.loads(line) for line in out.splitlines()]
    assert "seen first" in lines[0]["note"]
    stored = [(line["event"], line["tier"], line["keys"]) for line in lines[1:]]
    key = items[0].chunk.key.hex()
    assert stored == [("stored", "G2", [key]), ("stored", "G3", [key])]
    assert lines[2]["sequence"] == lines[1]["sequence"] + 1


def test_gaps_and_restarts_of_a_node_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    key = make_key("k")
    printer = Printer(as_json=False, count=4)
    batches = [
        BlockBatch(1, 10, "node-1", [Stored("G2", [key])]),
        BlockBatch(1, 11, "node-1", [Removed("G2", [key])]),
        BlockBatch(1, 15, "node-1", [Stored("G3", [key] * 6)]),
        BlockBatch(1, 15, "node-1", [Stored("G3", [key] * 6)]),  # once more
        BlockBatch(2, 1, "node-1", [Stored("G2", [key])]),
    ]
    assert [printer.batch(batch) for batch in batches] == [False] * 4 + [True]
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    name = key.hex()
    assert lines == [
        "node-1  -- seen first, at event 10",
        f"node-1  #10  G2 stored  {name}",
        f"node-1  #11  G2 removed  {name}",
        "node-1  -- gap: 3 events missed, 12 to 14",
        f"node-1  #15  G3 stored  {' '.join([name] * 4)} and 2 more",
        "node-1  -- restarted, at event 1",
        "node-1  -- gap: 1 events missed, 0 to 0",
        f"node-1  #1  G2 stored  {name}",
    ]


def test_a_nats_that_is_away_is_said_in_one_sentence() -> None:
    done = subprocess.run(
        [PROGRAM, "events", "tail", "--nats-url", "nats://127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and not done.stdout
    assert "NATS cannot be reached" in done.stderr and "Traceback" not in done.stderr


# -- doctor -------------------------------------------------------------------------------


@pytest.fixture
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for NIXL takes seconds; one test does it for real."""
    monkeypatch.setattr("storage_tiers.nixl.availability", lambda plugin: "NIXL is not looked for")


def checks_of(run: Run) -> dict[str, dict[str, str]]:
    return {check["check"]: check for check in json.loads(run.out)["checks"]}


def test_doctor_finds_a_sound_node_sound(daemon: Daemon) -> None:
    done = subprocess.run(
        [PROGRAM, "doctor", "--json", "--url", daemon.url],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = checks_of(Run(done.returncode, done.stdout, done.stderr))
    wrong = {name: check for name, check in found.items() if check["verdict"] == "problem"}
    assert not wrong and done.returncode == 0
    machine = {"socket", "ssd space", "O_DIRECT", "huge pages", "memlock"}
    assert machine | {"daemon", "events", "packages", "NIXL", "vLLM", "ready G3"} <= found.keys()
    assert "mode 0600" in found["socket"]["says"]
    assert all(bool(check["do"]) == (check["verdict"] != "ok") for check in found.values())


@pytest.mark.usefixtures("no_nixl")
def test_doctor_names_another_project_that_brings_our_packages(
    daemon: Daemon, kvbm: Kvbm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "kvbm-0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvbm\nVersion: 0.9\n")
    (info / "RECORD").write_text("kvbm/__init__.py,,\nkvbm-0.9.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = kvbm("doctor", "--json", "--url", daemon.url)
    assert done.status == 1
    clash = checks_of(done)["packages"]
    assert clash["verdict"] == "problem" and "'kvbm' of kvbm" in clash["says"]
    assert "pip uninstall kvbm" in clash["do"]


@pytest.mark.usefixtures("no_nixl")
def test_doctor_sees_a_socket_that_is_gone(daemon: Daemon, kvbm: Kvbm) -> None:
    aside = daemon.socket.with_name("aside")
    daemon.socket.rename(aside)
    try:
        done = kvbm("doctor", "--url", daemon.url)
    finally:
        aside.rename(daemon.socket)
    assert done.status == 1
    (line,) = [line for line in done.out.splitlines() if line.startswith("problem")]
    assert "socket" in line and str(daemon.socket) in line
    assert "-> restart the daemon" in done.out


@pytest.mark.usefixtures("no_nixl")
def test_doctor_goes_by_the_settings_when_no_daemon_answers(kvbm: Kvbm, tmp_path: Path) -> None:
    settings = tmp_path / "kvbm.yaml"
    settings.write_text(f"ssd: {{path: {tmp_path}, capacity: 4096TiB, mover: nixl}}\n")
    done = kvbm("doctor", "--json", "--url", NOWHERE, "--config", settings)
    assert done.status == 1
    found = checks_of(done)
    assert found["settings"]["verdict"] == "ok"
    assert found["daemon"]["verdict"] == "problem"
    assert "ssd.capacity needs" in found["ssd space"]["says"]
    assert found["NIXL"]["verdict"] == "problem", "the settings insist on it"
    settings.write_text("drum: {}\n")
    found = checks_of(kvbm("doctor", "--json", "--url", NOWHERE, "--config", settings))
    assert "did you mean 'dram'" in found["settings"]["says"]


# -- every command ------------------------------------------------------------------------

ENGINE = {f"engine {name}" for name in ("vllm", "attach", "print-unit")}
WITHOUT_DAEMON = {"bench replay", "router", "instances"} | ENGINE
COMMANDS = [
    *(["status"], ["tiers"], ["peers"], ["top"], ["why"]),
    *(["quarantine"], ["chunks", make_key("k").hex()], ["what-if", "--add", "1GiB"]),
    ["quarantine", "clear"],
    *(["drain"], ["resume"], ["flush"], ["scrub"], ["events", "tail"]),
    ["bench", "tiers", "--running"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_daemon_that_is_away_is_said_in_one_sentence(kvbm: Kvbm, command: list[str]) -> None:
    done = kvbm(*command, "--url", NOWHERE)
    assert done.status == 1 and not done.out
    assert done.err.startswith(f"kvbm: no kvbm-daemon answers at {NOWHERE}")
    assert len(done.err.splitlines()) == 1


def test_something_else_at_the_address_is_said(nats: EmbeddedNats, kvbm: Kvbm) -> None:
    done = kvbm("status", "--url", nats.url.replace("nats://", "http://"))
    assert done.status == 1 and "Traceback" not in done.err


def test_the_address_and_the_token_come_from_the_environment(
    daemon: Daemon, kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBM_ADMIN_URL", daemon.url)
    assert kvbm("status").status == 0
    monkeypatch.setenv("KVBM_ADMIN_TOKEN", "file:/nonexistent/token")
    done = kvbm("status")
    assert done.status == 1 and "/nonexistent/token" in done.err


def leaves() -> Iterator[tuple[str, Any]]:
    """Every command with its name; Typer brings a click of its own."""
    top: Any = typer.main.get_command(cli.app)
    for name, command in top.commands.items():
        below = getattr(command, "commands", None)
        if below is None or command.invoke_without_command:
            yield name, command
        if below is not None:
            yield from ((f"{name} {leaf}", found) for leaf, found in below.items())


def test_every_command_has_the_same_options_and_is_documented() -> None:
    page = (ROOT / "docs/OPERATING.md").read_text()
    # Doctor goes on without a daemon; others have nothing to do with one, or go on as well.
    assert len(list(leaves())) == len(COMMANDS) + 1 + len(WITHOUT_DAEMON)
    for name, command in leaves():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--url", "--token", "--json"} <= options or name in WITHOUT_DAEMON, name
        assert command.help, name
        assert f"`kvbm {name}" in page, f"docs/OPERATING.md does not mention kvbm {name}"


def test_the_router_is_started_in_the_commands_place() -> None:
    command = [sys.executable, "-m", "kvbm.cli", "router", "check-config", "--set", "policy=best"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "policy (from override)" in done.stderr


def test_what_is_slow_to_load_is_loaded_by_the_commands_that_need_it() -> None:
    """Every command starts with this; the others' libraries took it most of a second."""
    slow = ("pydantic_settings", "nats", "aiohttp", "structlog", "fastapi", "numpy", "httpx2")
    script = f"import sys, kvbm.cli.__main__; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"
