"""The event plane over NATS: what can go wrong, with a real server."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from runtime.embedded import EmbeddedNats
from runtime.events import Message, create_event_plane
from runtime.events.outbox import Outbox
from runtime.server_process import free_ports
from tests.runtime.planes import QUICK_S, WAIT_S, nats_settings, take, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedNats]:
    """On a fixed port, so that it can be stopped and started again; the test starts it."""
    server = EmbeddedNats(tmp_path, port=free_ports(1)[0])
    yield server
    server.stop()


async def test_a_restart_of_the_server_loses_nothing_while_the_queue_has_room(
    server: EmbeddedNats,
) -> None:
    server.start()
    plane = create_event_plane(nats_settings(server), "test")
    await plane.start()
    subscription = plane.subscribe("s")
    await asyncio.wait_for(subscription.active.wait(), WAIT_S)
    plane.publish("s", b"before")
    assert await take(subscription, 1) == [b"before"]

    server.stop()
    await until(lambda: not plane.status().connected)
    assert not subscription.active.is_set()
    assert plane.publish("s", b"during")
    assert plane.status().error
    server.start()

    # The burst is sent once the server is back; the subscription is made before that.
    assert await take(subscription, 1) == [b"during"]
    plane.publish("s", b"after")
    assert await take(subscription, 1) == [b"after"]
    assert plane.status().error is None
    await plane.close()


async def test_without_a_server_publishing_is_quick_bounded_and_counted(
    server: EmbeddedNats,
) -> None:
    plane = create_event_plane(nats_settings(server, queue_messages=100), "test")
    begin_s = time.perf_counter()
    await plane.start()
    taken = [plane.publish("s", b"x") for _ in range(10_000)]
    assert time.perf_counter() - begin_s < QUICK_S
    assert taken == [True] * 100 + [False] * 9_900
    status = plane.status()
    assert (status.queued, status.queue_limit, status.dropped_total) == (100, 100, 9_900)
    await until(lambda: "connect call failed" in str(plane.status().error).lower())

    server.start()
    await until(lambda: plane.status().published_total == 100)
    assert plane.publish("s", b"x")
    await plane.close()


async def test_bytes_are_bounded_too(server: EmbeddedNats) -> None:
    plane = create_event_plane(nats_settings(server, queue_bytes=1000), "test")
    await plane.start()
    assert [plane.publish("s", b"x" * 400) for _ in range(4)] == [True, True, False, False]
    await plane.close()


async def test_a_message_over_the_servers_limit_is_dropped_alone(server: EmbeddedNats) -> None:
    server.start()
    plane = create_event_plane(nats_settings(server), "test")
    await plane.start()
    subscription = plane.subscribe("s")
    await asyncio.wait_for(subscription.active.wait(), WAIT_S)
    assert plane.publish("s", b"x" * (2 << 20))
    assert plane.publish("s", b"small")
    assert await take(subscription, 1) == [b"small"]
    await until(lambda: plane.status().dropped_total == 1)
    await plane.close()


async def test_a_fault_that_is_no_network_s_is_counted_and_ends_nothing(
    server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.start()
    plane = create_event_plane(nats_settings(server), "test")
    bugs = [KeyError("a bug")]
    burst = Outbox.burst

    def failing(outbox: Outbox, count_max: int) -> list[Message]:
        if bugs:
            raise bugs.pop()
        return burst(outbox, count_max)

    monkeypatch.setattr(Outbox, "burst", failing)
    await plane.start()
    subscription = plane.subscribe("s")
    plane.publish("s", b"x")
    assert await take(subscription, 1) == [b"x"]
    assert (plane.status().faults_total, plane.status().error) == (1, None)
    said = capsys.readouterr().out
    assert "event_plane_failed" in said and "Traceback" in said
    await plane.close()


async def test_a_wrong_password_is_told_and_ends_nothing(server: EmbeddedNats) -> None:
    server.start()
    settings = nats_settings(server).model_copy(update={"nats_password": SecretStr("wrong")})
    plane = create_event_plane(settings, "test")
    await plane.start()
    await until(lambda: "authorization" in str(plane.status().error).lower())
    assert plane.publish("s", b"x")
    await plane.close()


async def test_a_server_that_hangs_delays_neither_publisher_nor_close(
    server: EmbeddedNats,
) -> None:
    server.start()
    plane = create_event_plane(nats_settings(server), "test")
    await plane.start()
    await until(lambda: plane.status().connected)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        begin_s = time.perf_counter()
        assert all(plane.publish("s", b"x" * 1000) for _ in range(1000))
        assert time.perf_counter() - begin_s < QUICK_S
        await plane.close()
        assert time.perf_counter() - begin_s < QUICK_S
    finally:
        os.kill(server.pid, signal.SIGCONT)


async def test_what_is_queued_is_sent_before_closing(server: EmbeddedNats) -> None:
    server.start()
    listener = create_event_plane(nats_settings(server), "listener")
    plane = create_event_plane(nats_settings(server), "test")
    await listener.start()
    await plane.start()
    subscription = listener.subscribe("s")
    await asyncio.wait_for(subscription.active.wait(), WAIT_S)
    await until(lambda: plane.status().connected)
    for _ in range(1000):
        plane.publish("s", b"x")
    await plane.close()
    assert len(await take(subscription, 1000)) == 1000
    await listener.close()
