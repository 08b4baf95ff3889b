"""Publishers of an event plane without a broker find their listeners through discovery.

A publisher keeps a record of where its events are heard; a listener connects to all that are there
and leaves those that go. A publisher that is killed goes when its lease ends, and one that comes
back on another port is another record. Addresses in the settings are listened to in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Self, assert_never
from urllib.parse import urlsplit

import msgspec
import structlog

from runtime.discovery.base import Deleted, Discovery, Event, Put, Synced, Watch
from runtime.events.base import EventPlane, SupportsPeers
from runtime.events.settings import EventPlaneSettings
from runtime.hosts import is_loopback, without_wildcard
from runtime.instances import new_instance_id
from runtime.names import EVENT_CHANNELS, encode_segment
from runtime.tasks import end

PEERS_MAX: Final = 2048

_log = structlog.get_logger()


class EventChannel(msgspec.Struct, frozen=True):
    """JSON in discovery: where one program's events are heard."""

    address: str  # tcp://HOST:PORT, or ipc://PATH within one machine
    host: str
    pid: int

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Raises ValueError, also if nobody here can listen there."""
        channel = msgspec.json.decode(value, type=cls)
        if not channel.address.startswith(("tcp://", "ipc://")):
            raise ValueError(f"{channel.address!r} is no address of a publisher")
        if _is_local(channel.address) and channel.host != socket.gethostname():
            raise ValueError(
                f"{channel.address} is reached on {channel.host} only; there, set zmq_bind to "
                "an address of the network"
            )
        return channel


@dataclass(frozen=True, slots=True)
class EventPeersStatus:
    announced: str | None  # the own address, as others see it
    peers: int
    refused_total: int  # records of publishers that cannot be listened to
    dropped_total: int  # publishers beyond `PEERS_MAX`


class EventPeers:
    """One program's part: it publishes, listens, or both. The plane is started already."""

    def __init__(
        self,
        discovery: Discovery,
        plane: SupportsPeers,
        settings: EventPlaneSettings,
        *,
        publishes: bool,
        listens: bool,
    ) -> None:
        self._discovery = discovery
        self._plane = plane
        self._settings = settings
        self._publishes = publishes
        self._listens = listens
        self._prefix = f"{EVENT_CHANNELS}{encode_segment(settings.namespace)}/"
        self._key = f"{self._prefix}{new_instance_id():x}"
        self._announced: str | None = None
        self._heard: dict[str, str] = {}  # key of a record -> address
        self._refused_total = 0
        self._watch: Watch | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        assert not self._tasks, "started already"
        if self._publishes:
            self._tasks.append(asyncio.create_task(self._announce(), name="event-channel"))
        if self._listens:
            self._watch = self._discovery.watch(self._prefix, PEERS_MAX)
            follow = self._follow(self._watch)
            self._tasks.append(asyncio.create_task(follow, name="event-peers"))

    async def close(self) -> None:
        """Idempotent. Before the plane and discovery are closed."""
        tasks, self._tasks = self._tasks, []
        if self._watch is not None:
            self._watch.close()
        for task in tasks:
            await end(task)
        if self._announced is not None:
            self._announced = None
            await self._discovery.delete(self._key)
        for key in list(self._heard):
            self._set(key, None)

    def status(self) -> EventPeersStatus:
        return EventPeersStatus(
            announced=self._announced,
            peers=len(set(self._heard.values())),
            refused_total=self._refused_total,
            dropped_total=self._watch.dropped_total if self._watch is not None else 0,
        )

    async def _announce(self) -> None:
        address = reachable(await self._plane.bound(), self._settings.zmq_advertise_host)
        channel = EventChannel(address, socket.gethostname(), os.getpid())
        self._announced = address
        await self._discovery.put(self._key, msgspec.json.encode(channel))
        _log.info("event_channel_announced", address=address)

    async def _follow(self, watch: Watch) -> None:
        async for event in watch:
            self._apply(event)

    def _apply(self, event: Event) -> None:
        match event:
            case Synced():
                pass
            case Deleted(key):
                self._set(key, None)
            case Put(key, value):
                if key == self._key:
                    return  # its own messages reach a program without a socket
                try:
                    self._set(key, EventChannel.decode(value).address)
                except (msgspec.DecodeError, ValueError) as error:
                    self._refused_total += 1
                    _log.warning("event_channel_refused", key=key, why=str(error))
                    self._set(key, None)  # what it said before is not true any more
            case _:
                assert_never(event)

    def _set(self, key: str, address: str | None) -> None:
        before = self._heard.pop(key, None)
        if address is not None:
            self._heard[key] = address
            self._plane.add_peer(address)
        # A killed publisher's record may name the port that another one has by now.
        if before is None or before in self._heard.values() or before in self._settings.zmq_peers:
            return
        self._plane.remove_peer(before)


@contextlib.asynccontextmanager
async def joined(
    discovery: Discovery,
    plane: EventPlane,
    settings: EventPlaneSettings,
    *,
    publishes: bool = False,
    listens: bool = False,
) -> AsyncIterator[EventPeers | None]:
    """Take part while in it; None on a plane whose programs need not know each other."""
    if not isinstance(plane, SupportsPeers):
        yield None
        return
    peers = EventPeers(discovery, plane, settings, publishes=publishes, listens=listens)
    await peers.start()
    try:
        yield peers
    finally:
        await peers.close()


def reachable(address: str, host: str | None = None) -> str:
    """An address that was bound to, as others reach it: at `host`, or with no wildcard in it."""
    found = urlsplit(address)
    if found.scheme != "tcp":
        return address
    host = host or without_wildcard(found.hostname or "")
    return f"tcp://[{host}]:{found.port}" if ":" in host else f"tcp://{host}:{found.port}"


def _is_local(address: str) -> bool:
    found = urlsplit(address)
    return found.scheme == "ipc" or is_loopback(found.hostname or "")
