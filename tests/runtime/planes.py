"""Event planes for tests: one alone, or several that hear each other; and waiting on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from pydantic import SecretStr

from runtime.embedded import EmbeddedNats
from runtime.events import EventPlane, EventPlaneSettings, Subscription, create_event_plane
from runtime.server_process import free_ports

WAIT_S = 60.0
QUICK_S = 10.0  # for what waits for nobody, on a busy machine


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def take(subscription: Subscription, count: int) -> list[bytes]:
    async with asyncio.timeout(WAIT_S):
        return [(await anext(subscription)).payload for _ in range(count)]


def nats_settings(server: EmbeddedNats, **other: Any) -> EventPlaneSettings:
    return EventPlaneSettings(
        plane="nats",
        nats_url=f"nats://127.0.0.1:{server.port}",
        nats_user=server.user,
        nats_password=SecretStr(server.password),
        **other,
    )


def zmq_settings(**other: Any) -> EventPlaneSettings:
    return EventPlaneSettings(plane="zmq", **other)


class Fleet(Protocol):
    """Programs of one deployment; each call starts another."""

    async def publisher(self) -> EventPlane:
        """One after the other: a later one takes the earlier one's place."""
        ...

    async def listener(self) -> EventPlane: ...

    async def close(self) -> None: ...


class NatsFleet:
    def __init__(self, server: EmbeddedNats) -> None:
        self._server = server
        self._planes: list[EventPlane] = []

    async def publisher(self) -> EventPlane:
        return await self._start("publisher")

    async def listener(self) -> EventPlane:
        return await self._start("listener")

    async def close(self) -> None:
        for plane in self._planes:
            await plane.close()

    async def _start(self, name: str) -> EventPlane:
        plane = create_event_plane(nats_settings(self._server), name)
        await plane.start()
        self._planes.append(plane)
        await until(lambda: plane.status().connected)
        return plane


class ZmqFleet:
    def __init__(self) -> None:
        self.address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        self._planes: list[EventPlane] = []

    async def publisher(self, **other: Any) -> EventPlane:
        return await self._start(zmq_settings(zmq_bind=self.address, **other))

    async def listener(self, **other: Any) -> EventPlane:
        return await self._start(zmq_settings(zmq_peers=[self.address], **other))

    async def close(self) -> None:
        for plane in self._planes:
            await plane.close()

    async def _start(self, settings: EventPlaneSettings) -> EventPlane:
        plane = create_event_plane(settings, "test")
        await plane.start()
        self._planes.append(plane)
        return plane
