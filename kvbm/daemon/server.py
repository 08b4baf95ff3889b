"""The daemon's life: open what is kept, serve engines, and end without losing what was promised.

Start: events, tiers, admin API, then the control socket; ready once engines may come. Stop:
engines are sent away first, then what is on its way down is written, then the tiers are closed.
S3 out of reach does not keep a node from serving: it is opened as soon as it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import urlsplit

import structlog

from kvbm.daemon.admin import create_app
from kvbm.daemon.dashboard import NodePage
from kvbm.daemon.ipc import ControlSocket
from kvbm.daemon.node import Node
from kvbm.daemon.settings import DaemonSettings
from runtime import program
from runtime.embedded import EmbeddedNats
from runtime.systemd import Notifier
from runtime.tasks import end
from runtime.web.dashboard import Dashboard
from runtime.web.server import WebServer
from runtime.web.starting import Starting
from storage_tiers.arena import Slot
from storage_tiers.base import SupportsScrub, Tier, TierError, TierName
from storage_tiers.prefault import Prefault

FENCE_S: Final = 5.0  # a worker answers between two copies
DRAIN_S: Final = 30.0
REMOTE_WAIT_S: Final = 10.0
OPEN_RETRY_S_MIN: Final = 1.0
OPEN_RETRY_S_MAX: Final = 30.0

_log = structlog.get_logger("kvbm.daemon")


class Server:
    """Runs a `Node` once."""

    def __init__(self, node: Node, notifier: Notifier, web: WebServer, page: Starting) -> None:
        """`web` serves `page`, and is stopped by the caller at the latest."""
        self._node = node
        self._web = web
        self._page = page
        self._notifier = notifier
        self._socket = ControlSocket(node.settings.socket, node.members, node.arena, node.metrics)
        self._dashboard = Dashboard(NodePage(node, node.metrics))
        self._remote_tried = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then end cleanly.

        Raises TierError, SocketError, PeerSocketError or ServerError if it cannot start.
        """
        async with contextlib.AsyncExitStack() as cleanup:
            node = self._node
            if node.settings.dram.prefault:
                cleanup.enter_context(Prefault(node.arena.data))
            await _start_nats(node.settings, cleanup)
            await node.plane.start()
            cleanup.push_async_callback(self._close_events)
            for tier in node.all_tiers:
                cleanup.push_async_callback(tier.close)
                if tier.name is not TierName.S3:
                    await self._open(tier)
            admin = node.settings.admin
            self._page.app = create_app(
                node, node.operations, node.metrics, admin.token_text, self._dashboard
            )
            cleanup.push_async_callback(self._web.stop)
            if node.peers is not None:
                await node.peers.open()
            self._socket.bind()
            unfenced: list[Slot] = []
            async with self._background(unfenced):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REMOTE_WAIT_S):
                        await self._remote_tried.wait()
                node.problems.pop("socket", None)
                kept = ", ".join(f"{r.tier.value}: {r.chunks} chunks" for r in node.recovery())
                said = f"listening on {node.settings.socket}; {kept}"
                self._notifier.ready(said)
                _log.info("ready", socket=str(node.settings.socket), admin=self._web.url, kept=kept)
                await program.unless_stopped(
                    stop, program.tell_what_is_missing(self._notifier, said, self._missing)
                )
                self._notifier.stopping()
                _log.info("stopping")
            await node.handover.leave(unfenced)
        _log.info("stopped")

    @contextlib.asynccontextmanager
    async def _background(self, unfenced: list[Slot]) -> AsyncIterator[None]:
        """Everything that runs meanwhile; on leaving, engines go first and offloading last.

        Then `unfenced` gets the leased slots that engines may still write to.
        """
        manager = self._node.manager
        async with asyncio.TaskGroup() as group:
            onboarding = group.create_task(manager.onboarder.run(), name="onboard")
            moving = [
                group.create_task(work, name=name)
                for name, work in (
                    ("offload", manager.offloader.run()),
                    ("scrub", self._node.scrubber.run()),
                    *((f"patrol-{p.tier.value}", p.run()) for p in self._node.patrols),
                    ("watchdog", self._notifier.feed_watchdog()),
                    ("rates", self._node.speeds.run()),
                    ("dashboard", self._dashboard.run()),
                    ("open-remote", self._open_remote()),
                    ("adopt", self._adopt()),
                )
            ]
            if self._node.announcer is not None:
                moving.append(group.create_task(self._node.announce(), name="announce"))
            if self._node.peers is not None:
                moving.append(group.create_task(self._node.peers.run(), name="peers"))
            serving = group.create_task(self._socket.serve(), name="control-socket")
            yield
            # Before engines are sent away: a slot they leave must not be filled with anything.
            await end(onboarding)
            unfenced += await self._socket.send_away(FENCE_S)
            await end(serving)
            manager.offloader.evacuate()
            left = await manager.offloader.drain(DRAIN_S)
            if left:
                _log.warning("chunks_not_offloaded", chunks=left, after_s=DRAIN_S)
            for task in moving:
                task.cancel()

    async def _adopt(self) -> None:
        """Take over what the daemon before left in host memory."""
        self._node.reports[TierName.DRAM] = await self._node.handover.run()
        await self._remote_tried.wait()
        await self._node.handover.offer()

    async def _open_remote(self) -> None:
        """Open S3, however long it takes to answer."""
        pause_s = OPEN_RETRY_S_MIN
        for tier in self._node.manager.tiers:
            while tier.name is TierName.S3 and tier.name not in self._node.reports:
                try:
                    await self._open(tier)
                except TierError as error:
                    self._node.problems[tier.name.value] = str(error)
                    _log.warning("tier_unavailable", tier=tier.name.value, reason=str(error))
                    self._remote_tried.set()
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, OPEN_RETRY_S_MAX)
        self._remote_tried.set()

    async def _open(self, tier: Tier) -> None:
        name = tier.name.value
        self._page.why = f"opening {name}"
        report = await tier.open()
        self._node.problems.pop(name, None)
        self._node.reports[tier.name] = report
        aside = tier.aside() if isinstance(tier, SupportsScrub) else ()
        self._node.manager.quarantine.recall(tier.name, aside)
        _log.info(
            "tier_open",
            tier=name,
            mover=tier.usage().mover,
            chunks=report.chunks,
            bytes=report.bytes,
            dropped=report.dropped,
            quarantined=len(aside),
            seconds=round(report.seconds, 3),
        )

    def _missing(self) -> dict[str, str | None]:
        """Also what the node does without for a while, and is ready all the same."""
        plane = self._node.plane.status()
        events = None if plane.kind == "none" or plane.connected else str(plane.error)
        return {**self._node.readiness(), "events": events}

    async def _close_events(self) -> None:
        if self._node.announcer is not None:
            self._node.announcer.tiers.flush()
        self._node.blocks.flush()
        await self._node.plane.close()


async def _start_nats(settings: DaemonSettings, cleanup: contextlib.AsyncExitStack) -> None:
    """The node's own NATS server, if it is to have one. Raises ServerError."""
    events = settings.events
    if not events.nats_embedded:
        return
    assert events.nats_user is not None and events.nats_password is not None, "settings see to it"
    settings.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    server = EmbeddedNats(
        settings.socket.parent / "nats",
        port=urlsplit(events.nats_url).port,
        jetstream=events.nats_durable,
        login=(events.nats_user, events.nats_password.get_secret_value()),
    )
    await asyncio.to_thread(server.start)
    cleanup.callback(server.stop)
    _log.info("nats_started", url=server.url, pid=server.pid)
