"""A server that runs already, as an instance: watched and registered, never stopped from here.

When nobody listens there any more the record goes; when somebody does again, the server is a new
instance, because whoever it is has nothing of what the last one held.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack
from typing import Any, Final

import structlog

from kvbm.engine.life import Life, Said
from kvbm.engine.openai import OpenAiServer, Well
from kvbm.engine.settings import EngineSettings
from kvbm.engine.signals import StopSignals
from runtime.discovery import (
    Discovery,
    DiscoverySettings,
    DiscoveryUnavailable,
    create_discovery,
)
from runtime.names import EndpointName, InstanceName, NameRefused, component_prefix

RETRY_S: Final = 5.0

_log = structlog.get_logger("kvbm.engine")


class AttachRefused(Exception):
    """Which instance the server is cannot be told; the message says what to do."""


FindId = Callable[[AbstractSet[int]], int]
"""Which instance it is, of none of those that are registered. Blocks; raises AttachRefused."""


async def attach(
    url: str,
    said: Said,
    find_id: FindId,
    endpoint: EndpointName,
    settings: EngineSettings,
    where: DiscoverySettings,
) -> None:
    """Until a signal. Raises AttachRefused if it cannot begin."""
    stop = asyncio.create_task(StopSignals.installed().asked.wait(), name="signals")
    key = settings.api_key
    async with AsyncExitStack() as open_now:
        discovery = create_discovery(where, os.environ)
        await discovery.start()
        open_now.push_async_callback(discovery.close)
        server = OpenAiServer(
            url, settings.health_timeout, api_key=None if key is None else key.get_secret_value()
        )
        open_now.push_async_callback(server.close)
        lives = 0
        while not stop.done():
            if not await _before(stop, _answering(server, settings)):
                break
            try:
                worker_id = await _identified(discovery, endpoint, find_id)
            except (AttachRefused, DiscoveryUnavailable) as error:
                if not lives:
                    raise AttachRefused(str(error)) from error
                _log.warning("engine_not_identified", url=url, why=str(error))
                await _before(stop, asyncio.sleep(RETRY_S))
                continue
            life = Life(discovery, endpoint, worker_id, server, settings, said)
            lives += 1
            try:
                await life.begin()
                _log.info("engine_attached", instance=str(life.name), url=url)
                await _before(stop, life.watch(until_away=True))
            finally:
                await life.end()


async def _answering(server: OpenAiServer, settings: EngineSettings) -> None:
    told = False
    while not isinstance(found := await server.health(), Well):
        if not told:
            _log.info("engine_awaited", url=server.url, why=found.reason)
            told = True
        await asyncio.sleep(settings.health_interval)


async def _identified(discovery: Discovery, endpoint: EndpointName, find_id: FindId) -> int:
    taken: set[int] = set()
    for key in await discovery.list(component_prefix(endpoint.namespace)):
        try:
            taken.add(InstanceName.of_key(key).id)
        except NameRefused:
            continue  # whoever wrote it, it names no instance
    return await asyncio.to_thread(find_id, taken)


async def _before(stop: asyncio.Task[bool], work: Coroutine[Any, Any, Any]) -> bool:
    """Whether the work was done before the signal came; else it is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
