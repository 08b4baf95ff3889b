"""Engines as processes of this machine: started from a command, ended by SIGTERM, which drains.

For `make up` and small machines. An engine's process is known by its pid in discovery; the one with
least to do goes first. Engines that others have started count, and stay. One that ends without
being asked is started again, later each time. When the planner ends, so do those it has started:
nobody else would end them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import structlog

from planner.actuate.base import ActuateError, Applied
from planner.decide import Decision
from planner.fleet import Member
from planner.settings import ProcessSettings
from runtime.engine_card import Role
from runtime.server_process import ServerError, find_program, free_ports, with_death_signal

BACKOFF_S: Final = 2.0
BACKOFF_S_MAX: Final = 120.0
CLOSE_POLL_S: Final = 0.05

_log = structlog.get_logger("planner")


@dataclass(slots=True)
class _Engine:
    role: Role
    process: subprocess.Popen[bytes]
    stopping_since_s: float | None = None


class Processes:
    kind = "processes"
    acts = True

    def __init__(
        self, settings: ProcessSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._engines: list[_Engine] = []
        self._started: set[int] = set()  # pids, also of those that have ended
        self._goal: dict[Role, int] = {}
        self._failures = 0  # in a row
        self._not_before_s = 0.0
        self.deaths_total = 0

    async def start(self) -> None:
        """Raises ActuateError if there is no place for their logs."""
        try:
            self._settings.log_directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ActuateError(f"{self._settings.log_directory}: {error}") from error

    async def close(self) -> None:
        """Ask all to end, and wait as long as a drain may take."""
        for engine in self._engines:
            self._ask_to_end(engine)
        end_s = self._clock() + self._settings.stop_timeout
        for engine in self._engines:
            await _ended(engine.process, end_s - self._clock())
            if engine.process.poll() is None:
                _kill(engine.process)
        self._engines.clear()

    async def desired(self) -> Mapping[Role, int]:
        return dict(self._goal)

    async def apply(self, decision: Decision, members: Sequence[Member]) -> Applied:
        self._goal = dict(decision.targets)
        self._reap()
        done: list[str] = []
        for role, target in decision.targets.items():
            kept = [e for e in self._engines if e.role == role and e.stopping_since_s is None]
            there = len(kept) + self._others(role, members)
            for engine in self._surplus(kept, there - target, members):
                self._ask_to_end(engine)
                done.append(f"process {engine.process.pid} is asked to drain and end")
            for _ in range(target - there):
                if self._clock() < self._not_before_s:
                    done.append("waiting before an engine is started again")
                    break
                done.append(f"process {self._begin(role)} was started")
        return Applied(accepted=True, text="; ".join(done) or "nothing to do")

    def _others(self, role: Role, members: Sequence[Member]) -> int:
        """Engines that somebody else has started."""
        host = socket.gethostname()
        able = [m for m in members if m.role == role and m.phase != "draining"]
        return sum(m.record.host != host or m.record.pid not in self._started for m in able)

    def _surplus(
        self, kept: Sequence[_Engine], count: int, members: Sequence[Member]
    ) -> list[_Engine]:
        """Those that nobody has found yet, then those with least to do."""
        busy = {m.record.pid: m.requests for m in members}
        by_work = sorted(kept, key=lambda e: busy.get(e.process.pid, -1.0))
        return by_work[: max(count, 0)]

    def _begin(self, role: Role) -> int:
        """Its pid. Raises ActuateError."""
        settings = self._settings
        port = free_ports(1)[0]
        words = [
            word.replace("{port}", str(port)).replace("{role}", role)
            for word in shlex.split(settings.command)
        ]
        log: IO[bytes] | None = None
        try:
            program = words[0] if "/" in words[0] else find_program(words[0], "kvbm-daemon")
            log = (settings.log_directory / f"engine-{port}.log").open("ab")
            process = subprocess.Popen(
                with_death_signal([str(Path(program).absolute()), *words[1:]]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings.environment},
                start_new_session=True,
            )
        except (OSError, ServerError) as error:
            raise ActuateError(f"{settings.command}: {error}") from error
        finally:
            if log is not None:
                log.close()
        self._engines.append(_Engine(role, process))
        self._started.add(process.pid)
        _log.info("engine_process_started", pid=process.pid, port=port, role=role)
        return process.pid

    def _reap(self) -> None:
        now_s, kept = self._clock(), list[_Engine]()
        for engine in self._engines:
            status = engine.process.poll()
            since_s = engine.stopping_since_s
            if status is None:
                if since_s is not None and now_s - since_s > self._settings.stop_timeout:
                    _log.warning("engine_process_killed", pid=engine.process.pid)
                    _kill(engine.process)
                kept.append(engine)
            elif since_s is None:
                self.deaths_total += 1
                self._failures += 1
                wait_s = min(BACKOFF_S * 2 ** (self._failures - 1), BACKOFF_S_MAX)
                self._not_before_s = now_s + wait_s
                _log.error("engine_process_died", pid=engine.process.pid, status=status)
            else:
                _log.info("engine_process_ended", pid=engine.process.pid, status=status)
        if len(kept) == len(self._engines) and now_s > self._not_before_s + BACKOFF_S_MAX:
            self._failures = 0
        self._engines = kept

    def _ask_to_end(self, engine: _Engine) -> None:
        if engine.stopping_since_s is None:
            engine.stopping_since_s = self._clock()
            engine.process.terminate()


async def _ended(process: subprocess.Popen[bytes], within_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(within_s, 0.0)):
            while process.poll() is None:
                await asyncio.sleep(CLOSE_POLL_S)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
