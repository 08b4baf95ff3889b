"""Compiled kernels: what is kept on disk is used for as long as it is what would be compiled."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.waiting import wait_until

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


def test_of_two_programs_one_compiles_and_the_other_reads_it(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNEL)
    (tmp_path / "parts.py").write_text(PARTS.format(step=1))
    kept = tmp_path / "__pycache__"
    kept.mkdir()
    with ThreadPoolExecutor(2) as pool, as_if_compiling(kept) as ended:
        programs = [pool.submit(run, tmp_path) for _ in range(2)]
        wait_until(lambda: waiting_for(kept) == 2, 120.0, "both wait")
        assert not any(program.done() for program in programs)
        ended()
        assert sorted(program.result() for program in programs) == [[101, 0], [101, 1]]


@contextmanager
def as_if_compiling(kept: Path) -> Iterator[Callable[[], None]]:
    folder = os.open(kept, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield lambda: fcntl.flock(folder, fcntl.LOCK_UN)
    finally:
        os.close(folder)


def waiting_for(folder: Path) -> int:
    """Other processes that have it open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it ended meanwhile, or is another's
            if os.readlink(link) == str(folder):
                found.add(link.parts[2])
    return len(found - {str(os.getpid())})
