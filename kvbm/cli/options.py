"""The options that every command has."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvbm.address import ADMIN_TOKEN_VARIABLE, ADMIN_URL_VARIABLE

DEFAULT_URL: Final = "http://127.0.0.1:9470"

Url = Annotated[
    str, typer.Option("--url", envvar=ADMIN_URL_VARIABLE, help="The daemon's admin address.")
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar=ADMIN_TOKEN_VARIABLE,
        help="The daemon's admin.token, or file:PATH.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
