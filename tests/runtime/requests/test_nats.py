"""NATS alone: its server restarts or hangs, messages get lost, payloads meet its own limit."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import nats as nats_library
import pytest
from pydantic import SecretStr

from runtime.embedded import EmbeddedNats
from runtime.requests import RequestClient, RequestPlaneSettings, create_request_plane
from runtime.requests.errors import ConnectionLost, PayloadTooLarge
from runtime.requests.nats import NUMBER_BYTES, SCHEME
from runtime.requests.wire import VERSION, Frame, Hello, Open, Ping, encode
from runtime.server_process import free_ports
from tests.runtime.requests.conftest import nats_options
from tests.runtime.requests.handlers import WAIT_S, Handlers, until

QUICK = {"ping_interval": 0.2, "silence_max": 0.6, "connect_timeout": 1.0}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedNats]:
    """On a fixed port, so that it can be stopped and started again."""
    with EmbeddedNats(tmp_path, port=free_ports(1)[0]) as server:
        yield server


@pytest.fixture
async def served(broker: EmbeddedNats) -> AsyncIterator[tuple[RequestClient, str, Handlers]]:
    settings = RequestPlaneSettings(plane="nats", **QUICK, **nats_options(broker))  # type: ignore[arg-type]
    plane, handlers = create_request_plane(settings, "test"), Handlers()
    server, client = plane.server(), plane.client()
    handlers.serve(server)
    yield client, await server.start(), handlers
    await client.close()
    await server.close()
    assert server.status().in_flight == 0


Served = tuple[RequestClient, str, Handlers]


async def comes_back(client: RequestClient, address: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                stream = client.stream(address, "test.echo.once", b"x")
                assert [item async for item in stream] == [b"x"]
                return
            except ConnectionLost:
                await asyncio.sleep(0.05)


async def test_after_a_restart_of_nats_the_same_address_is_served(
    broker: EmbeddedNats, served: Served
) -> None:
    client, address, handlers = served
    stream = client.stream(address, "test.wait.forever", b"")
    assert await asyncio.wait_for(anext(stream), WAIT_S) == b"begun"
    broker.stop()
    with pytest.raises(ConnectionLost, match="NATS") as caught:
        await asyncio.wait_for(anext(stream), WAIT_S)
    assert caught.value.received_items == 1
    await until(lambda: handlers.ended == 1)
    broker.start()
    await comes_back(client, address)


async def test_a_nats_server_that_hangs_is_noticed_by_both_sides(
    broker: EmbeddedNats, served: Served
) -> None:
    client, address, handlers = served
    stream = client.stream(address, "test.wait.forever", b"")
    assert await asyncio.wait_for(anext(stream), WAIT_S) == b"begun"
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ConnectionLost, match="said nothing"):
            await asyncio.wait_for(anext(stream), WAIT_S)
        await until(lambda: handlers.ended == 1)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    await comes_back(client, address)


async def test_payloads_are_bounded_by_what_nats_takes(served: Served) -> None:
    """Its `max_payload` is 1 MiB, below the frames that the settings allow."""
    client, address, _ = served
    with pytest.raises(PayloadTooLarge, match="a request of 2097152 bytes; at most 1048"):
        await anext(client.stream(address, "test.echo.once", b"x" * (2 << 20)))
    with pytest.raises(PayloadTooLarge, match="a response of 2097152 bytes; at most 1048"):
        assert not [item async for item in client.stream(address, "test.one.large", b"2097152")]


async def test_an_address_that_nobody_serves_is_known_at_once(served: Served) -> None:
    client, address, _ = served
    with pytest.raises(ConnectionLost, match="nobody listens") as caught:
        await anext(client.stream(address + "x", "test.echo.once", b""))
    assert caught.value.may_retry


async def test_a_message_that_is_missing_ends_the_session(broker: EmbeddedNats) -> None:
    """A client of our own making skips a number; silence would be noticed a minute later."""
    settings = RequestPlaneSettings(plane="nats", silence_max=60.0, **nats_options(broker))  # type: ignore[arg-type]
    server, handlers = create_request_plane(settings, "test").server(), Handlers()
    handlers.serve(server)
    address = await server.start()
    raw = await nats_library.connect(broker.url, user=broker.user, password=broker.password)
    inbox = await raw.subscribe("inbox.of.test")

    async def say(subject: str, number: int, frame: Frame) -> None:
        data = number.to_bytes(NUMBER_BYTES, "little") + encode(frame)
        await raw.publish(subject, data, reply="inbox.of.test")

    await say(address.removeprefix(SCHEME), 0, Hello(VERSION, 1 << 20, "raw"))
    session = (await inbox.next_msg(WAIT_S)).reply
    await say(session, 1, Open(1, "test.wait.forever", b"", {}, 60.0, 65536))
    await until(lambda: handlers.begun == 1)
    await say(session, 3, Ping())
    await until(lambda: handlers.ended == 1)
    assert server.status().connections == 0
    await raw.close()
    await server.close()


async def test_a_server_may_start_before_nats_and_requests_say_what_is_missing(
    tmp_path: Path,
) -> None:
    broker = EmbeddedNats(tmp_path, port=free_ports(1)[0])
    settings = RequestPlaneSettings(
        plane="nats",
        nats_url=f"nats://127.0.0.1:{broker.port}",
        **QUICK,  # type: ignore[arg-type]
        nats_user=broker.user,
        nats_password=SecretStr(broker.password),
    )
    plane, handlers = create_request_plane(settings, "test"), Handlers()
    server, client = plane.server(), plane.client()
    handlers.serve(server)
    address = await server.start()
    with pytest.raises(ConnectionLost, match="NATS at"):
        await anext(client.stream(address, "test.echo.once", b""))
    with broker:
        await comes_back(client, address)
        await client.close()
        await server.close()
