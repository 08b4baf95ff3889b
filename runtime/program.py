"""What the command line of every program has: settings read or refused, checked, and the version.

Exit status 2: its settings cannot be used; 1: it cannot run.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import structlog
import typer

from runtime import telemetry
from runtime.settings import Loaded, Settings, SettingsError, parse_assignments
from runtime.telemetry import LogSettings

DISTRIBUTION: Final = "kvbm-daemon"

Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one setting, a list as a,b or JSON; may be given repeatedly.",
    ),
]

S = TypeVar("S", bound=Settings)
Load = Callable[..., Loaded[S]]
"""The `load` of a program's settings."""

_log = structlog.get_logger()


def version() -> str:
    return importlib.metadata.version(DISTRIBUTION)


def loaded_or_exit(load: Load[S], file: Path | None, assignments: list[str] | None) -> Loaded[S]:
    """The settings; ends the program with status 2, all problems told, if they are of no use."""
    try:
        return load(file, overrides=parse_assignments(assignments or ()))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(2) from None


def begin_log(log: LogSettings, loaded: Loaded[Any]) -> None:
    """Set up logging, and say which variables name no setting."""
    telemetry.configure(log.format, log.level, sys.stderr, os.environ)
    for name in loaded.ignored:
        _log.warning("unknown_variable", name=name)


@contextlib.contextmanager
def ending_with_reason(*expected: type[Exception]) -> Iterator[None]:
    """What stops a program from running becomes a line in the log and status 1, also in a group."""
    try:
        yield
    except expected as error:
        _log.error("cannot_run", reason=str(error))
        raise typer.Exit(1) from None
    except ExceptionGroup as group:  # of task groups
        known, others = group.split(expected)
        if others is not None or known is None:
            raise
        for found in known.exceptions:
            _log.error("cannot_run", reason=str(found))
        raise typer.Exit(1) from None


def stop_signal() -> asyncio.Event:
    """Set at SIGTERM or SIGINT; in the running event loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def add_common_commands(app: typer.Typer, load: Load[S]) -> None:
    """`check-config` and `version`."""

    @app.command("check-config")
    def check_config(
        file: Annotated[Path | None, typer.Argument(help="YAML or TOML file.")] = None,
        assignments: Assignments = None,
    ) -> None:
        """Check the settings that `serve` would use, and say where each problem is."""
        loaded = loaded_or_exit(load, file, assignments)
        sections = {key.rpartition(".")[0] for key in loaded.origins}
        for key in sorted(loaded.origins.keys() - sections):
            typer.echo(f"{key}: from {loaded.origins[key]}")
        for name in loaded.ignored:
            typer.echo(f"{name}: names no setting; ignored", err=True)
        typer.echo("settings are usable")

    @app.command("version")
    def print_version() -> None:
        """Print the version."""
        typer.echo(version())
