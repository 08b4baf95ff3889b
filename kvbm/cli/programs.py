"""Programs that stand above this package: started in this one's place, and not imported."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import typer

PASSED_ON: Final[dict[str, Any]] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


def router(context: typer.Context) -> None:
    """Route requests to engines: `serve`, `check-config`; `--help` lists what there is."""
    os.execv(sys.executable, [sys.executable, "-m", "router", *context.args])  # noqa: S606
