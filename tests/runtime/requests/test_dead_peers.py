"""Servers that are killed, that hang, that come back: what their clients learn, and how soon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from runtime.embedded import EmbeddedNats
from runtime.requests import RequestClient, RequestPlaneSettings, create_request_plane
from runtime.requests.errors import ConnectionLost, DeadlineExceeded
from runtime.server_process import free_ports
from tests.runtime.requests.conftest import KINDS, nats_options
from tests.runtime.requests.handlers import WAIT_S, until

ROOT = Path(__file__).parents[3]
SILENCE_S = 1.0  # a child of a busy machine is heard more often


class Child:
    """A server process, and a client of this process that notices silence within a second."""

    def __init__(self, kind: str, other: dict[str, Any]) -> None:
        quick = {"ping_interval": 0.2, "silence_max": SILENCE_S, "connect_timeout": 3.0}
        port = {"port": free_ports(1)[0]} if kind in {"tcp", "http"} else {}
        self.options: dict[str, Any] = {"plane": kind, **quick, **port, **other}
        settings = RequestPlaneSettings(**self.options)
        self.client: RequestClient = create_request_plane(settings, "test").client()
        self.process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self) -> None:
        plain = {
            name: value.get_secret_value() if name == "nats_password" else value
            for name, value in self.options.items()
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.requests.server_child", json.dumps(plain)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert "://" in self.address

    def send(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture(params=[kind for kind in KINDS if kind != "memory"])
async def child(request: pytest.FixtureRequest) -> AsyncIterator[Child]:
    nats: dict[str, Any] = {}
    if request.param == "nats":
        server: EmbeddedNats = request.getfixturevalue("nats")
        nats = nats_options(server)
    child = Child(request.param, nats)
    child.start()
    yield child
    await child.client.close()
    child.end()


async def test_a_server_killed_in_the_middle_is_lost_after_what_it_sent(child: Child) -> None:
    stream = child.client.stream(child.address, "test.wait.forever", b"")
    assert await asyncio.wait_for(anext(stream), WAIT_S) == b"begun"
    child.send(signal.SIGKILL)
    with pytest.raises(ConnectionLost) as caught:
        await asyncio.wait_for(anext(stream), WAIT_S)
    error = caught.value
    assert (error.received_items, error.was_sent, error.may_retry) == (1, True, False)


async def test_a_server_that_hangs_is_noticed_long_before_the_deadline(child: Child) -> None:
    stream = child.client.stream(child.address, "test.wait.forever", b"")
    assert await asyncio.wait_for(anext(stream), WAIT_S) == b"begun"
    child.send(signal.SIGSTOP)
    with pytest.raises(ConnectionLost, match="said nothing for") as caught:
        await asyncio.wait_for(anext(stream), WAIT_S)
    assert caught.value.received_items == 1
    # And a new request waits no longer than for a connection.
    with pytest.raises(ConnectionLost) as refused:
        await asyncio.wait_for(
            anext(child.client.stream(child.address, "test.echo.once", b"")), WAIT_S
        )
    assert refused.value.received_items == 0
    child.send(signal.SIGCONT)
    again = child.client.stream(child.address, "test.echo.once", b"back")
    assert await asyncio.wait_for(anext(again), WAIT_S) == b"back"


async def test_a_handler_that_is_quiet_for_long_is_not_taken_for_dead(child: Child) -> None:
    stream = child.client.stream(child.address, "test.until.stopped", b"")
    assert await asyncio.wait_for(anext(stream), WAIT_S) == b"begun"
    await asyncio.sleep(2 * SILENCE_S)
    stream.stop()
    assert await asyncio.wait_for(anext(stream), WAIT_S) == b"stopped"


async def test_a_deadline_holds_while_the_server_hangs(child: Child) -> None:
    stream = child.client.stream(child.address, "test.wait.forever", b"", deadline_s=0.4)
    assert await asyncio.wait_for(anext(stream), WAIT_S) == b"begun"
    child.send(signal.SIGSTOP)
    with pytest.raises((DeadlineExceeded, ConnectionLost)):
        await asyncio.wait_for(anext(stream), WAIT_S)
    child.send(signal.SIGCONT)


async def test_a_server_that_comes_back_is_used_again(child: Child) -> None:
    first = child.client.stream(child.address, "test.echo.once", b"1")
    assert await asyncio.wait_for(anext(first), WAIT_S) == b"1"
    del first
    child.end()
    await until(lambda: child.client.status().in_flight == 0)
    with pytest.raises(ConnectionLost) as caught:
        async with asyncio.timeout(WAIT_S):
            await anext(child.client.stream(child.address, "test.echo.once", b"2"))
    assert caught.value.received_items == 0
    child.start()
    again = child.client.stream(child.address, "test.echo.once", b"3")
    assert await asyncio.wait_for(anext(again), WAIT_S) == b"3"
