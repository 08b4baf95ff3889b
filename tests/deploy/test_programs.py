"""Fetching what judges `deploy/`: where it is not to be had, setting up goes on and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.deploy.chart import ROOT


def test_what_is_not_to_be_had_is_said_and_stops_nothing(tmp_path: Path) -> None:
    environ = {**os.environ, "PATH": str(tmp_path), "PIP_NO_INDEX": "1"}
    environ.pop("PIP_FIND_LINKS", None)
    done = subprocess.run(
        [sys.executable, ROOT / "tools/programs.py", tmp_path],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["helm", "promtool"]
    assert all("is not to be had here" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    for name in ("helm", "promtool"):
        (tmp_path / name).write_text("as it was")
    command: list[str | Path] = [sys.executable, ROOT / "tools/programs.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert not done.stdout
    assert (tmp_path / "helm").read_text() == "as it was"
