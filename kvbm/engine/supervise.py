"""An engine as a child: started, registered while it lives, drained and stopped when asked.

The record leaves discovery when the engine's process ends, however it ends; its exit status is the
launcher's own. It is not started again here: that is for who started the launcher, such as systemd.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import structlog

from kvbm.engine.child import Child
from kvbm.engine.life import Life, Said
from kvbm.engine.openai import OpenAiServer
from kvbm.engine.settings import EngineSettings
from kvbm.engine.signals import StopSignals
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.lifecycle import State
from runtime.names import EndpointName

FAILED: Final = 1

_log = structlog.get_logger("kvbm.engine")


@dataclass(frozen=True, slots=True)
class Launch:
    """One engine to start."""

    command: Sequence[str]
    environment: Mapping[str, str]
    worker_id: int
    said: Said
    local_url: str  # that it is watched at
    api_key: str | None = None


async def supervise(
    launch: Launch, endpoint: EndpointName, settings: EngineSettings, where: DiscoverySettings
) -> int:
    """Run the engine to its end; the exit status. Raises NoProgram."""
    signals = StopSignals.installed()
    child = Child(launch.command, launch.environment)
    async with AsyncExitStack() as open_now:
        discovery = create_discovery(where, os.environ)
        await discovery.start()
        open_now.push_async_callback(discovery.close)
        # Its own child on this machine: a certificate made out to another name is no danger.
        server = OpenAiServer(
            launch.local_url, settings.health_timeout, api_key=launch.api_key, verify=False
        )
        open_now.push_async_callback(server.close)
        life = Life(discovery, endpoint, launch.worker_id, server, settings, launch.said)
        open_now.push_async_callback(life.end)
        open_now.callback(child.kill)
        child.start()
        _log.info("engine_started", instance=str(life.name), pid=child.pid, url=launch.said.url)
        await life.begin()
        return await _Supervision(child, life, settings, signals).run()


class _Supervision:
    def __init__(
        self, child: Child, life: Life, settings: EngineSettings, signals: StopSignals
    ) -> None:
        self._child = child
        self._life = life
        self._settings = settings
        self._signals = signals

    async def run(self) -> int:
        if not await self._first_of(
            self._settings.start_timeout, self._life.watch(), self._signals.asked.wait()
        ):
            if self._life.state is State.REGISTERED:
                waited_s = self._settings.start_timeout
                _log.error("engine_start_late", waited_s=waited_s, last_lines=self._child.tail())
                return FAILED
            await self._first_of(None, self._life.watch(), self._signals.asked.wait())
        if self._child.status is not None:
            return await self._died(self._child.status)
        return await self._stop()

    async def _died(self, status: int) -> int:
        self._child.kill()  # what is left of its group
        await self._life.end()
        log = _log.error if status else _log.info
        log("engine_ended", status=status, last_lines=self._child.tail() if status else [])
        return status

    async def _stop(self) -> int:
        """Drain, then end it; a second signal, or time running out, kills it."""
        at_once = self._signals.at_once
        if self._life.state is State.REGISTERED:
            await self._life.stopping()
        else:
            await self._first_of(None, self._life.drain(), at_once.wait())
        if self._child.status is None and not at_once.is_set():
            self._child.ask_to_end()
            await self._first_of(self._settings.stop_timeout, at_once.wait())
        status = self._child.status
        self._child.kill()
        await self._life.end()
        if status is None:
            _log.warning("engine_killed", at_once=at_once.is_set())
            return FAILED
        _log.info("engine_stopped", status=status)
        return 0

    async def _first_of(self, timeout_s: float | None, *waits: Coroutine[Any, Any, Any]) -> bool:
        """Until one of them is done or the child has ended; the others are cancelled."""
        tasks = [asyncio.ensure_future(wait) for wait in (self._child.ended(), *waits)]
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()  # a failure of ours must show
            return bool(done)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
