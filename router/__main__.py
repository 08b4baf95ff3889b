"""`kvbm-router`: route the requests of a fleet, or check the settings.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import structlog
import typer

from router.index import KERNELS
from router.settings import PROGRAM, RouterSettings
from runtime import program
from runtime.kernels import WHY, compiled
from runtime.systemd import Notifier
from runtime.web.server import ListenError, WebServer
from runtime.web.starting import Starting

_log = structlog.get_logger("router")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Send each request to the worker that has most of its KV and least to do.",
)

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML or TOML file (docs/ROUTER_CONFIG.md).")
]


@app.command()
def serve(config: Config = None, assignments: program.Assignments = None) -> None:
    """Route until SIGTERM or SIGINT."""
    loaded = program.loaded_or_exit(RouterSettings.load, config, assignments)
    settings = loaded.value
    program.begin_log(settings.log, loaded)
    with program.ending_with_reason(ListenError, OSError):
        asyncio.run(_serve(settings))


program.add_common_commands(app, RouterSettings.load)
program.add_print_unit(app, PROGRAM)


def main() -> None:
    app(prog_name=PROGRAM)


async def _serve(settings: RouterSettings) -> None:
    stop = program.stop_signal()
    http, page = settings.http, Starting(WHY)
    server = WebServer(page, http.host, http.port, section="http", concurrency_max=http.concurrency)
    async with program.beside_systemd() as notifier:
        await server.start()
        try:
            notifier.status(WHY)
            # What only serving needs takes a second to import.
            if await program.unless_stopped(stop, compiled(("router.app", *KERNELS))):
                page.why = "starting"
                await _route(settings, server, page, notifier, stop)
        finally:
            await server.stop()
    _log.info("stopped")


async def _route(
    settings: RouterSettings,
    server: WebServer,
    page: Starting,
    notifier: Notifier,
    stop: asyncio.Event,
) -> None:
    from router.app import create_app
    from router.assembly import running
    from router.component import serve_component
    from router.dashboard import fleet_dashboard
    from router.metrics import RouterMetrics
    from router.service import RouterService

    metrics = RouterMetrics(program.version(), settings.name)
    async with running(settings, os.environ, metrics) as assembly:
        service = RouterService(assembly)
        said = f"listening on {server.url}"
        async with fleet_dashboard(assembly) as dashboard, asyncio.TaskGroup() as tasks:
            page.app = create_app(service, dashboard)
            program.look_for_cycles_less()
            notifier.ready(said)
            telling = tasks.create_task(
                program.tell_what_is_missing(notifier, said, assembly.readiness)
            )
            # Takes a while where discovery is away.
            if await program.unless_stopped(stop, serve_component(service)):
                _log.info("serving", http=server.url, router=settings.name, policy=settings.policy)
                await stop.wait()
            telling.cancel()
        notifier.stopping()
        _log.info("stopping", requests=len(assembly.reservations))
        await server.stop()


if __name__ == "__main__":
    main()
