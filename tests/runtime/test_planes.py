"""What every event plane does: one set of tests for memory, NATS and ZMQ.

`plane` is one program that hears itself; `fleet` makes several that hear each other, which takes a
plane that leaves the process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.embedded import EmbeddedNats
from runtime.events import EventPlane, EventPlaneSettings, Subscription, create_event_plane
from runtime.events.base import matches
from tests.runtime.planes import (
    WAIT_S,
    Fleet,
    NatsFleet,
    ZmqFleet,
    nats_settings,
    take,
    until,
    zmq_settings,
)


@pytest.fixture(params=["memory", "nats", "zmq"])
async def plane(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EventPlane]:
    if request.param == "nats":
        with EmbeddedNats(tmp_path) as server:
            plane = create_event_plane(nats_settings(server), "test")
            await plane.start()
            yield plane
            await plane.close()
        return
    settings = zmq_settings() if request.param == "zmq" else EventPlaneSettings(plane="memory")
    plane = create_event_plane(settings, "test")
    await plane.start()
    yield plane
    await plane.close()


@pytest.fixture(params=["nats", "zmq"])
async def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Fleet]:
    if request.param == "nats":
        with EmbeddedNats(tmp_path) as server:
            fleet: Fleet = NatsFleet(server)
            yield fleet
            await fleet.close()
        return
    fleet = ZmqFleet()
    yield fleet
    await fleet.close()


# -- one program --------------------------------------------------------------------------


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


# -- several programs -----------------------------------------------------------------------


async def heard(publisher: EventPlane, subscription: Subscription, subject: str) -> None:
    """Publish until a message arrives: from then on the two are connected."""
    async with asyncio.timeout(WAIT_S):
        while True:
            publisher.publish(subject, b"hello")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await anext(subscription)
                    return


async def after_hellos(subscription: Subscription, count: int) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < count:
        found += [payload for payload in await take(subscription, 1) if payload != b"hello"]
    return found


async def test_a_listener_hears_another_program_in_order(fleet: Fleet) -> None:
    publisher, listener = await fleet.publisher(), await fleet.listener()
    subscription = listener.subscribe("kvbm.*.blocks")
    await heard(publisher, subscription, "kvbm.a.blocks")
    for number in range(1000):
        assert publisher.publish("kvbm.a.blocks", b"%d" % number)
        assert publisher.publish("kvbm.a.other", b"not asked for")
    assert await after_hellos(subscription, 1000) == [b"%d" % n for n in range(1000)]
    assert listener.status().missed_total == listener.status().malformed_total == 0


async def test_a_publishers_restart_is_heard_by_a_listener_that_stayed(fleet: Fleet) -> None:
    publisher, listener = await fleet.publisher(), await fleet.listener()
    subscription = listener.subscribe("s")
    await heard(publisher, subscription, "s")
    for run in range(3):
        publisher.publish("s", b"run %d" % run)
        assert await after_hellos(subscription, 1) == [b"run %d" % run]
        await publisher.close()
        publisher = await fleet.publisher()
        await heard(publisher, subscription, "s")
    assert listener.status().malformed_total == 0


async def test_a_slow_subscriber_of_another_program_is_bounded_and_counted(fleet: Fleet) -> None:
    publisher, listener = await fleet.publisher(), await fleet.listener()
    slow, other = listener.subscribe("s", limit=10), listener.subscribe("s")
    await heard(publisher, other, "s")
    for number in range(1000):
        publisher.publish("s", b"%d" % number)
    assert await after_hellos(other, 1000) == [b"%d" % n for n in range(1000)]
    assert await take(slow, 10) == [b"%d" % n for n in range(990, 1000)]
    assert slow.dropped_total >= 990
    assert listener.status().missed_total == 0


async def test_what_is_published_before_closing_is_sent(fleet: Fleet) -> None:
    publisher, listener = await fleet.publisher(), await fleet.listener()
    subscription = listener.subscribe("s")
    await heard(publisher, subscription, "s")
    for number in range(1000):
        publisher.publish("s", b"%d" % number)
    await publisher.close()
    assert await after_hellos(subscription, 1000) == [b"%d" % n for n in range(1000)]


async def test_closing_ends_a_publisher_twice_and_a_listener_with_subscriptions(
    fleet: Fleet,
) -> None:
    publisher, listener = await fleet.publisher(), await fleet.listener()
    subscription = listener.subscribe("s")
    await heard(publisher, subscription, "s")
    for plane in (publisher, listener):
        await plane.close()
        await plane.close()
    async with asyncio.timeout(WAIT_S):
        assert {message.payload async for message in subscription} <= {b"hello"}


# -- no plane, and subjects -----------------------------------------------------------------


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
