"""`kvbm-planner`: set how many engines there are, or check the settings.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import structlog

from planner.settings import PROGRAM, PlannerSettings
from runtime import program
from runtime.web.server import ListenError, WebServer

_log = structlog.get_logger("planner")

app = program.command_line("As many engines as the load needs, and why.")

Config = Annotated[Path | None, program.config_option("docs/PLANNER_CONFIG.md")]


@app.command()
def serve(config: Config = None, assignments: program.Assignments = None) -> None:
    """Plan until SIGTERM or SIGINT."""
    # Fits of some dozens of points: threads of a BLAS would only take engines' cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from planner.actuate.base import ActuateError
    from planner.measure import ProfileRefused

    loaded = program.loaded_or_exit(PlannerSettings.load, config, assignments)
    settings = loaded.value
    program.begin_log(settings.log, loaded)
    with program.ending_with_reason(ListenError, OSError, ProfileRefused, ActuateError):
        asyncio.run(_serve(settings))


program.add_common_commands(app, PlannerSettings.load)
program.add_print_unit(app, PROGRAM)


def main() -> None:
    app(prog_name=PROGRAM)


async def _serve(settings: PlannerSettings) -> None:
    from planner.app import create_app
    from planner.assembly import running

    stop = program.stop_signal()
    async with program.beside_systemd() as notifier, running(settings, os.environ) as loop:
        http = settings.http
        web = create_app(loop, program.version(), http.token_text)
        server = WebServer(web, http.host, http.port, section="http")
        await server.start()
        try:
            _log.info("serving", http=server.url, actuator=settings.actuator)
            said = f"listening on {server.url}"
            notifier.ready(said)
            async with asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(
                    program.tell_what_is_missing(notifier, said, loop.readiness)
                )
                await program.unless_stopped(stop, loop.run())  # which ends by failing alone
                telling.cancel()
            notifier.stopping()
            _log.info("stopping")
        finally:
            await server.stop()
    _log.info("stopped")


if __name__ == "__main__":
    main()
