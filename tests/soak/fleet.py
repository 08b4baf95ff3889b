"""The engines of a soak: a constant number of processes that come, go and are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ENGINES: Final = 4
CHUNK_BYTES: Final = (8 << 10, 40 << 10, 128 << 10)
LIFE_S = 6.0, 40.0  # from, to
KILLED_OF_FIVE: Final = 2  # engines, at a random moment of their life
END_TIMEOUT_S: Final = 60.0


@dataclass(slots=True)
class _Engine:
    child: subprocess.Popen[str]
    kill_at: float | None


class Fleet:
    """Call `tend` often; `end` once. No engine lives longer than `life_s_max`."""

    def __init__(
        self, socket: Path, dice: random.Random, log: Path, life_s_max: float = LIFE_S[1]
    ) -> None:
        self._socket = socket
        self._dice = dice
        self._log = log.open("a")
        self._life_s_max = min(life_s_max, LIFE_S[1])
        self._engines: list[_Engine] = []
        self._began = time.time()
        self.counts: Counter[str] = Counter()  # chunks moved, and engines by how they ended

    def tend(self) -> None:
        """Kill whose time has come, look at who ended, start others. Raises on a wrong byte."""
        now = time.monotonic()
        for engine in list(self._engines):
            if engine.child.poll() is not None:
                self._bury(engine)
            elif engine.kill_at is not None and now >= engine.kill_at:
                engine.child.send_signal(signal.SIGKILL)
                engine.kill_at = None
        while len(self._engines) < ENGINES:
            self._start()

    def end(self) -> None:
        """Let those that run come to their end."""
        for engine in list(self._engines):
            engine.child.wait(END_TIMEOUT_S + self._life_s_max)
            self._bury(engine)
        self._log.close()

    def kill(self) -> None:
        """For a soak that failed."""
        for engine in self._engines:
            engine.child.kill()
            engine.child.communicate()
        self._log.close()

    def _start(self) -> None:
        dice = self._dice
        size = CHUNK_BYTES[self.counts["engines"] % len(CHUNK_BYTES)]
        life_s = dice.uniform(min(LIFE_S[0], self._life_s_max / 2), self._life_s_max)
        arguments = [self._socket, size, dice.randrange(1 << 32), life_s, self._began]
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.engine", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        kills = self.counts["engines"] % 5 < KILLED_OF_FIVE
        kill_at = time.monotonic() + dice.uniform(0, life_s) if kills else None
        self._engines.append(_Engine(child, kill_at))
        self.counts["engines"] += 1

    def _bury(self, engine: _Engine) -> None:
        self._engines.remove(engine)
        told, _ = engine.child.communicate()
        status = engine.child.returncode
        if status == -signal.SIGKILL:
            self.counts["killed"] += 1
            return
        assert status == 0, f"an engine ended with status {status}; see {self._log.name}"
        self.counts["ended"] += 1
        self.counts.update(json.loads(told))
