"""Child processes of the demo and of the engine tests: started apart, waited for, always ended.

Each runs in a session of its own with its output in a log file, and leaves a record of its pid
and start time, so that whatever a killed run left behind is found and ended by the next one, and
a pid that now belongs to somebody else is never signalled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from runtime.server_process import free_ports

TAIL_LINES = 25
POLL_S = 0.03


class ProcessError(Exception):
    """A program of the demo did not start, or ended on its own; carries its log's last lines."""


class Process:
    """One program. `start` returns at once; `wait_until` says when it is of use."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        record: Path | None = None,
        env: Mapping[str, str] | None = None,
        grace_s: float = 20.0,
    ) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._record = record
        self._env = dict(env or {})
        self._grace_s = grace_s
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._child is not None, f"{self.name} was not started"
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self, more: Mapping[str, str] | None = None) -> None:
        """`more` variables for this start alone."""
        assert not self.running, f"{self.name} is running already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._env, **(more or {})},
                start_new_session=True,
            )
        if self._record is not None:
            write_record(self._record, self._child.pid)

    def check(self) -> None:
        """Raises ProcessError if the program is not running any more."""
        if not self.running:
            status = self._child.returncode if self._child else "never started"
            raise ProcessError(f"{self.name} ended on its own (status {status}).\n{self.tail()}")

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> float:
        """Seconds until `ready()` said so. Raises ProcessError when it ends or takes too long."""
        start_s = time.monotonic()
        while not ready():
            self.check()
            if time.monotonic() - start_s > timeout_s:
                raise ProcessError(
                    f"{self.name} was not ready after {timeout_s:.0f} s.\n{self.tail()}"
                )
            time.sleep(POLL_S)
        return time.monotonic() - start_s

    def stop(self) -> int | None:
        """Ask it to end, then end it and all it started. Its exit status, if it ran."""
        if self._child is None:
            return None
        stop_group(self._child.pid, self._grace_s, reap=self._child)
        if self._record is not None:
            self._record.unlink(missing_ok=True)
        return self._child.returncode

    def kill(self) -> None:
        """End it the hard way, as a crash would."""
        self._grace_s, kept = 0.0, self._grace_s
        try:
            self.stop()
        finally:
            self._grace_s = kept

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of its log, with the log's address."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join([f"--- end of {self.log}:", *text.splitlines()[-lines:]])


def stop_group(pid: int, grace_s: float, reap: subprocess.Popen[bytes] | None = None) -> None:
    """SIGTERM to the leader, SIGKILL to whatever of its group is left when `grace_s` is over."""

    def gone() -> bool:
        if reap is not None:
            return reap.poll() is not None
        return start_time(pid) is None

    if grace_s > 0 and not gone():
        _signal(os.kill, pid, signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        while not gone() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    _signal(os.killpg, pid, signal.SIGKILL)
    if reap is not None:
        reap.wait()


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all it started, whatever sessions they lead."""
    tree = [pid]
    for parent in tree:
        tasks = Path(f"/proc/{parent}/task").glob("*/children")
        with contextlib.suppress(OSError):  # it ended meanwhile
            tree += [int(child) for task in tasks for child in task.read_text().split()]
    for one in tree:
        _signal(os.kill, one, signal.SIGKILL)


def write_record(path: Path, pid: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{pid} {start_time(pid)}\n")


def recorded(path: Path) -> int | None:
    """The pid of a record, if the very program that it names is still running."""
    if not path.exists():
        return None
    pid, _, started = path.read_text().strip().partition(" ")
    return int(pid) if pid.isdigit() and start_time(int(pid)) == started else None


def end_recorded(folder: Path, grace_s: float = 20.0) -> list[str]:
    """End every program whose record lies in `folder` and is still the one recorded; its names."""
    ended = []
    for record in sorted(folder.glob("*.pid")):
        pid = recorded(record)
        if pid is not None:
            stop_group(pid, grace_s)
            ended.append(record.stem)
        record.unlink(missing_ok=True)
    return ended


def start_time(pid: int) -> str | None:
    """The kernel's start time of a live process: with the pid, it names one process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def free_port() -> int:
    """A loopback port nobody listens on now, and none that the kernel gives to a connection."""
    return free_ports(1)[0]


def _signal(send: Callable[[int, int], None], target: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it went on its own: what was wanted
        send(target, number)
