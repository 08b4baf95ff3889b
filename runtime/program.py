"""What the command line of every program has: settings read or refused, checked, and the version.

Exit status 2: its settings cannot be used; 1: it cannot run.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import structlog
import typer

from runtime import telemetry
from runtime.settings import Loaded, Settings, SettingsError, parse_assignments
from runtime.systemd import Notifier
from runtime.tasks import end
from runtime.telemetry import LogSettings
from runtime.unit import Program, unit_text

DISTRIBUTION: Final = "kvbm-daemon"
MISSING_EVERY_S: Final = 1.0
YOUNG_OBJECTS: Final = 20_000
"""So many are made before they are looked through for cycles, instead of Python's 700."""

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


def command_line(about: str) -> typer.Typer:
    return typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=about
    )


def config_option(page: str, forms: str = "YAML or TOML") -> Any:
    """Of the file with the settings that `page` lists."""
    return typer.Option("--config", "-c", help=f"{forms} file ({page}).")


def look_for_cycles_less() -> None:
    """What was made so far stays, and requests leave few: a look through all takes 0.1 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


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


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Whether the work was done before the stop came, at which it is cancelled."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


@contextlib.asynccontextmanager
async def beside_systemd() -> AsyncIterator[Notifier]:
    """Feeds its watchdog as long as the event loop turns. When it is ready, the caller says."""
    notifier = Notifier.from_environ(os.environ)
    feeding = asyncio.create_task(notifier.feed_watchdog(), name="watchdog")
    try:
        yield notifier
    finally:
        await end(feeding)


async def tell_what_is_missing(
    notifier: Notifier, serving: str, checks: Callable[[], Mapping[str, str | None]]
) -> None:
    """In the log and to systemd, whenever that has changed; until cancelled.

    `checks`: by name, why it does not pass. `serving`: what systemd is told besides.
    """
    told: dict[str, str] = {}
    while True:
        await asyncio.sleep(MISSING_EVERY_S)
        missing = {name: why for name, why in checks().items() if why is not None}
        if missing == told:
            continue
        told = missing
        if missing:
            _log.warning("waits_for", **missing)
            waits = "; ".join(f"{name}: {why}" for name, why in missing.items())
            notifier.status(f"{serving}; waits for {waits}")
        else:
            _log.info("waits_for_nothing")
            notifier.status(serving)


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


def add_print_unit(app: typer.Typer, name: str, *, notifies: bool = True) -> None:
    """`print-unit`, for a program whose unit is `runtime/program.service`."""
    settings = Path(f"/etc/kvbm/{name.removeprefix('kvbm-')}.yaml")

    @app.command("print-unit")
    def print_unit(
        config: Annotated[
            Path, typer.Option("--config", "-c", help="The settings that it is to use.")
        ] = settings,
        binary: Annotated[
            Path | None, typer.Option("--program", help="What to run; by default this program.")
        ] = None,
        user: Annotated[str, typer.Option(help="The user to run as.")] = "kvbm",
        group: Annotated[str | None, typer.Option(help="By default named like the user.")] = None,
    ) -> None:
        """Print the systemd unit for this installation, for /etc/systemd/system."""
        where = Program(
            name=name,
            path=(binary or Path(sys.executable).parent / name).absolute(),
            config=config.absolute(),
            user=user,
            group=group or user,
            notifies=notifies,
        )
        typer.echo(unit_text(where), nl=False)
