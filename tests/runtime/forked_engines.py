"""Engines that only publish events, with vLLM's own class: the side that tells them what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WAIT_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


class Engines:
    """A process that forks engines with vLLM's publisher class."""

    def __init__(self) -> None:
        # As a module: beside the script this folder's `requests` would hide the library.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.engine_publisher"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        self._ready = False

    def do(self, do: str, **other: Any) -> None:
        assert self._process.stdin is not None
        if not self._ready:
            self._answer()
            self._ready = True
        self._process.stdin.write(json.dumps({"do": do, **other}) + "\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()  # vLLM's own leaving takes seconds; the engines are gone
        self._process.wait(WAIT_S)
        self._process.stdin.close()
        self._process.stdout.close()

    def _answer(self) -> None:
        """Other lines are what libraries print."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() in {'"ready"', '"done"'}:
                return
        raise AssertionError("the publisher ended")


class Engine:
    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def start(self, ports: tuple[int, int], rank: int = 0, **options: Any) -> None:
        endpoints = {
            "endpoint": f"tcp://*:{ports[0]}",
            "replay_endpoint": f"tcp://*:{ports[1]}",
        }
        self.do("start", rank=rank, options={**endpoints, **options})

    def publish(self, first: int, end: int, **other: Any) -> None:
        self.do("publish", numbers=[first, end], **other)

    def do(self, do: str, **other: Any) -> None:
        self._engines.do(do, engine="one", **other)
