"""`kvbm chunks` and `kvbm quarantine`: where a chunk is, and which were taken out of use."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from kvbm.cli.client import AdminClient
from kvbm.cli.options import DEFAULT_URL, AsJson, Token, Url
from kvbm.cli.output import console, moment, print_json, size, table

Key = Annotated[str, typer.Argument(help="The chunk's key: 32 hexadecimal digits.")]


def chunks(key: Key, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """Where a chunk is kept, and what is known of it there. Exit status 1 if nowhere."""
    with AdminClient(url, token) as client:
        found = client.get(f"/v1/chunks/{quote(key, safe='')}")
    if as_json:
        print_json(found)
        return
    shown = table("tier", ">length", ">position", "parent", "checksum", ">claims")
    for residency in found["residencies"]:
        claims = residency["claims"]
        shown.add_row(
            residency["tier"],
            size(residency["length"]),
            str(residency["position"]),
            residency["parent"] or "-",
            residency["checksum"] if residency["sealed"] else "not yet",
            "-" if claims is None else str(claims),
        )
    out = console()
    out.print(shown)
    if (note := found["note"]) is not None:
        after = f"after {note['parent']}" if note["parent"] else "from the beginning"
        count = len(note["blocks"])
        out.print(f"for routers: {count} blocks {after}, in domain {note['domain']}")


quarantine = typer.Typer(invoke_without_command=True)


@quarantine.callback()
def show(
    context: typer.Context, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
) -> None:
    """Chunks taken out of use because their bytes were wrong; the latest last."""
    if context.invoked_subcommand is not None:
        return
    with AdminClient(url, token) as client:
        found = client.get("/v1/quarantine")
    if as_json:
        print_json(found)
        return
    out = console()
    if found["entries"]:
        shown = table("when", "tier", "key", ">held", "why")
        for entry in found["entries"]:
            held = size(entry["held_bytes"]) if entry["held_bytes"] else "-"
            shown.add_row(moment(entry["at"]), entry["tier"], entry["key"], held, entry["why"])
        out.print(shown)
    out.print(f"{found['total']} chunks since the daemon started")


@quarantine.command()
def clear(
    key: Annotated[str | None, typer.Argument(help="One chunk's key; by default all.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Forget them, and use their places on the SSD again. Exit status 1 if a key is not listed."""
    with AdminClient(url, token) as client:
        done = client.post("/v1/quarantine/clear", {} if key is None else {"key": key})
    if as_json:
        print_json(done)
    else:
        console().print(f"{done['cleared']} cleared, {size(done['freed_bytes'])} in use again")
    if key is not None and not done["cleared"]:
        raise typer.Exit(1)
