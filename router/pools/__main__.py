"""`kvbm-global-router`: route requests to pools of engines, or check the settings.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
import typer

from router import start
from router.pools.config import strategies_of
from router.pools.grid import Strategy
from router.pools.settings import PROGRAM, GlobalRouterSettings
from router.start import Begun
from runtime import program
from runtime.settings import SettingsError
from runtime.web.server import ListenError

_log = structlog.get_logger("kvbm.global_router")

app = program.command_line(
    "Of several pools of engines, send each request to the one that suits it."
)

Config = Annotated[
    Path | None, program.config_option("docs/GLOBAL_ROUTER_CONFIG.md", "YAML, TOML or JSON")
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
        run = partial(_route, settings, strategies)
        asyncio.run(start.serve(settings.http, "router.pools.app", run))


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


async def _route(
    settings: GlobalRouterSettings, strategies: tuple[Strategy, ...], begun: Begun
) -> None:
    from router.pools.app import create_app
    from router.pools.assembly import running
    from router.pools.meter import GlobalRouterMetrics

    metrics = GlobalRouterMetrics(program.version(), settings.name)
    async with running(settings, strategies, os.environ, metrics) as assembly:
        begun.page.app = create_app(assembly)
        program.look_for_cycles_less()
        url, notifier = begun.server.url, begun.notifier
        _log.info("serving", http=url, pools=list(assembly.pools))
        said = f"listening on {url}"
        notifier.ready(said)
        await program.unless_stopped(
            begun.stop, program.tell_what_is_missing(notifier, said, assembly.readiness)
        )
        notifier.stopping()
        _log.info("stopping")
        await begun.server.stop()


if __name__ == "__main__":
    main()
