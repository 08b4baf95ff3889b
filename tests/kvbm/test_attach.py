"""`kvbm engine attach`: a server that runs already, and how it is known which instance it is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvbm.cli.attaching import Chosen
from kvbm.engine.attach import AttachRefused
from kvbm.protocol import Routing
from kvbm.stand_in import StandIn
from runtime.server_process import free_ports
from tests.kvbm.conftest import Kvbm
from tests.kvbm.engine_programs import (
    FAKE,
    ROOT,
    WAIT_S,
    FakeEngine,
    Place,
    attached,
    settings,
)
from tests.kvbm.test_cli import running_daemon
from tests.waiting import wait_until

NOWHERE = "http://127.0.0.1:1"
CHUNK = 64 << 10


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextmanager
def running(port: int) -> Iterator[FakeEngine]:
    """A fake engine of its own."""
    engine = FakeEngine(port)
    command = [*FAKE.split(), "a-model", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: engine.is_there, WAIT_S, "it listens")
        yield engine
    finally:
        process.kill()
        process.wait()


def routing(worker_id: int, dp_rank: int = 0) -> Routing:
    return Routing(worker_id, dp_rank, b"\x01" * 16, 16, 0)


def test_a_server_is_an_instance_for_as_long_as_it_is_there(place: Place) -> None:
    [port] = free_ports(1)
    program = attached(place, f"http://127.0.0.1:{port}", "--url", NOWHERE, "--host", "10.0.0.7")
    with program:
        wait_until(lambda: bool(program.events("engine_awaited")), WAIT_S, "it waits for it")
        with running(port) as engine:
            [first] = place.wait_for("healthy")
            assert first.transport == first.labels["url"] == f"http://10.0.0.7:{port}"
            assert first.labels["model"] == "a-model" and first.labels["block_tokens"] == "16"
            engine.do(health=503)
            place.wait_for("running")
            engine.do(health=200)
            place.wait_for("healthy")
        place.wait_for()
        assert program.process.poll() is None, "it waits for it to come back"
        with running(port) as engine:
            [second] = place.wait_for("healthy")
            assert second.id != first.id, "whatever the first one held is gone"
            program.terminate()
            assert program.wait() == 0
            assert place.records() == []
            assert engine.told()["sigterms"] == 0, "the server is not ours to stop"
    assert [event["why"][:5] for event in program.events("routed_by_load_only")] == 2 * ["which"]


def test_the_daemon_knows_which_engine_it_is(
    place: Place, tmp_path_factory: pytest.TempPathFactory, kvbm: Kvbm
) -> None:
    with ExitStack() as open_now:
        daemon = open_now.enter_context(running_daemon(tmp_path_factory.mktemp("node")))
        daemon.start()
        url = daemon.url
        [port] = free_ports(1)
        engine = open_now.enter_context(running(port))
        first = StandIn(daemon.socket, CHUNK, routing=routing(0xA1))
        open_now.enter_context(first)

        told = kvbm("status", "--json", "--url", url).json()["sessions"]
        [scheduler] = [session for session in told if session["role"] == "scheduler"]
        assert (scheduler["worker_id"], scheduler["dp_rank"]) == ("a1", 0)
        assert {s["worker_id"] for s in told if s["role"] == "worker"} == {None}

        program = open_now.enter_context(attached(place, engine.url, "--url", url))
        [record] = place.wait_for("healthy")
        assert record.id == "a1"

        # Another rank of the same engine is the same instance; two engines are two.
        choose = Chosen(None, url, None)
        open_now.enter_context(StandIn(daemon.socket, CHUNK, routing=routing(0xA1, 1)))
        assert choose(frozenset()) == 0xA1
        open_now.enter_context(StandIn(daemon.socket, CHUNK, routing=routing(0xB2)))
        assert choose({0xA1}) == 0xB2
        with pytest.raises(AttachRefused, match=r"2 engines .* 0xa1 \(pid .*\); 0xb2 \(pid"):
            choose(frozenset())
        assert choose({0xA1, 0xB2}) not in {0xA1, 0xB2}
        assert Chosen(7, url, None)({0xA1}) == 7
        with pytest.raises(AttachRefused, match="0xa1 is registered already"):
            Chosen(0xA1, url, None)({0xA1})

        page = kvbm("status", "--url", url).out
        assert "worker 0xa1" in page
        assert program.process.poll() is None


def test_what_cannot_be_attached_is_said(place: Place, kvbm: Kvbm) -> None:
    for bad, why in {
        "127.0.0.1:8000": "is no address like http://10.0.0.7:8000",
        "http://127.0.0.1:8000/v1": "without /v1",
        "http://127.0.0.1:80000": "is no address",
    }.items():
        done = kvbm("engine", "attach", bad, *settings(place))
        assert done.status == 1 and why in done.err, done.err
    done = kvbm("engine", "attach", "http://127.0.0.1:1", "--worker-id", "0")
    assert done.status == 1 and "engine.worker_id" in done.err


def test_a_daemon_that_may_not_be_asked_is_no_guess() -> None:
    with pytest.raises(AttachRefused, match="/nonexistent/token"):
        Chosen(None, NOWHERE, "file:/nonexistent/token")(frozenset())
