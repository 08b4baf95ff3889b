"""Nodes and routers that find each other: one discovery, real planes, and the comparison."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from router.feed import NodeFeeds
from router.feed_settings import FeedSettings
from router.holdings import STAGED
from router.index import Index, Tier
from router.node_feed import NodeState
from router.speeds import Speeds
from router.workers import Workers
from runtime.component import Runtime
from runtime.discovery.base import DiscoveryUnavailable
from runtime.discovery.leased import LeasedDiscovery
from runtime.discovery.memory import MemoryStore
from runtime.embedded import EmbeddedNats
from runtime.events import EventPlane, EventPlaneSettings, create_event_plane
from runtime.events.memory import MemoryPlane
from runtime.requests import RequestPlaneSettings, create_request_plane
from runtime.server_process import free_ports
from tests.router.feed.node import FakeNode, Held
from tests.runtime.planes import nats_settings, until

NAMESPACE = "default"
QUICK: dict[str, Any] = {
    "reorder": 0.02,
    "backoff": 0.02,
    "backoff_max": 0.1,
    "tries": 4,
    "probe_interval": 0.2,
    "ask_timeout": 10.0,
    "stale_for": 60.0,
    "gone_for": 0.1,
}
TTL_S = 5.0


def held_by(index: Index, *, staged: bool = False) -> Held:
    """What is held, or what is gathered beside it or was before."""
    found: Held = {}
    for worker in index.workers:
        if worker is None or (worker.dp_rank >= STAGED) is not staged:
            continue
        for tier in Tier:
            names = {int(name) for name in index.held(worker, tier)}
            assert len(names) == index.held_blocks(worker)[tier]
            if names:
                found[worker, tier] = names
    return found


def truth_of(*nodes: FakeNode) -> Held:
    return {place: names for node in nodes for place, names in node.truth.items()}


class RouterUnderTest:
    def __init__(self, feeds: NodeFeeds, index: Index, workers: Workers, speeds: Speeds) -> None:
        self.feeds = feeds
        self.index = index
        self.workers = workers
        self.speeds = speeds

    def is_live(self, nodes: int = 1) -> bool:
        known = self.feeds.status.nodes
        return len(known) == nodes and self.feeds.status.is_exact

    async def equals(self, *nodes: FakeNode) -> None:
        """In the end, and stays so."""

        def same() -> bool:
            places = {node.node: node.place for node in self.feeds._nodes.values()}
            return all(
                node.node in places
                and places[node.node].publisher == node.publisher
                and places[node.node].next == node.sequence
                for node in nodes
            ) and self.is_live(len(nodes))

        with suppress(TimeoutError):
            await until(same)
        assert same(), self.feeds.status
        assert held_by(self.index) == truth_of(*nodes)
        await until(lambda: not held_by(self.index, staged=True))
        self.index.check_integrity()

    def state(self, node: str) -> NodeState | None:
        states = {one.node: one.state for one in self.feeds.status.nodes}
        return states.get(node)


class World:
    """`kind` of event plane: memory, nats or zmq; requests go over TCP."""

    def __init__(self, kind: str, folder: Path, memory: MemoryPlane | None = None) -> None:
        self.kind = kind
        self.store = MemoryStore()
        self.nats: EmbeddedNats | None = None
        self._folder = folder
        self._memory = memory or MemoryPlane()
        self._zmq_addresses: list[str] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self.kind == "nats":
            port = free_ports(1)[0]  # pinned: it is started again at the same place
            self.nats = EmbeddedNats(self._folder, port=port)
            self._stack.enter_context(self.nats)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @contextmanager
    def discovery_away(self) -> Iterator[None]:
        """Nothing is told, renewed or written; what there was is there again at the end."""

        async def away(*_: object) -> Any:
            raise DiscoveryUnavailable("away")

        calls = ("grant", "renew", "put", "delete", "list")
        before = {name: getattr(self.store, name) for name in calls}
        for name in calls:
            setattr(self.store, name, away)
        try:
            yield
        finally:
            for name, call in before.items():
                setattr(self.store, name, call)

    async def plane(self, **other: Any) -> EventPlane:
        if self.kind == "memory":
            return self._memory
        if self.kind == "nats":
            assert self.nats is not None
            plane = create_event_plane(nats_settings(self.nats, **other), "test")
        else:
            settings = EventPlaneSettings(plane="zmq", zmq_peers=self._zmq_addresses, **other)
            plane = create_event_plane(settings, "test")
        await plane.start()
        self._stack.push_async_callback(plane.close)
        return plane

    async def runtime(self) -> Runtime:
        requests = create_request_plane(RequestPlaneSettings(plane="tcp"), "test")
        runtime = Runtime(LeasedDiscovery(self.store, TTL_S), requests)
        return await self._stack.enter_async_context(runtime)

    async def node(self, name: str = "a", *, ring: int = 1024, serve: bool = True) -> FakeNode:
        """Before the router that is to hear it, where the plane is ZMQ."""
        other: dict[str, Any] = {}
        if self.kind == "zmq":
            other["zmq_bind"] = f"tcp://127.0.0.1:{free_ports(1)[0]}"
            self._zmq_addresses = [*self._zmq_addresses, other["zmq_bind"]]
        plane = await self.plane(**other)
        node = FakeNode(await self.runtime(), plane, NAMESPACE, name, ring=ring)
        if serve:
            await node.serve()
        return node

    @asynccontextmanager
    async def router(self, **settings: Any) -> AsyncIterator[RouterUnderTest]:
        index, workers = Index(1 << 20), Workers()
        speeds = Speeds(workers)
        runtime, plane = await self.runtime(), await self.plane()
        feeds = NodeFeeds(
            runtime, plane, index, NAMESPACE, FeedSettings(**(QUICK | settings)), speeds=speeds
        )
        task = asyncio.create_task(feeds.run())
        try:
            yield RouterUnderTest(feeds, index, workers, speeds)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
