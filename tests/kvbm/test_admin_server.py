"""The admin API's server: its address, the daemon's signals, its end."""

from __future__ import annotations

import asyncio
import signal

import pytest

from kvbm.daemon.admin import create_app
from kvbm.daemon.metrics import Metrics
from runtime.web.server import ListenError, WebServer
from tests.kvbm.plain_node import Node


@pytest.fixture
def node() -> Node:
    return Node()


async def test_a_taken_port_is_told_with_the_setting_to_change(node: Node) -> None:
    first = WebServer(create_app(node, node, Metrics("1", "n")), "127.0.0.1", 0, section="admin")
    await first.start()
    second = WebServer(
        create_app(node, node, Metrics("1", "n")), "127.0.0.1", first.port, section="admin"
    )
    with pytest.raises(ListenError, match=r"in use.*change admin\.host or admin\.port"):
        await second.start()
    await second.stop()
    await first.stop()
    await first.stop()


async def test_an_address_that_is_none_is_told(node: Node) -> None:
    server = WebServer(create_app(node, node, Metrics("1", "n")), "256.0.0.1", 0, section="admin")
    with pytest.raises(ListenError, match=r"cannot listen on 256\.0\.0\.1 port 0"):
        await server.start()


async def test_signals_stay_the_daemons(node: Node) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = WebServer(create_app(node, node, Metrics("1", "n")), "127.0.0.1", 0, section="admin")
    await server.start()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    await server.stop()


async def test_stopping_does_not_wait_for_a_client_that_stays_connected(node: Node) -> None:
    server = WebServer(create_app(node, node, Metrics("1", "n")), "127.0.0.1", 0, section="admin")
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b"200 OK" in await reader.readline()
    async with asyncio.timeout(60):
        await server.stop()
    writer.close()
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncio.open_connection("127.0.0.1", server.port)
