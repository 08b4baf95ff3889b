"""`kvbm bench`: tiers on this machine beside its limits, and traces replayed on mock engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbm.cli.client import AdminClient
from kvbm.cli.options import DEFAULT_URL, AsJson, Token, Url
from kvbm.cli.output import console, print_json

app = typer.Typer(no_args_is_help=True, help="Benchmarks on this machine.")


@app.command()
def tiers(
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
    chunk: Annotated[str, typer.Option("--chunk", help="Bytes of a chunk.")] = "1MiB",
    total: Annotated[str, typer.Option("--total", help="Moved each way and round.")] = "256MiB",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Medians are of these.")] = 3,
    folder: Annotated[
        Path, typer.Option("--folder", help="On the disk to measure; left as it was.")
    ] = Path(),
    running: Annotated[
        bool, typer.Option("--running", help="The daemon at --url instead of a temporary one.")
    ] = False,
) -> None:
    """Store and load chunks as an engine does, through host memory and the SSD.

    A temporary daemon is started for it and ended. With --running the one at --url is measured,
    which evicts what it held for what is stored; what needs a restart is then left out.
    """
    from kvbm.cli.bench_tiers import Plan, measure_running, measure_temporary

    plan = Plan.of(chunk, total, rounds)
    if running:
        with AdminClient(url, token) as client:
            rows = measure_running(plan, client)
    else:
        rows = measure_temporary(plan, folder)
    if as_json:
        print_json({"benchmark": "tiers", "results": rows})
        return
    from kvbm.cli.figures import lines

    for line in lines(rows):
        console().print(line, soft_wrap=True)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def replay(context: typer.Context) -> None:
    """Replay a trace in virtual time, routing policies side by side; `--help` lists options."""
    # The mock engine stands above this package, so it is started and not imported.
    done = subprocess.run([sys.executable, "-m", "mocker", *context.args], check=False)
    raise typer.Exit(done.returncode)
