"""What `kvbm doctor` reads of the daemon's settings; all that imports them here, for it costs."""

from __future__ import annotations

import os
from pathlib import Path

from kvbm.cli.findings import Finding, Place, ok, problem
from kvbm.daemon.settings import DaemonSettings
from runtime.settings import SettingsError


def check_settings(config: Path) -> tuple[Finding, Place | None]:
    """Whether the file can be used, and where it puts the daemon then."""
    try:
        settings = DaemonSettings.load(config).value
    except SettingsError as error:
        return problem("settings", " ".join(str(error).split()), f"mend {config}"), None
    return ok("settings", f"{config} can be used"), _place_in(settings)


def _place_in(settings: DaemonSettings) -> Place:
    ssd = settings.ssd
    return Place(
        is_running=False,
        socket=settings.socket,
        pid=None,
        uid=os.getuid(),
        host_memory_bytes=settings.dram.capacity,
        huge_pages=settings.dram.huge_pages,
        ssd_path=None if ssd is None else ssd.path,
        ssd_bytes=0 if ssd is None else ssd.capacity,
        ssd_mover=None if ssd is None else ssd.mover,
        movers={},
    )
