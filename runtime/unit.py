"""The systemd unit of a program without a node's hardware: `program.service` beside this file.

Routers, frontends, planners: all that differs is the name. `deploy/` has what it gives for the
paths of the documentation. The daemon's own unit and the engines' are in `kvbm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

_HOMES: Final = (Path("/home"), Path("/root"), Path("/run/user"))  # what ProtectHome hides
_QUOTED: Final = " \t'\""
_NOTIFIES: Final = """\
Type=notify
NotifyAccess=main
WatchdogSec=30
# Kernels are compiled at the first start on a machine, and then kept.
TimeoutStartSec=600"""
_SILENT: Final = "Type=exec"


@dataclass(frozen=True, slots=True)
class Program:
    """What runs, of which settings, and as whom. Absolute paths."""

    name: str
    path: Path
    config: Path
    user: str
    group: str
    notifies: bool
    """Whether it tells systemd that it is ready, and feeds its watchdog (`runtime.systemd`)."""


def unit_text(program: Program) -> str:
    """The unit, for /etc/systemd/system/NAME.service."""
    values = {
        "@NAME@": program.name,
        "@VARIABLES@": program.name.upper().replace("-", "_"),
        "@PROGRAM@": escaped(program.path),
        "@CONFIG@": escaped(program.config),
        "@USER@": program.user,
        "@GROUP@": program.group,
        "@READINESS@": _NOTIFIES if program.notifies else _SILENT,
        "@PROTECT_HOME@": "read-only" if is_hidden(program.path, program.config) else "yes",
    }
    text = resources.files(__package__).joinpath("program.service").read_text("utf-8")
    return filled(text, values)


def filled(text: str, values: dict[str, str]) -> str:
    """`text` with every mark replaced."""
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def is_hidden(*paths: Path) -> bool:
    """Whether `ProtectHome=yes` would keep any of these from the program."""
    return any(path.is_relative_to(home) for path in paths for home in _HOMES)


def escaped(path: Path) -> str:
    """As systemd reads it: specifiers begin with a percent sign, words end at a space."""
    text = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if any(mark in text for mark in _QUOTED) else text
