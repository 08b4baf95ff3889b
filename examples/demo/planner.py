"""A planner beside the demo's engines: it starts more of them while the load asks for it.

The stack's own engines count, and stay; what the planner starts it ends, each with a drain first.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import yaml

from examples.demo.engine import EngineConfig
from examples.demo.process import Process, free_port

START_TIMEOUT_S = 120.0
END_S = 20.0  # for its engines, whose launcher drains for 2 s and kills after 12
SCALE_DOWN_S = 60.0


def settings_of(
    engine: EngineConfig,
    frontend: str,
    logs: Path,
    events: Mapping[str, Any],
    discovery: Mapping[str, Any],
) -> dict[str, Any]:
    """Of a planner that starts engines as this one, with a frontend's URL."""
    return {
        "actuator": "processes",
        "processes": {
            "command": shlex.join(engine.command("{port}")),
            "environment": engine.variables(),
            "log_directory": str(logs),
            "stop_timeout": END_S,
        },
        "observe": {"frontends": [frontend], "timeout": 10},
        "events": dict(events),
        "discovery": dict(discovery),
    }


class Planner:
    """One kvbm-planner. Engines that it has started end with it."""

    def __init__(self, folder: Path, logs: Path, records: Path) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._file = folder / "kvbm-planner.yaml"
        self.process = Process(
            "kvbm-planner",
            [sys.executable, "-m", "planner", "serve", "--config", str(self._file)],
            log=logs / "kvbm-planner.log",
            record=records / "kvbm-planner.pid",
            grace_s=END_S + 10,
        )

    def start(self, settings: Mapping[str, Any], *, least: int, most: int) -> None:
        """Between so many engines, those of others included."""
        scaling = {
            "min_endpoint": least,
            "max_endpoint": most,
            "max_gpu_budget": -1,
            "scale_down_delay": SCALE_DOWN_S,
        }
        http = {"host": "127.0.0.1", "port": self._port}
        # Holds the credentials of the demo's servers.
        descriptor = os.open(self._file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            yaml.safe_dump({**settings, "scaling": scaling, "http": http}, file, sort_keys=False)
        self.process.start()
        self.process.wait_until(self._is_ready, START_TIMEOUT_S)

    def stop(self) -> None:
        self.process.stop()

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/ready", timeout=2.0, trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False
