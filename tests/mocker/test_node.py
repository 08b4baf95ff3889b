"""A node of mock engines as routers see it: the production feed makes of it what they hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest

from mocker.content import Chain, TokenContent
from mocker.engine import Engine, single_steps
from mocker.node import MockNode
from mocker.routing import speed_of
from mocker.sequence import Request
from mocker.tiers import LruTier, NodeTiers
from mocker.timing import TierTiming
from router.feed import NodeFeeds
from router.feed_settings import FeedSettings
from router.index import Index, Tier, WorkerId
from router.speeds import Speeds
from router.workers import Speed, Worker, Workers
from runtime.component import Runtime
from runtime.discovery.leased import LeasedDiscovery
from runtime.discovery.memory import MemoryStore
from runtime.events.memory import MemoryPlane
from runtime.events.node_stream import WorkerSpeed
from runtime.requests import RequestPlaneSettings, create_request_plane
from tests.mocker.builders import BLOCK, settings

WAIT_S = 60.0
WORKERS = (11, 12)
SPEED = WorkerSpeed(WORKERS[0], 0, prefill_s_per_token=0.25)


class World:
    """Two engines over one host memory, their node, and a router that follows it."""

    def __init__(self, runtime: Runtime, plane: MemoryPlane, ring_bytes: int) -> None:
        self.node = MockNode("a", "test", plane, ring_bytes=ring_bytes)
        self.tiers = NodeTiers(0, TierTiming(), LruTier("G2", 40), emit=self.node.emit)
        small = settings(num_blocks=24)
        self.engines = [
            Engine(small, index=number, tiers=self.tiers, emit=self.node.emit)
            for number in range(len(WORKERS))
        ]
        self.index, self.workers = Index(1 << 16), Workers()
        self.speeds = Speeds(self.workers)
        given = FeedSettings(reorder=0.0, backoff=0.01)
        self.feeds = NodeFeeds(runtime, plane, self.index, "test", given, speeds=self.speeds)
        self._dice = random.Random(7)
        self._numbers = iter(range(1 << 20))
        self._prompts = [[self._dice.getrandbits(31) for _ in range(40)] for _ in range(6)]

    def serve_some(self, count: int = 30) -> None:
        """More than the caches take, with prompts that begin alike."""
        for _ in range(count):
            engine = self._dice.choice(self.engines)
            prompt = self._dice.choice(self._prompts)[: self._dice.randint(1, 40)]
            content = TokenContent([*prompt, 1, 2, 3], BLOCK)
            request = Request(next(self._numbers), len(prompt), 3, content)
            assert engine.submit(request, 0) is None
            for _ in single_steps(engine, 0):
                pass

    async def agrees(self) -> None:
        """The index holds what the engines' pools and the node's memory do, and nothing else."""
        async with asyncio.timeout(WAIT_S):
            while not self._is_caught_up():
                await asyncio.sleep(0.005)
        for worker, engine in zip(WORKERS, self.engines, strict=True):
            held = self.index.held_blocks(WorkerId(worker))
            assert tiers_of(held) == (len(engine.pool._registered), len(self.tiers.g2 or ()))
        for prompt in self._prompts:
            chain = Chain(TokenContent(prompt, BLOCK))
            chain.extend(len(prompt) // BLOCK)
            found = self.index.find(np.array(chain.locals, np.uint64))
            columns = {worker: n for n, worker in enumerate(found.workers)}
            for worker, engine in zip(WORKERS, self.engines, strict=True):
                reach = int(found.reach[Tier.G1, columns[WorkerId(worker)]])
                assert reach == len(engine.pool.match(chain.hashes, len(chain.hashes)))

    def _is_caught_up(self) -> bool:
        status = self.feeds.status
        return status.is_exact and [one.next for one in status.nodes] == [self.node.next]


def tiers_of(held: tuple[int, ...]) -> tuple[int, int]:
    assert not any(held[2:])
    return held[Tier.G1], held[Tier.G2]


@asynccontextmanager
async def world(ring_bytes: int = 1 << 20) -> AsyncIterator[World]:
    requests = create_request_plane(RequestPlaneSettings(plane="memory"), "test")
    plane = MemoryPlane()
    async with Runtime(LeasedDiscovery(MemoryStore(), 5.0), requests) as runtime:
        one = World(runtime, plane, ring_bytes)
        await one.node.start(runtime, dict(enumerate(WORKERS)), [SPEED])
        feeding = asyncio.create_task(one.feeds.run())
        try:
            yield one
        finally:
            feeding.cancel()
            with suppress(asyncio.CancelledError):
                await feeding
            await one.node.close()


@pytest.mark.parametrize("ring_bytes", [1 << 20, 4096])
async def test_a_router_holds_what_the_engines_do_also_after_a_loss(ring_bytes: int) -> None:
    """What is lost is in the ring, or is not there any more and all of it must be had anew."""
    async with world(ring_bytes) as one:
        one.serve_some()
        await one.agrees()
        plane, subject = one.node._plane, one.node._subject
        one.node._plane = MemoryPlane()  # where nobody listens
        one.serve_some()
        one.node._plane = plane
        one.serve_some(3)
        await one.agrees()
        (status,) = one.feeds.status.nodes
        assert status.gaps_total == 1 and subject
        assert status.snapshots_total == (1 if ring_bytes > 4096 else 2)


async def test_speeds_reach_the_routers_table() -> None:
    async with world() as one:
        one.workers.add(Worker(WorkerId(WORKERS[0]), Speed()))
        row = one.workers.row(WorkerId(WORKERS[0]))
        async with asyncio.timeout(WAIT_S):
            while one.workers.prefill_a[row] != SPEED.prefill_s_per_token:
                await asyncio.sleep(0.01)
        assumed = speed_of(one.engines[0].settings, TierTiming())
        assert one.speeds.of(WorkerId(WORKERS[0]), assumed).prefill_s_per_token == 0.25
