"""`kvbm-global-router`: route requests to pools of engines, or check the settings.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer

from router.index import KERNELS
from router.pools.config import strategies_of
from router.pools.grid import Strategy
from router.pools.settings import PROGRAM, GlobalRouterSettings
from runtime import program
from runtime.kernels import WHY, compiled
from runtime.settings import SettingsError
from runtime.systemd import Notifier
from runtime.web.server import ListenError, WebServer
from runtime.web.starting import Starting

_log = structlog.get_logger("kvbm.global_router")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Of several pools of engines, send each request to the one that suits it.",
)

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML, TOML or JSON file (docs/GLOBAL_ROUTER_CONFIG.md)."),
]


@app.command()
def serve(config: Config = None, assignments: program.Assignments = None) -> None:
    """Route until SIGTERM or SIGINT; what is under way then is finished first.

    The file with pools and grids is the setting `config`: `--set config=global_router_config.json`.
    """
    loaded = program.loaded_or_exit(GlobalRouterSettings.load, config, assignments)
    settings = loaded.value
    program.begin_log(settings.log, loaded)
    strategies = _strategies_or_exit(settings)
    with program.ending_with_reason(ListenError, OSError):
        asyncio.run(_serve(settings, strategies))


program.add_common_commands(app, GlobalRouterSettings.load)
program.add_print_unit(app, PROGRAM)


def main() -> None:
    app(prog_name=PROGRAM)


def _strategies_or_exit(settings: GlobalRouterSettings) -> tuple[Strategy, ...]:
    try:
        return strategies_of(settings)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(2) from None


async def _serve(settings: GlobalRouterSettings, strategies: tuple[Strategy, ...]) -> None:
    stop = program.stop_signal()
    http, page = settings.http, Starting(WHY)
    server = WebServer(page, http.host, http.port, section="http", concurrency_max=http.concurrency)
    async with program.beside_systemd() as notifier:
        await server.start()
        try:
            notifier.status(WHY)
            # What only serving needs takes a second to import.
            if await program.unless_stopped(stop, compiled(("router.pools.app", *KERNELS))):
                page.why = "starting"
                await _route(settings, strategies, server, page, notifier, stop)
        finally:
            await server.stop()
    _log.info("stopped")


async def _route(
    settings: GlobalRouterSettings,
    strategies: tuple[Strategy, ...],
    server: WebServer,
    page: Starting,
    notifier: Notifier,
    stop: asyncio.Event,
) -> None:
    from router.pools.app import create_app
    from router.pools.assembly import running
    from router.pools.meter import GlobalRouterMetrics

    metrics = GlobalRouterMetrics(program.version(), settings.name)
    async with running(settings, strategies, os.environ, metrics) as assembly:
        page.app = create_app(assembly)
        _log.info("serving", http=server.url, pools=list(assembly.pools))
        said = f"listening on {server.url}"
        notifier.ready(said)
        await program.unless_stopped(
            stop, program.tell_what_is_missing(notifier, said, assembly.readiness)
        )
        notifier.stopping()
        _log.info("stopping")
        await server.stop()


if __name__ == "__main__":
    main()
