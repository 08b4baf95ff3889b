"""The systemd template for engines: `kvbm-engine@.service` beside this file, filled in."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from runtime.unit import escaped, filled


def unit_text(program: Path, config: Path, user: str, group: str) -> str:
    """Paths are absolute."""
    values = {
        "@PROGRAM@": escaped(program),
        "@CONFIG@": escaped(config),
        "@USER@": user,
        "@GROUP@": group,
    }
    text = resources.files(__package__).joinpath("kvbm-engine@.service").read_text("utf-8")
    return filled(text, values)
