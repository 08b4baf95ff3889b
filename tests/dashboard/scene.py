"""A fleet small enough for a page's test: NATS, a daemon, two mock engines over it, a frontend, and
a planner that only watches."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from kvbm.cli.temporary import TemporaryDaemon
from runtime.embedded import EmbeddedNats
from runtime.server_process import free_ports
from tests.plain_http import PLAIN
from tests.waiting import wait_until

START_S = 240.0  # a fresh checkout compiles its kernels first
MODEL = "mock"
CHAT_TOKENS = 512
PROFILE = {"prefill": [[512, 0.8], [1024, 1.6]], "decode": [[1, 1000, 0.01], [64, 64000, 0.02]]}
"""Engines of which the load would need more than there are, also that of a busy machine."""


@dataclass(frozen=True)
class Scene:
    node: str  # the daemon's admin API
    fleet: str  # the frontend's, for operators
    openai: str


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        nats = stack.enter_context(EmbeddedNats(folder / "nats"))
        events = {
            "events.plane": "nats",
            "events.nats_url": nats.url,
            "events.nats_user": nats.user,
            "discovery.file_directory": folder / "found",
            "discovery.file_poll": "50ms",
        }
        tiers = {"dram.capacity": "16MiB", "ssd.path": folder / "ssd", "ssd.capacity": "64MiB"}
        daemon = stack.enter_context(TemporaryDaemon(folder, {**tiers, "node": "node-1"}))
        engines = {
            **events,
            "engines": 2,
            "kv_blocks": 256,
            "speedup": 20,
            "daemon": daemon.socket,
            "chunk_bytes": "16KiB",
        }
        password = {"KVBM_MOCK_EVENTS__NATS_PASSWORD": nats.password}
        stack.enter_context(_program(folder, "mocker", engines, password))
        port, operators, planner = free_ports(3)
        given = {
            **events,
            "openai.port": port,
            "http.port": operators,
            "index.capacity": 100_000,
            "dashboard.planner": f"http://127.0.0.1:{planner}",
        }
        password = {"KVBM_FRONTEND_EVENTS__NATS_PASSWORD": nats.password}
        stack.enter_context(_program(folder, "frontend", given, password))
        profile = folder / "profile.json"
        profile.write_text(json.dumps(PROFILE))
        plans = {
            "http.port": planner,
            "discovery.file_directory": folder / "found",
            "observe.frontends": f"http://127.0.0.1:{port}",
            "perf.profile": profile,
            "scaling.load_adjustment_interval": "500ms",
            "scaling.start_delay": "1s",
            "forecast.throughput_adjustment_interval": "500ms",
            "forecast.load_predictor": "ewma",
        }
        stack.enter_context(_program(folder, "planner", plans, {}))
        made = Scene(daemon.client.url, f"http://127.0.0.1:{operators}", f"http://127.0.0.1:{port}")
        wait_until(lambda: _serves(made.openai, 2), START_S, (folder / "frontend.log").read_text())
        yield made


@contextmanager
def load(scene: Scene) -> Iterator[None]:
    """Conversations that begin alike, until the context ends."""
    dice = random.Random(1)
    shared = [[dice.randrange(1000) for _ in range(CHAT_TOKENS)] for _ in range(3)]
    is_over = threading.Event()

    def run() -> None:
        with httpx2.Client(
            base_url=scene.openai, timeout=30.0, trust_env=False, verify=PLAIN
        ) as client:
            while not is_over.is_set():
                prompt = dice.choice(shared) + [dice.randrange(1000) for _ in range(CHAT_TOKENS)]
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "stream": True}
                client.post("/v1/completions", json=body).raise_for_status()
                time.sleep(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def _program(
    folder: Path, name: str, given: Mapping[str, object], more: Mapping[str, str]
) -> Iterator[None]:
    options = [part for key, to in given.items() for part in ("--set", f"{key}={to}")]
    environ = {name: value for name, value in os.environ.items() if name[:5] != "KVBM_"}
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", name, "serve", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ | dict(more),
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def _serves(url: str, engines: int) -> bool:
    try:
        answer = httpx2.get(f"{url}/health", trust_env=False, verify=PLAIN)
    except httpx2.TransportError:
        return False
    found = json.loads(answer.text).get("engines", {})
    return bool(found.get(MODEL) == engines)
