"""The options that every command has."""

from __future__ import annotations

from typing import Annotated, Final

import typer

DEFAULT_URL: Final = "http://127.0.0.1:9470"

Url = Annotated[
    str, typer.Option("--url", envvar="KVBM_ADMIN_URL", help="The daemon's admin address.")
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="KVBM_ADMIN_TOKEN",
        help="The daemon's admin.token, or file:PATH.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
