"""`kvbm-frontend`: serve OpenAI's API before a fleet, or check the settings.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Final

import structlog
import typer
import uvloop

from frontend.server import DISTRIBUTION, PROGRAM, serving
from frontend.settings import FrontendSettings
from runtime import telemetry
from runtime.settings import Loaded, SettingsError, parse_assignments
from runtime.web.server import ListenError

YOUNG_OBJECTS: Final = 20_000
"""So many are made before they are looked through for cycles, instead of Python's 700."""

_log = structlog.get_logger("kvbm.frontend")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="OpenAI's API before a fleet of engines, each request where most of its KV is.",
)

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML or TOML file (docs/FRONTEND_CONFIG.md).")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one setting; may be given repeatedly."),
]


@app.command()
def serve(config: Config = None, assignments: Assignments = None) -> None:
    """Serve until SIGTERM or SIGINT; what is under way then is finished first."""
    loaded = _load(config, assignments)
    settings = loaded.value
    telemetry.configure(settings.log.format, settings.log.level, sys.stderr, os.environ)
    for name in loaded.ignored:
        _log.warning("unknown_variable", name=name)
    # The tokenizers' own threads would take the cores of engines on the same node.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        uvloop.run(_serve(settings))
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


async def _serve(settings: FrontendSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(settings, os.environ) as (clients, operators):
        # What was made so far stays, and requests leave few cycles: nothing to look for often.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS)
        _log.info("serving", url=clients.url, operators=operators.url, policy=settings.policy)
        await stop.wait()
        _log.info("stopping")
    _log.info("stopped")


def _load(file: Path | None, assignments: list[str] | None) -> Loaded[FrontendSettings]:
    try:
        return FrontendSettings.load(file, overrides=parse_assignments(assignments or ()))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    main()
