"""Copies stay off the core that an engine's worker computes on."""

import os
import subprocess
import sys

import pytest

WORKER = """
import os, threading
from connectors.vllm.cores import leave_the_models_core

def copy():
    leave_the_models_core()
    print(sorted(os.sched_getaffinity(0)))

if {core} is not None:
    os.sched_setaffinity(0, {{{core}}})
thread = threading.Thread(target=copy)
thread.start()
thread.join()
print(sorted(os.sched_getaffinity(0)))
"""


def cores_of_copy_and_worker(core: int | None) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(core=core)], capture_output=True, check=True, text=True
    )
    return done.stdout.splitlines()


def test_a_copy_leaves_the_core_its_worker_was_bound_to() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    assert cores_of_copy_and_worker(cores[0]) == [str(cores[1:]), str(cores[:1])]


def test_a_worker_that_was_not_bound_copies_anywhere() -> None:
    cores = str(sorted(os.sched_getaffinity(0)))
    assert cores_of_copy_and_worker(None) == [cores, cores]
