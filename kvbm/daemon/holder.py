"""`kvbm-daemon hold`: keeps the daemon's memory over its restarts where there is no systemd.

A small supervisor that speaks what systemd speaks to a service with a file descriptor store, and
only that: the daemon does not know which of the two it has. It starts the daemon again when it
ends, with the descriptors it left; SIGHUP asks for a restart, SIGTERM and SIGINT for the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import structlog

from runtime.systemd import FIRST_FD

STORE_MAX: Final = 8
UNUSABLE: Final = 2  # the exit status of a program whose settings starting again does not mend
FAILURES_MAX: Final = 10  # in a row, then the holder gives up
FAILURE_PAUSE_S: Final = 1.0
STEADY_S: Final = 60.0
_MESSAGE_BYTES_MAX: Final = 4096
_HANDLED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_log = structlog.get_logger("kvbm.holder")


class Holder:
    """Runs one command until it is told to end. Single-threaded; owns the process's signals."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._kept: dict[str, int] = {}
        self._child: int | None = None
        self._is_ending = False

    def run(self) -> int:
        """The exit status of the last run of the command."""
        folder = Path(tempfile.mkdtemp(prefix="kvbm-hold-"))  # 0700: only this user can tell us
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
                told.bind(str(folder / "notify"))
                told.setblocking(False)
                for number in _HANDLED:
                    signal.signal(number, self._pass_on)
                return self._keep_running(told)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for fd in self._kept.values():
                os.close(fd)

    def _keep_running(self, told: socket.socket) -> int:
        failures = 0
        while True:
            began = time.monotonic()
            status = self._run_once(told)
            if self._is_ending or status == UNUSABLE:
                return status
            if time.monotonic() - began > STEADY_S:
                failures = 0
            if status != 0:
                failures += 1
                if failures >= FAILURES_MAX:
                    _log.error("giving_up", status=status, failures=failures)
                    return status
                time.sleep(FAILURE_PAUSE_S)
                if self._is_ending:
                    return status
            _log.info("starting_again", status=status, kept=sorted(self._kept))

    def _run_once(self, told: socket.socket) -> int:
        with _signals_held():
            self._child = os.fork()
            if self._child == 0:
                self._become_command(str(told.getsockname()))
        pidfd = os.pidfd_open(self._child)
        try:
            poll = select.poll()
            poll.register(told, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            while True:
                ended = pidfd in {fd for fd, _ in poll.poll()}
                self._hear(told)  # first: what it said before its end counts
                if ended:
                    break
        finally:
            os.close(pidfd)
            with _signals_held():
                _, waited = os.waitpid(self._child, 0)
                self._child = None
        status = os.waitstatus_to_exitcode(waited)
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            self._is_ending = True
        if self._child is not None:
            os.kill(self._child, signal.SIGTERM if number == signal.SIGHUP else number)

    # -- what the daemon says --------------------------------------------------------------

    def _hear(self, told: socket.socket) -> None:
        """Every message that has come."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(told, _MESSAGE_BYTES_MAX, STORE_MAX)
            except BlockingIOError:
                return
            lines = (line.partition("=") for line in data.decode(errors="replace").splitlines())
            said = {name: value for name, _, value in lines}
            name = said.get("FDNAME", "")
            if "FDSTOREREMOVE" in said and name in self._kept:
                os.close(self._kept.pop(name))
            for fd in fds:
                is_free = name not in self._kept and len(self._kept) < STORE_MAX
                if "FDSTORE" in said and name and ":" not in name and is_free:
                    self._kept[name] = fd
                else:
                    os.close(fd)  # a barrier's, for which closing is the answer, or one too many

    # -- the child, between fork and exec --------------------------------------------------

    def _become_command(self, address: str) -> NoReturn:
        try:
            environ = {**os.environ, "NOTIFY_SOCKET": address, "FDSTORE": str(STORE_MAX)}
            for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_USEC"):
                environ.pop(name, None)
            if self._kept:
                environ["LISTEN_PID"] = str(os.getpid())
                environ["LISTEN_FDS"] = str(len(self._kept))
                environ["LISTEN_FDNAMES"] = ":".join(self._kept)
                self._place_descriptors()
            for number in _HANDLED:  # one that came already ends the child, as it should
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            os.execvpe(self._command[0], self._command, environ)  # noqa: S606 (the operator's)
        except OSError as error:
            os.write(2, f"cannot run {self._command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(UNUSABLE)

    def _place_descriptors(self) -> None:
        """The kept ones at 3 and up; what else is open there closes at exec or is in the way."""
        above = FIRST_FD + len(self._kept)
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in self._kept.values()]
        for place, fd in enumerate(copies, FIRST_FD):
            os.dup2(fd, place, inheritable=True)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """So that one that comes meanwhile finds the child known, or known to be gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
