"""What engines say of their own memory (G1), one follower for each that publishes events.

An engine never waits for its follower: vLLM's publisher drops what nobody reads, and its ring
gives it back. What cannot be had, or an engine that left, clears that worker's blocks; vLLM tells
the prefix of each request it has cached anew, so that what is in use becomes known again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Final

import structlog

from kvbm.announce.status import EngineStatus
from kvbm.announce.stream import Stream
from kvbm.protocol import Routing
from runtime.events.engine_feed import EngineEvents, EngineFeed, EngineFeedOptions, FeedItem
from runtime.events.engine_router import EngineRouter
from runtime.events.node_stream import Rows, Worker
from runtime.events.router_event import KvCacheEventData, StorageTier
from runtime.tasks import end

ENGINES_MAX: Final = 1024
BATCHES_AT_ONCE: Final = 16  # then others have their turn

_log = structlog.get_logger("kvbm.announce")


class EngineFollower:
    def __init__(self, stream: Stream, routing: Routing) -> None:
        self.routing = routing
        self._stream = stream
        self._feed = EngineFeed(
            EngineFeedOptions(routing.events, routing.replay or None, routing.topic)
        )
        self._router = EngineRouter(routing.block_tokens, group=routing.group)
        self._task: asyncio.Task[None] | None = None
        self._failed_total = 0

    async def start(self) -> None:
        await self._feed.start()
        self._task = asyncio.create_task(self._run(), name="engine-events")

    async def stop(self) -> None:
        """Nothing is known of it any more."""
        if self._task is not None:
            await end(self._task)
        self._publish(self._router.cleared())
        await self._feed.close()

    def rows(self, blocks: int) -> Iterator[list[Rows]]:
        """All that it holds, about so many blocks at a time."""
        for groups in self._router.ledger.groups(1, blocks):
            yield [
                Rows(
                    self.routing.worker_id,
                    self.routing.dp_rank,
                    "worker",
                    StorageTier.DEVICE,
                    group.parents.astype("<u8", copy=False).tobytes(),
                    group.tokens.astype("<u8", copy=False).tobytes(),
                )
                for group in groups
            ]

    def status(self) -> EngineStatus:
        feed, router = self._feed.status(), self._router.status()
        return EngineStatus(
            worker=f"{self.routing.worker_id:x}.{self.routing.dp_rank}",
            endpoint=self.routing.events,
            connected=feed.connected,
            error=feed.error,
            blocks=router.blocks,
            batches_total=feed.batches_total,
            lost_total=feed.lost_total,
            restarts_total=feed.restarts_total,
            skipped_total=router.skipped_total,
            refused_total=router.refused_total + self._failed_total,
            orphaned_total=router.orphaned_total + router.full_total,
        )

    def take(self, item: FeedItem) -> None:
        """Tell what the engine told, or that it is not known any more what it holds."""
        if isinstance(item, EngineEvents):
            for data in self._router.translate(item.batch):
                self._publish(data)
        else:
            self._publish(self._router.cleared())

    async def _run(self) -> None:
        taken = 0
        async for item in self._feed:
            try:
                self.take(item)
            except Exception:  # noqa: BLE001 (an engine's events must not end the daemon)
                _log.exception("engine_events_failed", endpoint=self.routing.events)
                self._failed_total += 1
                self._publish(self._router.cleared())
            taken += 1
            if taken % BATCHES_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _publish(self, data: KvCacheEventData) -> None:
        routing = self.routing
        self._stream.publish(routing.worker_id, routing.dp_rank, data, StorageTier.DEVICE, "worker")


class EngineFollowers:
    """Those of all engines that are connected now: see `follow`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._following: dict[Worker, EngineFollower] = {}

    @property
    def all(self) -> list[EngineFollower]:
        return list(self._following.values())

    async def follow(self, wanted: Mapping[Worker, Routing]) -> None:
        """Exactly those of these that publish events, from now on."""
        for worker, follower in list(self._following.items()):
            if wanted.get(worker) != follower.routing:
                del self._following[worker]
                await follower.stop()
        for worker, routing in wanted.items():
            if not routing.events or worker in self._following:
                continue
            if len(self._following) >= ENGINES_MAX:
                _log.warning("engine_not_heard", limit=ENGINES_MAX, endpoint=routing.events)
                continue
            follower = EngineFollower(self._stream, routing)
            self._following[worker] = follower
            await follower.start()

    async def close(self) -> None:
        """Idempotent."""
        await self.follow({})
