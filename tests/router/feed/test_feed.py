"""The index follows nodes over real planes, block by block."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.router.feed.node import Life
from tests.router.feed.world import World
from tests.runtime.planes import until

READERS = {(0x11, 0): 7, (0x11, 1): 7, (0x12, 0): 8}


@pytest.fixture(params=["memory", "nats", "zmq"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with World(request.param, tmp_path) as world:
        yield world


@pytest.fixture
async def quiet(tmp_path: Path) -> AsyncIterator[World]:
    """Where the plane makes no difference."""
    async with World("memory", tmp_path) as world:
        yield world


async def test_a_router_holds_what_two_nodes_hold_before_it_starts_and_after(world: World) -> None:
    first, second = await world.node("a"), await world.node("b")
    lives = [
        Life(first, random.Random(1), READERS, [7, 8]),
        Life(second, random.Random(2), {(0x21, 0): 9}, [9]),
    ]
    for life in lives:
        life.live(200)
    await first.relabel()
    await second.relabel()
    async with world.router() as router:
        await until(lambda: router.is_live(2))
        for _ in range(20):
            for life in lives:
                life.live(10)
            await until(lambda: router.is_live(2))
        await router.equals(first, second)
        assert {node.snapshots_total for node in router.feeds.status.nodes} == {1}
