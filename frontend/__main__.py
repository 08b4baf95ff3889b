"""`kvbm-frontend`: serve OpenAI's API before a fleet, or check the settings.

Exit status: 0 after a clean stop, 1 when it cannot run, 2 when its settings cannot be used.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import structlog
import uvloop

from frontend.server import PROGRAM, Doors, listening, serving
from frontend.settings import FrontendSettings
from router.index import KERNELS
from runtime import program
from runtime.kernels import WHY, compiled
from runtime.systemd import Notifier
from runtime.web.server import ListenError

_log = structlog.get_logger("kvbm.frontend")

app = program.command_line(
    "OpenAI's API before a fleet of engines, each request where most of its KV is."
)

Config = Annotated[Path | None, program.config_option("docs/FRONTEND_CONFIG.md")]


@app.command()
def serve(config: Config = None, assignments: program.Assignments = None) -> None:
    """Serve until SIGTERM or SIGINT; what is under way then is finished first."""
    loaded = program.loaded_or_exit(FrontendSettings.load, config, assignments)
    settings = loaded.value
    program.begin_log(settings.log, loaded)
    # The tokenizers' own threads would take the cores of engines on the same node.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with program.ending_with_reason(ListenError, OSError):
        uvloop.run(_serve(settings))


program.add_common_commands(app, FrontendSettings.load)
program.add_print_unit(app, PROGRAM)


def main() -> None:
    app(prog_name=PROGRAM)


async def _serve(settings: FrontendSettings) -> None:
    stop = program.stop_signal()
    async with program.beside_systemd() as notifier, listening(settings) as doors:
        notifier.status(WHY)
        if await program.unless_stopped(stop, compiled(KERNELS)):
            doors.clients_page.why = doors.operators_page.why = "starting"
            await _route(settings, doors, notifier, stop)
    _log.info("stopped")


async def _route(
    settings: FrontendSettings, doors: Doors, notifier: Notifier, stop: asyncio.Event
) -> None:
    async with serving(settings, os.environ, doors) as fleet:
        program.look_for_cycles_less()
        clients, operators = doors.clients.url, doors.operators.url
        _log.info("serving", url=clients, operators=operators, policy=settings.policy)
        said = f"listening on {clients}"
        notifier.ready(said)
        await program.unless_stopped(
            stop, program.tell_what_is_missing(notifier, said, fleet.waits_for)
        )
        notifier.stopping()
        _log.info("stopping")


if __name__ == "__main__":
    main()
