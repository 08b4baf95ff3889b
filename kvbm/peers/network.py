"""Peers of one node: who they are, links to them, and the listener through which they read here.

Peers come from a list in the settings and, where there is an event plane, from what nodes say of
themselves on it. What they hold is learnt from them alone, over the connection that is there
anyway: first everything, then each change, in order and without gaps. Block events on the plane
could be lost, and a node that starts late has not heard them.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog

from kvbm.meter import Meter
from kvbm.note import NoteBook
from kvbm.peers.contents import Contents
from kvbm.peers.greeting import Greeter
from kvbm.peers.link import PeerLink
from kvbm.peers.owner import Owner
from kvbm.peers.settings import PeerSettings
from runtime.events import EventPlane
from storage_tiers.base import Key, TierError, TierListener
from storage_tiers.dram import DramTier
from storage_tiers.peer import PeerTier
from storage_tiers.ucx import UcxMover, availability

PEERS_MAX: Final = 64
ANNOUNCE_S: Final = 5.0
SILENT_S: Final = 60.0  # then a peer that was only heard of, and is away, is given up
_NAME_LENGTH_MAX: Final = 253

_log = structlog.get_logger("kvbm.peers")


class Announcement(msgspec.Struct, frozen=True, array_like=True):
    """A node says where its host memory can be read. Fields may be added at the end."""

    node: str
    identity: bytes
    host: str
    port: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Announcement)


def peers_subject(namespace: str, node: str) -> str:
    """`node` may be `*` to hear all nodes."""
    return f"kvbm.{namespace}.{node}.peer"


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One peer, for operators."""

    address: str
    node: str  # empty until it was connected once
    found_by: str  # "settings" or "events"
    connected: bool
    problem: str  # why not
    redundant: bool  # the address of this node, or of one that is connected already
    mover: str | None
    chunks: int  # in its host memory
    loaded_chunks: int  # read from it since this daemon began


@dataclass(slots=True)
class _Known:
    link: PeerLink
    task: asyncio.Task[None] | None = None
    heard_at: float | None = None  # None: from the settings, for ever


class PeerNetwork:
    """Call from the event loop that owns `dram`; `open`, then `run` until cancelled."""

    def __init__(
        self,
        settings: PeerSettings,
        dram: DramTier,
        contents: Contents,
        notes: NoteBook,
        meter: Meter,
        *,
        listener: TierListener,
        check: Callable[[Key], Coroutine[Any, Any, bool]],
        plane: EventPlane,
        namespace: str,
        node: str,
    ) -> None:
        """`check` looks whether a chunk in host memory is sound."""
        self._settings = settings
        self._node = node
        self._host = settings.advertised(socket.gethostname())
        self._dram = dram
        self._meter = meter
        self._plane = plane
        self._namespace = namespace
        self._ucx = None if settings.mover == "plain" else UcxMover(dram.arena, self._ucx_changed)
        self._greeter = Greeter(node, dram.arena.epoch, settings.token.get_secret_value())
        self._known: dict[tuple[str, int], _Known] = {}
        self.owner = Owner(
            node,
            settings.token.get_secret_value(),
            dram,
            contents,
            notes,
            meter,
            check=check,
            serve=self._serve,
        )
        self.tier = PeerTier(
            self.links, listener, deadline_s=settings.deadline, mover=self._mover_name
        )
        for address in settings.addresses:
            self._add(address, heard_at=None)

    def links(self) -> Sequence[PeerLink]:
        return [known.link for known in self._known.values()]

    def status(self) -> list[PeerStatus]:
        return [
            PeerStatus(
                address=known.link.name,
                node=known.link.node,
                found_by="settings" if known.heard_at is None else "events",
                connected=known.link.mover is not None,
                problem=known.link.problem,
                redundant=known.link.is_redundant,
                mover=known.link.mover,
                chunks=len(known.link.lengths),
                loaded_chunks=known.link.loaded_chunks,
            )
            for known in self._known.values()
        ]

    async def open(self) -> None:
        """Raises TierError if NIXL was insisted on in vain, PeerSocketError."""
        insists = self._settings.mover == "nixl"
        if insists and (why := await asyncio.to_thread(availability)) is not None:
            raise TierError(f"peers.mover nixl was asked for but {why}; use auto or plain")
        self.owner.bind(self._settings.host, self._settings.port)

    async def run(self) -> None:
        """Serve peers and read from them, until cancelled."""
        async with asyncio.TaskGroup() as group:
            if self._ucx is not None:
                group.create_task(self._ucx.run(), name="peers-ucx")
            group.create_task(self.owner.serve(), name="peers-owner")
            group.create_task(self._announce(), name="peers-announce")
            group.create_task(self._find(group), name="peers-find")
            for known in self._known.values():
                known.task = group.create_task(known.link.run(), name=f"peer {known.link.name}")

    # -- below ---------------------------------------------------------------------------

    async def _announce(self) -> None:
        while True:
            self._say_where()
            await asyncio.sleep(ANNOUNCE_S)

    def _say_where(self) -> None:
        said = Announcement(self._node, self._dram.arena.epoch, self._host, self.owner.port)
        self._plane.publish(peers_subject(self._namespace, self._node), _encoder.encode(said))

    async def _find(self, group: asyncio.TaskGroup) -> None:
        async with self._plane.subscribe(peers_subject(self._namespace, "*")) as heard:
            async for message in heard:
                try:
                    said = _decoder.decode(message.payload)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    self._meter.error("peer_announcement", "malformed")
                    _log.warning("bad_announcement", subject=message.subject, reason=str(error))
                    continue
                self._hear(said, group)
                self._give_up()

    def _hear(self, said: Announcement, group: asyncio.TaskGroup) -> None:
        address, now = (said.host, said.port), time.monotonic()
        if said.identity == self._dram.arena.epoch:
            return
        known = self._known.get(address)
        if known is not None:
            if known.heard_at is not None:
                known.heard_at = now
            return
        if any(link.identity == said.identity for link in self.links()):
            return  # it has another address in the settings
        if not 0 < said.port <= 65535 or not 0 < len(said.host) <= _NAME_LENGTH_MAX:
            self._meter.error("peer_announcement", "malformed")
        elif len(self._known) >= PEERS_MAX:
            self._meter.error("peer_announcement", "too_many")
        else:
            known = self._add(address, heard_at=now)
            known.task = group.create_task(known.link.run(), name=f"peer {known.link.name}")
            _log.info("peer_found", node=said.node, peer=known.link.name)
            self._say_where()  # it may be new, and have missed the last time

    def _give_up(self) -> None:
        """Peers that were heard of once, are silent and away."""
        oldest = time.monotonic() - SILENT_S
        for address, known in list(self._known.items()):
            is_silent = known.heard_at is not None and known.heard_at < oldest
            if is_silent and known.link.identity is None:
                if known.task is not None:
                    known.task.cancel()
                del self._known[address]

    def _add(self, address: tuple[str, int], *, heard_at: float | None) -> _Known:
        link = PeerLink(
            address,
            self._greeter,
            self._dram.arena,
            self._ucx,
            self._meter,
            is_known=lambda identity: any(link.identity == identity for link in self.links()),
        )
        self._known[address] = _Known(link, heard_at=heard_at)
        return self._known[address]

    def _serve(self, seconds: float) -> None:
        if self._ucx is not None:
            self._ucx.serve(seconds)

    def _ucx_changed(self) -> None:
        assert self._ucx is not None
        self.owner.announce(self._ucx.own)
        if self._ucx.own is None:
            self._meter.error("peer_ucx", "ended")

    def _mover_name(self) -> str:
        movers = sorted({mover for link in self.links() if (mover := link.mover) is not None})
        if movers:
            return "+".join(movers)
        return "tcp" if self._ucx is None or self._ucx.own is None else "nixl-ucx"
