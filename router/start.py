"""How the programs of this package begin and end: they answer while their kernels are compiled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from router.index import KERNELS
from router.settings import HttpSettings
from runtime import program
from runtime.kernels import WHY, compiled
from runtime.systemd import Notifier
from runtime.web.server import WebServer
from runtime.web.starting import Starting

_log = structlog.get_logger("router")


@dataclass(frozen=True, slots=True)
class Begun:
    """`page` is what `server` serves; `stop` is set when the program is to end."""

    server: WebServer
    page: Starting
    notifier: Notifier
    stop: asyncio.Event


async def serve(http: HttpSettings, module: str, run: Callable[[Begun], Awaitable[None]]) -> None:
    """`run` once the kernels are there and `module`, which takes a second to import.

    Raises ListenError.
    """
    stop, page = program.stop_signal(), Starting(WHY)
    server = WebServer(page, http.host, http.port, section="http", concurrency_max=http.concurrency)
    async with program.beside_systemd() as notifier:
        await server.start()
        try:
            notifier.status(WHY)
            if await program.unless_stopped(stop, compiled((module, *KERNELS))):
                page.why = "starting"
                await run(Begun(server, page, notifier, stop))
        finally:
            await server.stop()
    _log.info("stopped")
