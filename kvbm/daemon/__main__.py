"""`kvbm-daemon`: serve a node, check its settings, or print its systemd unit.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbm.daemon.holder import Holder
from kvbm.daemon.settings import PROGRAM, DaemonSettings
from kvbm.daemon.unit import CACHE, Installation, unit_text
from runtime import program, telemetry
from runtime.allocator import map_large_blocks

app = program.command_line("KV-cache block manager: one per node, shared by every engine on it.")

Config = Annotated[Path | None, program.config_option("docs/CONFIG.md")]


@app.command()
def serve(config: Config = None, assignments: program.Assignments = None) -> None:
    """Serve the engines of this node until SIGTERM or SIGINT."""
    loaded = program.loaded_or_exit(DaemonSettings.load, config, assignments)
    settings = loaded.value
    map_large_blocks()
    program.begin_log(settings.log, loaded)
    from kvbm.daemon import start

    with program.ending_with_reason(*start.CANNOT_RUN):
        asyncio.run(start.serve(settings))


@app.command()
def hold(
    command: Annotated[
        list[str], typer.Argument(help="The daemon's: `-- kvbm-daemon serve --config FILE`.")
    ],
) -> None:
    """Run the daemon and keep its host memory when it is restarted; for nodes without systemd.

    SIGHUP restarts it, for an upgrade; SIGTERM ends both.
    """
    telemetry.configure("auto", "info", sys.stderr, os.environ)
    raise typer.Exit(Holder(command).run())


@app.command("print-unit")
def print_unit(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The settings that the daemon is to use.")
    ] = Path("/etc/kvbm/kvbm.yaml"),
    binary: Annotated[
        Path | None, typer.Option("--program", help="The kvbm-daemon to run; by default this one.")
    ] = None,
    user: Annotated[str, typer.Option(help="The user to run as, and engines with it.")] = "kvbm",
    group: Annotated[str | None, typer.Option(help="By default named like the user.")] = None,
) -> None:
    """Print the systemd unit for this installation, for /etc/systemd/system."""
    where = Installation(
        program=(binary or Path(sys.executable).parent / PROGRAM).absolute(),
        config=config.absolute(),
        user=user,
        group=group or user,
        ssd=_ssd_path(config),
    )
    if where.ssd is None and not os.access(config, os.R_OK):
        typer.echo(
            f"{config} cannot be read here: name an SSD tier outside {CACHE} in "
            "ReadWritePaths yourself",
            err=True,
        )
    typer.echo(unit_text(where), nl=False)


program.add_common_commands(app, DaemonSettings.load)


def main() -> None:
    app(prog_name=PROGRAM)


def _ssd_path(config: Path) -> Path | None:
    """Where the settings keep the SSD tier; None if they have none or cannot be read yet."""
    if not os.access(config, os.R_OK):
        return None
    ssd = program.loaded_or_exit(DaemonSettings.load, config, None).value.ssd
    return None if ssd is None else ssd.path


if __name__ == "__main__":
    main()
