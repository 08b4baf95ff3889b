"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
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
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="The node's settings, YAML or TOML.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one setting, a list as a,b or JSON; may be given repeatedly.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
