"""Compiled kernels: what is kept on disk is used for as long as it is what would be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PARTS = """
from runtime.native import inlined

STEP = {step}


@inlined
def inlined_step(n):
    return n + STEP
"""
KERNEL = """
from numba import int64

import parts
from runtime.native import inlined, kernel


@kernel(int64(int64))
def stepped(n):
    return parts.inlined_step(n) + 100 * parts.STEP


print(stepped(0), len(stepped.stats.cache_hits))
"""


def run(folder: Path) -> list[int]:
    paths = [str(folder), str(Path(__file__).parents[2])]
    told = subprocess.run(
        [sys.executable, "-m", "kernels"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    return [int(word) for word in told.split()]


def test_a_kernel_is_compiled_anew_when_a_module_that_it_takes_parts_of_has_changed(
    tmp_path: Path,
) -> None:
    (tmp_path / "kernels.py").write_text(KERNEL)
    (tmp_path / "parts.py").write_text(PARTS.format(step=1))
    assert run(tmp_path) == [101, 0]
    assert run(tmp_path) == [101, 1]
    (tmp_path / "parts.py").write_text(PARTS.format(step=2))
    assert run(tmp_path) == [202, 0]
