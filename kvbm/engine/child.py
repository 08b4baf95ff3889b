"""The engine's processes: started with a death signal, their output passed on, ended as a group.

The child leads a session of its own: a Ctrl-C at the terminal is the launcher's to handle, and
whatever the engine started is ended with it. If the launcher is killed, the kernel sends the child
SIGTERM. Output goes through threads that do nothing else, so that an engine which talks never
waits for the launcher's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Final

from runtime.server_process import with_death_signal

TAIL_LINES: Final = 20
LINE_CHARACTERS_MAX: Final = 500
POLL_S: Final = 0.05
_PIECE_BYTES: Final = 1 << 16
_KILLED_S: Final = 10.0
_OUTPUT_S: Final = 2.0  # for the last words after the end


class NoProgram(Exception):
    """The command names nothing that can be run."""


class Child:
    """Started once. `end` it whatever happens."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Raises NoProgram."""
        program = shutil.which(command[0])
        if program is None:
            raise NoProgram(f"{command[0]!r} is no program that can be run here")
        self._command = [os.path.abspath(program), *command[1:]]
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_killed = False
        self._readers: list[threading.Thread] = []
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """As a shell tells it: 128 and the signal's number for one that a signal ended."""
        assert self._process is not None
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def tail(self) -> list[str]:
        """The last lines that it wrote, to standard output and standard error."""
        end_s = time.monotonic() + _OUTPUT_S
        for reader in self._readers:  # others of its group may hold the pipes open
            reader.join(max(end_s - time.monotonic(), 0))
        return list(self._tail)

    def start(self) -> None:
        """From the main thread: the kernel sends the death signal when the starting thread ends."""
        assert self._process is None, "started already"
        assert threading.current_thread() is threading.main_thread()
        self._process = subprocess.Popen(
            with_death_signal(self._command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        pipes = (self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr)
        for source, target in pipes:
            assert source is not None
            reader = threading.Thread(
                target=self._pass_on, args=(source, target.fileno()), daemon=True
            )
            self._readers.append(reader)
            reader.start()

    async def ended(self) -> int:
        """Its status, when it has one."""
        while (status := self.status) is None:
            await asyncio.sleep(POLL_S)
        return status

    def ask_to_end(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """It and all of its group. Idempotent."""
        if self._process is None or self._is_killed:
            return
        self._is_killed = True  # later its number may be another's
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody of it is left
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that the kernel holds
            self._process.wait(_KILLED_S)

    def _pass_on(self, source: BinaryIO, target: int) -> None:
        rest = b""
        is_open = True
        while piece := os.read(source.fileno(), _PIECE_BYTES):
            try:
                written = 0
                while is_open and written < len(piece):
                    written += os.write(target, piece[written:])
            except OSError:
                is_open = False  # nobody listens to the launcher; the engine must not stop for it
            *lines, rest = (rest + piece).split(b"\n")
            self._keep(lines)
            rest = rest[-LINE_CHARACTERS_MAX:]
        self._keep([rest])
        source.close()

    def _keep(self, lines: Sequence[bytes]) -> None:
        said = (line[:LINE_CHARACTERS_MAX].decode(errors="replace").rstrip() for line in lines)
        self._tail.extend(line for line in said if line)
