"""Where programs meet in a test: each `join` is another program, over one kind of discovery."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from runtime.discovery import Discovery, DiscoverySettings, create_discovery
from runtime.discovery.base import Deleted, Event, Put, Synced, Watch

WAIT_S = 60.0


class World(Protocol):
    settings: DiscoverySettings
    environ: dict[str, str]

    async def join(self) -> Discovery:
        """A program's own discovery, started."""
        ...

    async def end_lease(self, member: Discovery) -> None:
        """Behind its back."""
        ...


class Members:
    """Starts what joins, and closes it at the end."""

    settings: DiscoverySettings

    def __init__(self, settings: DiscoverySettings, environ: dict[str, str] | None = None) -> None:
        self.settings = settings
        self.environ = environ or {}
        self.members: list[Discovery] = []

    async def join(self) -> Discovery:
        member = self.create()
        self.members.append(member)
        await member.start()
        return member

    def create(self) -> Discovery:
        return create_discovery(self.settings, self.environ)

    async def close(self) -> None:
        for member in self.members:
            await member.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def until_true(ask: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await ask():
            await asyncio.sleep(0.02)


async def take(watch: Watch) -> Event:
    async with asyncio.timeout(WAIT_S):
        return await anext(watch)


async def take_until_synced(watch: Watch) -> dict[str, bytes]:
    """What a watcher knows by its next `Synced`, starting with nothing."""
    return await follow(watch, {}, lambda event, _: event == Synced())


async def follow(
    watch: Watch,
    view: dict[str, bytes],
    enough: Callable[[Event, dict[str, bytes]], bool],
) -> dict[str, bytes]:
    """Apply what comes to `view` until it is enough."""
    async with asyncio.timeout(WAIT_S):
        async for event in watch:
            match event:
                case Put(key, value):
                    view[key] = value
                case Deleted(key):
                    del view[key]
            if enough(event, view):
                break
    return view
