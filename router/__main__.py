"""`kvbm-router`: route the requests of a fleet, or check the settings.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer

from router.settings import PROGRAM, RouterSettings
from runtime import telemetry
from runtime.settings import Loaded, SettingsError, parse_assignments
from runtime.web.server import ListenError, WebServer

DISTRIBUTION = "kvbm-daemon"

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
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one setting; may be given repeatedly."),
]


@app.command()
def serve(config: Config = None, assignments: Assignments = None) -> None:
    """Route until SIGTERM or SIGINT."""
    loaded = _load(config, assignments)
    settings = loaded.value
    telemetry.configure(settings.log.format, settings.log.level, sys.stderr, os.environ)
    for name in loaded.ignored:
        _log.warning("unknown_variable", name=name)
    try:
        asyncio.run(_serve(settings))
    except ExceptionGroup as group:  # everything runs in task groups
        expected, others = group.split((ListenError, OSError))
        if others is not None or expected is None:
            raise
        for error in expected.exceptions:
            _log.error("cannot_run", reason=str(error))
        raise typer.Exit(1) from None


@app.command("check-config")
def check_config(
    file: Annotated[Path | None, typer.Argument(help="YAML or TOML file.")] = None,
    assignments: Assignments = None,
) -> None:
    """Check the settings that `serve` would use, and say where each problem is."""
    loaded = _load(file, assignments)
    sections = {key.rpartition(".")[0] for key in loaded.origins}
    for key in sorted(loaded.origins.keys() - sections):
        typer.echo(f"{key}: from {loaded.origins[key]}")
    for name in loaded.ignored:
        typer.echo(f"{name}: names no setting; ignored", err=True)
    typer.echo("settings are usable")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(importlib.metadata.version(DISTRIBUTION))


def main() -> None:
    app(prog_name=PROGRAM)


async def _serve(settings: RouterSettings) -> None:
    # What only serving needs takes a second to import.
    from router.app import create_app
    from router.assembly import running
    from router.component import serve_component
    from router.metrics import RouterMetrics
    from router.service import RouterService

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = RouterMetrics(importlib.metadata.version(DISTRIBUTION), settings.name)
    async with running(settings, os.environ, metrics) as assembly:
        service = RouterService(assembly)
        http = settings.http
        server = WebServer(
            create_app(service),
            http.host,
            http.port,
            section="http",
            concurrency_max=http.concurrency,
        )
        await server.start()
        try:
            await serve_component(service)
            _log.info("serving", http=server.url, router=settings.name, policy=settings.policy)
            await stop.wait()
            _log.info("stopping", requests=len(assembly.reservations))
        finally:
            await server.stop()
    _log.info("stopped")


def _load(file: Path | None, assignments: list[str] | None) -> Loaded[RouterSettings]:
    try:
        return RouterSettings.load(file, overrides=parse_assignments(assignments or ()))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    main()
