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
    console().print(shown)


def quarantine(url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """Chunks taken out of use because their bytes were wrong; the latest last."""
    with AdminClient(url, token) as client:
        found = client.get("/v1/quarantine")
    if as_json:
        print_json(found)
        return
    out = console()
    if found["entries"]:
        shown = table("when", "tier", "key", "why")
        for entry in found["entries"]:
            shown.add_row(moment(entry["at"]), entry["tier"], entry["key"], entry["why"])
        out.print(shown)
    out.print(f"{found['total']} chunks since the daemon started")
