"""`kvbm top`: the node live, until q or Ctrl-C; printed once where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvbm.cli.client import AdminClient, Failure, Json
from kvbm.cli.options import DEFAULT_URL, AsJson, Token, Url
from kvbm.cli.output import age, console, print_json, size, table
from kvbm.cli.status import queues_table, tiers_table

Interval = Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between looks.")]


def top(
    url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False, interval_s: Interval = 1.0
) -> None:
    """Tiers, queues and engines, live. Ends on q or Ctrl-C."""
    with AdminClient(url, token) as client:
        first = _look(client)
        if as_json:
            print_json(first)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(KeyboardInterrupt):
                _follow(client, first, interval_s)
        else:
            console().print(_screen(first))


def _look(client: AdminClient) -> Json:
    return {
        "checks": client.readiness(),
        **client.get("/v1/node"),
        **client.get("/v1/tiers"),
        **client.get("/v1/sessions"),
    }


def _follow(client: AdminClient, seen: Json, interval_s: float) -> None:
    with _keys(), Live(_screen(seen), console=console(), screen=True, auto_refresh=False) as live:
        while not _quit_within(interval_s):
            try:
                live.update(_screen(_look(client)), refresh=True)
            except Failure as failure:
                live.update(Text(f"{failure}\n\nq quits", style="red"), refresh=True)


def _screen(seen: Json) -> RenderableType:
    checks = seen["checks"]
    wrong = [f"{name}: {reason}" for name, reason in checks.items() if reason != "ok"]
    head = Text.assemble(
        (seen["node"], "bold"),
        f"  {seen['version']}  up {age(time.time() - seen['process']['started'])}  ",
        ("ready", "green") if not wrong else ("; ".join(wrong), "red"),
    )
    engines = table("engine", "role", ">rank", ">pid", "connected", ">claims", ">slots lent")
    for session in seen["sessions"]:
        engines.add_row(
            *(session["engine"], session["role"], str(session["rank"]), str(session["pid"])),
            *(age(session["connected_s"]), str(session["claims"]), size(session["leased_bytes"])),
        )
    blank = Text()
    return Group(
        head, blank, tiers_table(seen["tiers"]), blank, queues_table(seen["queues"]), blank, engines
    )


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Keys arrive one by one and are not shown."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _quit_within(seconds: float) -> bool:
    """Wait so long; whether q was pressed meanwhile."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            key = os.read(sys.stdin.fileno(), 1)
            if key in {b"q", b"Q", b""}:
                return True
    return False
