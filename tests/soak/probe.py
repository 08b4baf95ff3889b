"""What a soak measures of a daemon from outside: memory, descriptors, threads, how fast it answers.

Latencies are taken a few times a second and summed up per interval, so that a series has as many
values however long the soak is. At the same moments a process that does nothing but echo is asked:
what both show is the machine's, not the daemon's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import httpx2

from benchmarks.match import anonymous_bytes, ask_ms
from examples.demo.daemon import Daemon
from kvbm.stand_in import StandIn
from storage_tiers.testing import make_items
from tests.plain_http import PLAIN

KEYS: Final = 64
CHUNK_BYTES: Final = 4096
ECHO: Final = "import os\nwhile data := os.read(0, 64): os.write(1, data)"
_ITEMS: Final = make_items("soak probe", KEYS, CHUNK_BYTES)


class Probe:
    """An engine that only asks, as a context manager.

    `series` has one value per interval and figure.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._engine = StandIn(daemon.socket, CHUNK_BYTES, lease_chunks=KEYS)
        self._http = httpx2.Client(timeout=10.0, trust_env=False, verify=PLAIN)
        self._lookup_ms: list[float] = []
        self._answer_ms: list[float] = []
        self._echo_ms: list[float] = []
        self._echo = subprocess.Popen(
            [sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.series: dict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> Self:
        self._engine.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.__exit__(*exception)
        self._http.close()
        self._echo.communicate()

    def ask(self) -> None:
        """One lookup over the socket and one request to the admin API, timed."""
        keys = [item.chunk.key for item in _ITEMS]
        self._lookup_ms.append(ask_ms(self._engine, keys))
        self._engine.offer(_ITEMS)  # what is there is known; what was evicted comes back
        began = time.perf_counter()
        self._http.get(f"{self._daemon.url}/healthz").raise_for_status()
        self._answer_ms.append(1e3 * (time.perf_counter() - began))

        assert self._echo.stdin is not None and self._echo.stdout is not None
        began = time.perf_counter()
        self._echo.stdin.write(b"?")
        assert self._echo.stdout.read(1) == b"?"
        self._echo_ms.append(1e3 * (time.perf_counter() - began))

    def take(self) -> None:
        """End an interval."""
        pid = self._daemon.process.pid
        self._http.get(f"{self._daemon.url}/metrics").raise_for_status()  # as Prometheus does
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        self.series["memory"].append(anonymous_bytes(pid) / (1 << 20))
        self.series["descriptors"].append(len(os.listdir(f"/proc/{pid}/fd")))
        self.series["threads"].append(float(status["Threads"]))
        for name, times in (
            ("lookup", self._lookup_ms),
            ("answer", self._answer_ms),
            ("echo", self._echo_ms),
        ):
            self.series[f"{name} p50"].append(_quantile(times, 0.5))
            self.series[f"{name} p99"].append(_quantile(times, 0.99))
            times.clear()


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
