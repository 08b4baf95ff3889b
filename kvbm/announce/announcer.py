"""A node's stream with all that feeds it and all that is asked of it.

Discovery and the request plane may be away, or never come: the stream goes on, and the record and
its endpoint are there once they can be. Nothing here is waited for by an engine or a tier.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

import structlog

from kvbm.announce.catch_up import CatchUpHandler
from kvbm.announce.engines import ENGINES_MAX, EngineFollowers
from kvbm.announce.speeds import Costs, worker_speeds
from kvbm.announce.status import AnnouncerStatus
from kvbm.announce.stream import Stream
from kvbm.announce.tiers import TierAnnouncer
from kvbm.manager import BlockEvents
from kvbm.session import Connected
from runtime.component import Runtime, Serving
from runtime.event_peers import joined
from runtime.events import EventPlane, EventPlaneSettings
from runtime.events.envelope import PUBLISHER_ID_MAX
from runtime.events.node_stream import (
    COMPONENT,
    ENDPOINT,
    LABEL_NODE,
    LABEL_PUBLISHER,
    LABEL_READERS,
    NodeSpeeds,
    WorkerSpeed,
    encode_speeds,
    readers_label,
    speeds_subject,
)

RETRY_S: Final = 1.0  # doubles up to
RETRY_S_MAX: Final = 30.0
SPEEDS_S: Final = 3.0
SPEEDS_AGAIN_S: Final = 30.0  # also if nothing changed: somebody may be new

_log = structlog.get_logger("kvbm.announce")


class Announcer:
    """Made before the event loop runs; `run` once."""

    def __init__(
        self,
        plane: EventPlane,
        settings: EventPlaneSettings,
        node: str,
        onward: BlockEvents,
        *,
        listens: bool,
    ) -> None:
        """`listens`: this program hears others' events too, so that it must find their planes."""
        self._plane = plane
        self._settings = settings
        self._listens = listens
        self._namespace = settings.namespace
        self._node = node
        publisher = secrets.randbelow(PUBLISHER_ID_MAX) + 1
        self.stream = Stream(
            plane, settings.namespace, publisher, ring_bytes_max=settings.ring_bytes
        )
        self.tiers = TierAnnouncer(self.stream, node, onward, linger_s=settings.linger)
        self.engines = EngineFollowers(self.stream)
        self._handler = CatchUpHandler(self.stream, self.tiers, self.engines)
        self._to_follow = asyncio.Event()
        self._to_label = asyncio.Event()
        self._name: str | None = None
        self._error: str | None = "not served yet"

    def engines_changed(self) -> None:
        """Engines came or went."""
        self._to_follow.set()
        self._to_label.set()

    async def run(
        self,
        make_runtime: Callable[[], Runtime],
        connected: Callable[[], Sequence[Connected]],
        paces: Callable[[], Costs],
    ) -> None:
        """Until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(connected), name="announce-engines")
                group.create_task(self._serve(make_runtime, connected), name="announce-catch-up")
                group.create_task(self._tell_speeds(connected, paces), name="announce-speeds")
        finally:
            await self.engines.close()

    def status(self) -> AnnouncerStatus:
        return AnnouncerStatus(
            endpoint=self._name,
            error=self._error,
            stream=self.stream.status(),
            tiers=self.tiers.status(),
            engines=[follower.status() for follower in self.engines.all],
            replays_total=self._handler.replays_total,
            snapshots_total=self._handler.snapshots_total,
        )

    # -- below ---------------------------------------------------------------------------

    async def _follow(self, connected: Callable[[], Sequence[Connected]]) -> None:
        while True:
            self._to_follow.clear()
            routings = [engine.routing for engine in connected()]
            await self.engines.follow({(r.worker_id, r.dp_rank): r for r in routings})
            await self._to_follow.wait()

    async def _serve(
        self,
        make_runtime: Callable[[], Runtime],
        connected: Callable[[], Sequence[Connected]],
    ) -> None:
        retry_s = RETRY_S
        while True:
            try:
                async with make_runtime() as runtime, self._found(runtime):
                    component = runtime.namespace(self._namespace).component(COMPONENT)
                    self._to_label.clear()
                    serving = await component.endpoint(ENDPOINT).serve(
                        self._handler.answer, labels=self._labels(connected())
                    )
                    self._name, self._error = str(serving.name), None
                    _log.info("stream_served", instance=self._name)
                    await self._keep_labels(serving, connected)
            except OSError as error:
                self._name, self._error = None, str(error)
                _log.warning("stream_not_served", reason=self._error, retry_s=retry_s)
            finally:
                self._name = None
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_S_MAX)

    def _found(self, runtime: Runtime) -> AbstractAsyncContextManager[object]:
        """While it lasts, listeners find this program's events where the plane has no broker."""
        return joined(
            runtime.discovery, self._plane, self._settings, publishes=True, listens=self._listens
        )

    async def _keep_labels(
        self, serving: Serving, connected: Callable[[], Sequence[Connected]]
    ) -> None:
        while True:
            await self._to_label.wait()
            self._to_label.clear()
            await serving.relabel(self._labels(connected()))

    def _labels(self, engines: Sequence[Connected]) -> dict[str, str]:
        readers = {
            (engine.routing.worker_id, engine.routing.dp_rank): self.tiers.owner(engine.domain)
            for engine in engines[:ENGINES_MAX]
        }
        return {
            LABEL_NODE: self._node,
            LABEL_PUBLISHER: f"{self.stream.publisher:x}",
            LABEL_READERS: readers_label(readers),
        }

    async def _tell_speeds(
        self, connected: Callable[[], Sequence[Connected]], paces: Callable[[], Costs]
    ) -> None:
        told: list[WorkerSpeed] = []
        told_at = time.monotonic()
        while True:
            speeds = worker_speeds(connected()[:ENGINES_MAX], paces())
            now = time.monotonic()
            if speeds != told or (speeds and now - told_at >= SPEEDS_AGAIN_S):
                told, told_at = speeds, now
                payload = encode_speeds(NodeSpeeds(self.stream.publisher, self._node, speeds))
                self._plane.publish(speeds_subject(self._namespace), payload)
            await asyncio.sleep(SPEEDS_S)
