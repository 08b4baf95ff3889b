"""`kvbm engine` as programs, the fake engine they launch or find, and their discovery."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx2

from runtime.discovery.file import FileStore
from runtime.instances import InstanceRecord
from runtime.names import component_prefix
from runtime.server_process import free_ports
from tests.kvbm import fake_engine
from tests.plain_http import PLAIN
from tests.waiting import wait_until

WAIT_S = 60.0
FAKE = f"{sys.executable} -m tests.kvbm.fake_engine"
TTL_S = 2.0
ROOT = Path(__file__).parents[2]
QUICK = {
    "engine.health_interval": "50ms",
    "engine.unhealthy_after": "2",
    "engine.canary_interval": "0",
    "engine.drain_quiet": "200ms",
    "engine.drain_timeout": "30s",
    "engine.stop_timeout": "20s",
    "discovery.ttl": f"{TTL_S}s",
    "discovery.file_poll": "50ms",
}


class Place:
    """A discovery directory, and who is in it."""

    def __init__(self, folder: Path) -> None:
        self.directory = folder / "discovery"
        self.folder = folder

    async def _list(self, namespace: str) -> dict[str, bytes]:
        store = FileStore(self.directory, 1.0)
        try:
            return await store.list(component_prefix(namespace))
        finally:
            await store.close()

    def records(self, namespace: str = "default") -> list[InstanceRecord]:
        found = asyncio.run(self._list(namespace))
        return [InstanceRecord.decode(key, value) for key, value in found.items()]

    def states(self, namespace: str = "default") -> list[str]:
        return [record.state.value for record in self.records(namespace)]

    def wait_for(self, *states: str, namespace: str = "default") -> list[InstanceRecord]:
        wanted = sorted(states)
        wait_until(
            lambda: sorted(self.states(namespace)) == wanted,
            WAIT_S,
            f"{wanted} in discovery, which has {self.states(namespace)}",
        )
        return self.records(namespace)


class FakeEngine:
    """A client of a running fake."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def told(self) -> dict[str, Any]:
        answer = httpx2.get(f"{self.url}/control", timeout=WAIT_S, trust_env=False, verify=PLAIN)
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    def do(self, **what: Any) -> None:
        try:
            httpx2.post(
                f"{self.url}/control", json=what, timeout=WAIT_S, trust_env=False, verify=PLAIN
            )
        except httpx2.TransportError:
            assert "exit" in what

    @property
    def is_there(self) -> bool:
        try:
            self.told()
        except httpx2.TransportError:
            return False
        return True


class Program:
    """A process with its output in files; killed at the end of the block."""

    def __init__(
        self, folder: Path, command: list[str], environ: Mapping[str, str] | None = None
    ) -> None:
        self.out = folder / f"{len(list(folder.iterdir()))}.out"
        self.err = self.out.with_suffix(".err")
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, cwd=ROOT, env={**os.environ, **(environ or {})}
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Of its log."""
        lines = [line for line in self.err.read_text().splitlines() if line.startswith("{")]
        return [event for line in lines if (event := json.loads(line))["event"] == name]


def settings(place: Place, **more: str) -> list[str]:
    """As options. Names have __ for the dot."""
    given = {
        **QUICK,
        "discovery.file_directory": str(place.directory),
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return [word for name, value in given.items() for word in ("--set", f"{name}={value}")]


def launcher(
    place: Place,
    *arguments: str,
    options: list[str] | None = None,
    state: Mapping[str, Any] | None = None,
    **more: str,
) -> tuple[Program, FakeEngine]:
    """`kvbm engine vllm` with the fake for vLLM, on a port of its own and first in this state."""
    [port] = free_ports(1)
    kvbm = [sys.executable, "-m", "kvbm.cli", "engine", "vllm", *settings(place, **more)]
    kvbm += ["--program", FAKE, "--host", "127.0.0.1", *(options or [])]
    words = arguments or ("a-model",)
    environ = {fake_engine.VARIABLE: json.dumps(state or {})}
    program = Program(place.folder, [*kvbm, "--", *words, "--port", str(port)], environ)
    return program, FakeEngine(port)


def attached(place: Place, url: str, *options: str, **more: str) -> Program:
    command = [sys.executable, "-m", "kvbm.cli", "engine", "attach", url, *settings(place, **more)]
    return Program(place.folder, [*command, *options])
