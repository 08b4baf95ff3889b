"""Programs of others that judge what `deploy/` has; `tools/install.py` puts them beside Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def program(name: str) -> str:
    """Where it is; a test without it is skipped with the reason."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} here; `make setup` says why it could not be had")
    return found


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [program(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
