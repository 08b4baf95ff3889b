"""`kvbm-router`: route the requests of a fleet, or check the settings.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog

from router import start
from router.settings import PROGRAM, RouterSettings
from router.start import Begun
from runtime import program
from runtime.web.server import ListenError

_log = structlog.get_logger("router")

app = program.command_line(
    "Send each request to the worker that has most of its KV and least to do."
)

Config = Annotated[Path | None, program.config_option("docs/ROUTER_CONFIG.md")]


@app.command()
def serve(config: Config = None, assignments: program.Assignments = None) -> None:
    """Route until SIGTERM or SIGINT."""
    loaded = program.loaded_or_exit(RouterSettings.load, config, assignments)
    settings = loaded.value
    program.begin_log(settings.log, loaded)
    with program.ending_with_reason(ListenError, OSError):
        asyncio.run(start.serve(settings.http, "router.app", partial(_route, settings)))


program.add_common_commands(app, RouterSettings.load)
program.add_print_unit(app, PROGRAM)


def main() -> None:
    app(prog_name=PROGRAM)


async def _route(settings: RouterSettings, begun: Begun) -> None:
    from router.app import create_app
    from router.assembly import running
    from router.component import serve_component
    from router.dashboard import fleet_dashboard
    from router.metrics import RouterMetrics
    from router.service import RouterService

    metrics = RouterMetrics(program.version(), settings.name)
    async with running(settings, os.environ, metrics) as assembly:
        service = RouterService(assembly)
        url, stop, notifier = begun.server.url, begun.stop, begun.notifier
        said = f"listening on {url}"
        async with fleet_dashboard(assembly) as dashboard, asyncio.TaskGroup() as tasks:
            begun.page.app = create_app(service, dashboard)
            program.look_for_cycles_less()
            notifier.ready(said)
            telling = tasks.create_task(
                program.tell_what_is_missing(notifier, said, assembly.readiness)
            )
            # Takes a while where discovery is away.
            if await program.unless_stopped(stop, serve_component(service)):
                _log.info("serving", http=url, router=settings.name, policy=settings.policy)
                await stop.wait()
            telling.cancel()
        notifier.stopping()
        _log.info("stopping", requests=len(assembly.reservations))
        await begun.server.stop()


if __name__ == "__main__":
    main()
