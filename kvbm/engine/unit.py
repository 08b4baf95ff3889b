"""The systemd template for engines: `kvbm-engine@.service` beside this file, filled in."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from kvbm.daemon.unit import escaped


def unit_text(program: Path, config: Path, user: str, group: str) -> str:
    """Paths are absolute."""
    values = {
        "@PROGRAM@": escaped(program),
        "@CONFIG@": escaped(config),
        "@USER@": user,
        "@GROUP@": group,
    }
    text = resources.files(__package__).joinpath("kvbm-engine@.service").read_text("utf-8")
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text
