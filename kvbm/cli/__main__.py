"""`kvbm`: status, top, why, what-if, peers, instances, doctor, engines, events, chunks and more.

Exit status: 0 done and well; 1 failed, or not well; 2 wrong usage; 3 the node is not ready.
Data goes to standard output, talk to standard error.
"""

from __future__ import annotations

import sys

import typer

from kvbm.cli import (
    actions,
    bench,
    chunks,
    doctor,
    engine,
    events,
    instances,
    programs,
    status,
    top,
    what_if,
    why,
)
from kvbm.cli.client import Failure

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Look after the KV-cache block manager of a node.",
)
for command in (
    *(status.status, status.tiers, status.peers, instances.instances, top.top, doctor.doctor),
    *(why.why, what_if.what_if, chunks.chunks),
    *(actions.drain, actions.resume, actions.flush, actions.scrub),
):
    app.command()(command)
app.add_typer(chunks.quarantine, name="quarantine")
app.add_typer(engine.app, name="engine")
app.add_typer(events.app, name="events")
app.add_typer(bench.app, name="bench")
app.command(**programs.PASSED_ON)(programs.router)


def main() -> None:
    try:
        app(prog_name="kvbm")
    except Failure as failure:
        sys.stderr.write(f"kvbm: {failure}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
