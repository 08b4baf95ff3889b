"""How commands write: JSON for programs, tables and short lines for people."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table

_PIPE_COLUMNS: Final = 160
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def console() -> Console:
    """Standard output; wide where there is no terminal whose width would matter."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def table(*columns: str, title: str | None = None) -> Table:
    """Columns named with a leading `>` are numbers."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_number = column.startswith(">")
        made.add_column(
            column.removeprefix(">"),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
        )
    return made


def size(count: float) -> str:
    """Bytes with three digits and a binary unit."""
    index = 0
    while count >= 1024 and index < len(_UNITS) - 1:
        count /= 1024
        index += 1
    return (
        f"{count:.0f} {_UNITS[index]}"
        if index == 0 or count >= 100
        else f"{count:.3g} {_UNITS[index]}"
    )


def share(part: float, whole: float) -> str:
    """A percentage, or a dash of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def age(seconds: float) -> str:
    """A length of time in its two largest units."""
    minutes, rest_s = divmod(int(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if days:
        return f"{days} d {rest_h} h"
    if hours:
        return f"{hours} h {rest_min} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"


def moment(seconds_since_1970: float) -> str:
    return datetime.fromtimestamp(seconds_since_1970, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
