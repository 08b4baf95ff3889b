"""The systemd unit: one text, `kvbm-daemon.service` beside this file, filled in with what is where.

`deploy/kvbm-daemon.service` is what it gives for the paths of the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from runtime.unit import escaped, filled, is_hidden

CACHE: Final = Path("/var/cache/kvbm")  # the unit's CacheDirectory


@dataclass(frozen=True, slots=True)
class Installation:
    """Where the daemon and its settings lie, and as whom it runs. Absolute paths."""

    program: Path
    config: Path
    user: str
    group: str
    ssd: Path | None = None


def unit_text(where: Installation) -> str:
    """The unit for this installation."""
    paths = (where.program, where.config, *([where.ssd] if where.ssd else []))
    outside = where.ssd is not None and not where.ssd.is_relative_to(CACHE)
    values = {
        "@PROGRAM@": escaped(where.program),
        "@CONFIG@": escaped(where.config),
        "@USER@": where.user,
        "@GROUP@": where.group,
        "@PROTECT_HOME@": "read-only" if is_hidden(*paths) else "yes",
        "@READ_WRITE_PATHS@": f"ReadWritePaths={escaped(where.ssd)}"
        if outside and where.ssd is not None
        else "#ReadWritePaths=/mnt/nvme0/kvbm",
    }
    text = resources.files(__package__).joinpath("kvbm-daemon.service").read_text("utf-8")
    return filled(text, values)
