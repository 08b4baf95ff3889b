"""Workers that publish the reference's events themselves: counted on for what they surely have."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from router.index import Tier, WorkerId
from runtime.events import EventPlane
from runtime.events.envelope import Envelope, encode_envelope, event_subject
from runtime.events.node_stream import TOPIC
from runtime.events.router_event import (
    Cleared,
    KvCacheEvent,
    KvCacheEventData,
    Removed,
    RouterEvent,
    StorageTier,
    Stored,
)
from runtime.events.router_wire import encode_msgpack
from tests.router.feed.world import NAMESPACE, RouterUnderTest, World
from tests.runtime.planes import until

WORKER = WorkerId(5, 1)


class Publisher:
    def __init__(self, plane: EventPlane, number: int) -> None:
        self.plane = plane
        self.number = number
        self.event_id = 0
        self._subject = event_subject(TOPIC, NAMESPACE, "backend")

    def say(
        self,
        data: KvCacheEventData,
        *,
        event_id: int | None = None,
        domain: str | None = "worker",
        worker: WorkerId = WORKER,
    ) -> None:
        number = self.event_id if event_id is None else event_id
        self.event_id = number + 1
        event = KvCacheEvent(number, data, worker.dp_rank)
        payload = encode_msgpack(RouterEvent(worker.instance, event, StorageTier.DEVICE, domain))
        now_ms = time.time_ns() // 1_000_000
        data_ = encode_envelope(Envelope(TOPIC, self.number, number, now_ms, payload))
        self.plane.publish(self._subject, data_)


def stored(parent: int | None, names: list[int], tokens: list[int]) -> Stored:
    return Stored(parent, np.array(names, np.uint64), np.array(tokens, np.uint64))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World("memory", tmp_path) as world:
        yield world


async def found(router: RouterUnderTest, tokens: list[int]) -> int:
    matches = router.index.find(np.array(tokens, np.uint64))
    if WORKER not in matches.workers:
        return 0
    return int(matches.reach[Tier.G1, matches.workers.index(WORKER)])


@pytest.fixture
async def router(world: World) -> AsyncIterator[RouterUnderTest]:
    async with world.router() as router:
        await until(lambda: router.feeds._messages is not None)
        yield router


async def heard(router: RouterUnderTest, events: int) -> None:
    await until(lambda: router.feeds.status.events_total == events)


async def test_a_workers_own_names_are_followed(world: World, router: RouterUnderTest) -> None:
    one = Publisher(await world.plane(), 9)
    one.say(stored(None, [100, 101], [1, 2]), event_id=40)
    one.say(stored(101, [102], [3]), domain=None)
    await heard(router, 2)
    assert await found(router, [1, 2, 3, 4]) == 3
    one.say(Removed(np.array([101], np.uint64)))
    await heard(router, 3)
    assert await found(router, [1, 2, 3]) == 1
    one.say(Cleared())
    await heard(router, 4)
    assert len(router.index) == 0


@pytest.mark.parametrize("restarts", [False, True])
async def test_after_a_gap_or_a_restart_nothing_from_before_is_counted_on(
    world: World, router: RouterUnderTest, restarts: bool
) -> None:
    one = Publisher(await world.plane(), 9)
    one.say(stored(None, [100, 101], [1, 2]))
    if restarts:
        one = Publisher(await world.plane(), 10)
    one.say(stored(None, [110], [7]), event_id=None if restarts else 5)
    await heard(router, 2)
    assert await found(router, [1, 2]) == 0 and await found(router, [7]) == 1
    status = router.feeds.status.workers
    assert (status.gaps_total, status.restarts_total) == ((0, 1) if restarts else (1, 0))


async def test_what_comes_twice_is_applied_once(world: World, router: RouterUnderTest) -> None:
    one = Publisher(await world.plane(), 9)
    one.say(stored(None, [100], [1]))
    one.say(Removed(np.array([100], np.uint64)))
    one.say(stored(None, [100], [1]), event_id=0)
    await heard(router, 3)
    assert len(router.index) == 0
    assert router.feeds.status.workers.duplicates_total == 1


async def test_a_worker_that_a_node_speaks_for_is_heard_there_only(
    world: World, router: RouterUnderTest
) -> None:
    node = await world.node()
    node.readers = {(WORKER.instance, WORKER.dp_rank): 3}
    await node.relabel()
    await until(lambda: router.is_live() and WORKER in router.feeds._nodes["a"].holdings.workers)
    one = Publisher(await world.plane(), 9)
    one.say(stored(None, [100], [1]))
    one.say(stored(None, [100], [1]), domain="cache_owner", worker=WorkerId(77))
    await heard(router, 2)
    assert len(router.index) == 0
    assert router.feeds.status.workers.refused_total == 2
