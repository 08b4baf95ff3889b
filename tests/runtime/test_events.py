"""The event planes: one set of behaviours for memory and NATS, and NATS's failures for real."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from runtime.embedded import EmbeddedNats
from runtime.events import EventPlane, EventPlaneSettings, Subscription, create_event_plane
from runtime.events.base import matches
from runtime.server_process import free_ports

WAIT_S = 15.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def take(subscription: Subscription, count: int) -> list[bytes]:
    async with asyncio.timeout(WAIT_S):
        return [(await anext(subscription)).payload for _ in range(count)]


def settings_for(server: EmbeddedNats, **other: int) -> EventPlaneSettings:
    return EventPlaneSettings(
        plane="nats",
        nats_url=f"nats://127.0.0.1:{server.port}",
        nats_user=server.user,
        nats_password=SecretStr(server.password),
        **other,  # type: ignore[arg-type]
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedNats]:
    """On a fixed port, so that it can be stopped and started again; the test starts it."""
    server = EmbeddedNats(tmp_path, port=free_ports(1)[0])
    yield server
    server.stop()


@pytest.fixture(params=["memory", "nats"])
async def plane(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EventPlane]:
    if request.param == "memory":
        plane = create_event_plane(EventPlaneSettings(plane="memory"), "test")
        await plane.start()
        yield plane
        await plane.close()
        return
    with EmbeddedNats(tmp_path) as server:
        plane = create_event_plane(settings_for(server), "test")
        await plane.start()
        yield plane
        await plane.close()


# -- every plane --------------------------------------------------------------------------


async def test_messages_reach_matching_subscriptions_in_order(plane: EventPlane) -> None:
    with_star, exact = plane.subscribe("kvbm.*.x"), plane.subscribe("kvbm.a.x")
    await asyncio.wait_for(with_star.active.wait(), WAIT_S)
    await asyncio.wait_for(exact.active.wait(), WAIT_S)
    for number in range(1000):
        assert plane.publish("kvbm.a.x", b"%d" % number)
    plane.publish("kvbm.b.x", b"b")
    assert await take(exact, 1000) == [b"%d" % number for number in range(1000)]
    assert (await take(with_star, 1001))[-1] == b"b"
    await until(lambda: plane.status().published_total == 1001)
    assert plane.status().dropped_total == 0


async def test_a_slow_subscriber_loses_the_oldest_and_knows_how_many(plane: EventPlane) -> None:
    slow = plane.subscribe("s", limit=10)
    other = plane.subscribe("s")
    await asyncio.wait_for(slow.active.wait(), WAIT_S)
    await asyncio.wait_for(other.active.wait(), WAIT_S)
    for number in range(100):
        plane.publish("s", b"%d" % number)
    await take(other, 100)
    await until(lambda: slow.dropped_total == 90)
    assert await take(slow, 10) == [b"%d" % number for number in range(90, 100)]


async def test_a_closed_subscription_ends_and_gets_nothing_more(plane: EventPlane) -> None:
    async with plane.subscribe("s") as subscription:
        await asyncio.wait_for(subscription.active.wait(), WAIT_S)
        plane.publish("s", b"1")
        assert await take(subscription, 1) == [b"1"]
    plane.publish("s", b"2")
    assert [message async for message in subscription] == []


async def test_closing_the_plane_ends_its_subscriptions(plane: EventPlane) -> None:
    subscription = plane.subscribe("s")
    await plane.close()
    await plane.close()
    async with asyncio.timeout(WAIT_S):
        assert [message async for message in subscription] == []


async def test_no_plane_takes_everything_and_delivers_nothing() -> None:
    plane = create_event_plane(EventPlaneSettings(plane="none"), "test")
    await plane.start()
    subscription = plane.subscribe("s")
    assert plane.publish("s", b"x")
    await plane.close()
    assert subscription.dropped_total == 0


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.b", "a.b.c", False),
        ("a.b.c", "a.b", False),
        ("a.*", "a.b", True),
        ("*.b", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
    ],
)
def test_subjects_match_as_in_nats(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected


# -- NATS: what can go wrong --------------------------------------------------------------


async def test_a_restart_of_the_server_loses_nothing_while_the_queue_has_room(
    server: EmbeddedNats,
) -> None:
    server.start()
    plane = create_event_plane(settings_for(server), "test")
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
    plane = create_event_plane(settings_for(server, queue_messages=100), "test")
    begin_s = time.perf_counter()
    await plane.start()
    taken = [plane.publish("s", b"x") for _ in range(10_000)]
    assert time.perf_counter() - begin_s < 1
    assert taken == [True] * 100 + [False] * 9_900
    status = plane.status()
    assert (status.queued, status.queue_limit, status.dropped_total) == (100, 100, 9_900)
    await until(lambda: "connect call failed" in str(plane.status().error).lower())

    server.start()
    await until(lambda: plane.status().published_total == 100)
    assert plane.publish("s", b"x")
    await plane.close()


async def test_bytes_are_bounded_too(server: EmbeddedNats) -> None:
    plane = create_event_plane(settings_for(server, queue_bytes=1000), "test")
    await plane.start()
    assert [plane.publish("s", b"x" * 400) for _ in range(4)] == [True, True, False, False]
    await plane.close()


async def test_a_message_over_the_servers_limit_is_dropped_alone(server: EmbeddedNats) -> None:
    server.start()
    plane = create_event_plane(settings_for(server), "test")
    await plane.start()
    subscription = plane.subscribe("s")
    await asyncio.wait_for(subscription.active.wait(), WAIT_S)
    assert plane.publish("s", b"x" * (2 << 20))
    assert plane.publish("s", b"small")
    assert await take(subscription, 1) == [b"small"]
    await until(lambda: plane.status().dropped_total == 1)
    await plane.close()


async def test_a_wrong_password_is_told_and_ends_nothing(server: EmbeddedNats) -> None:
    server.start()
    settings = settings_for(server).model_copy(update={"nats_password": SecretStr("wrong")})
    plane = create_event_plane(settings, "test")
    await plane.start()
    await until(lambda: "authorization" in str(plane.status().error).lower())
    assert plane.publish("s", b"x")
    await plane.close()


async def test_a_server_that_hangs_delays_neither_publisher_nor_close(
    server: EmbeddedNats,
) -> None:
    server.start()
    plane = create_event_plane(settings_for(server), "test")
    await plane.start()
    await until(lambda: plane.status().connected)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        begin_s = time.perf_counter()
        assert all(plane.publish("s", b"x" * 1000) for _ in range(1000))
        assert time.perf_counter() - begin_s < 1
        await plane.close()
        assert time.perf_counter() - begin_s < 5
    finally:
        os.kill(server.pid, signal.SIGCONT)


async def test_what_is_queued_is_sent_before_closing(server: EmbeddedNats) -> None:
    server.start()
    listener = create_event_plane(settings_for(server), "listener")
    plane = create_event_plane(settings_for(server), "test")
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
