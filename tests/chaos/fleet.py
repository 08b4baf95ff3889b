"""A fleet without vLLM, each of its programs killed and started again at will.

Real NATS, discovery, daemon, router and frontend; mock engines, whose answers follow from their
prompts. Models in `RELAYED` have requests passed through to their engines, those in `MADE` are
given tokens. Every engine is a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import httpx
import yaml
from tokenizers import Tokenizer, decoders, models

from mocker.text import TEXTS
from runtime.discovery import DiscoverySettings
from runtime.embedded import EmbeddedNats
from runtime.embedded_etcd import EmbeddedEtcd
from runtime.server_process import free_ports
from tests.plain_http import PLAIN

ROOT = Path(__file__).parents[2]
RELAYED, MADE = "relayed", "made"
MODELS = (RELAYED, MADE)
ENGINES = 2  # of each model: one may be away
BLOCK_TOKENS = 16
TTL_S = 4.0
WAIT_S = 240.0  # for anything: the machine may be busy, and a fresh checkout compiles kernels


class Server(Protocol):
    """`EmbeddedNats`, `EmbeddedEtcd`."""

    @property
    def pid(self) -> int | None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...


@dataclass
class Program:
    """`away` has when it was killed and when it was back, by the clock; None: it is not yet."""

    name: str
    away: list[tuple[float, float | None]] = field(default_factory=list, init=False)

    def start(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        raise NotImplementedError

    def was_killed(self) -> None:
        self.away.append((time.monotonic(), None))

    def is_back(self) -> None:
        """It does its work again."""
        if self.away and self.away[-1][1] is None:
            self.away[-1] = self.away[-1][0], time.monotonic()

    def was_away(self, began_s: float, ended_s: float) -> bool:
        """At some time of these."""
        return any(
            killed_s <= ended_s and (back_s is None or began_s <= back_s)
            for killed_s, back_s in self.away
        )


class Broker(Program):
    def __init__(self, name: str, server: Server) -> None:
        super().__init__(name)
        self._server = server

    def start(self) -> None:
        # In the event loop's thread: the server ends with the thread that started it.
        self._server.start()
        self.is_back()

    def kill(self) -> None:
        assert self._server.pid is not None
        self.was_killed()
        os.kill(self._server.pid, signal.SIGKILL)
        self._server.stop()


class Process(Program):
    """One of ours; its log is one file over all its lives."""

    def __init__(self, name: str, folder: Path, module: str, settings: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.log = folder / f"{name}.log"
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(_nested(settings)))
        self._command = [sys.executable, "-m", module, "serve", "--config", str(config)]
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._child is None, f"{self.name} runs already"
        environ = {name: value for name, value in os.environ.items() if name[:5] != "KVBM_"}
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command, cwd=ROOT, env=environ, stdout=log, stderr=log
            )

    def check(self) -> None:
        """Nothing makes it end by itself."""
        if self._child is None:
            return
        status = self._child.poll()
        assert status is None, f"{self.name} ended with {status}\n{self.tail()}"

    def kill(self) -> None:
        self.check()
        self.was_killed()
        self.end()

    def end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()

    def tail(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-40:])


class Engine(Process):
    """A node of one mock engine. `lives` are its instances, with when each was killed."""

    def __init__(self, model: str, number: int, folder: Path, settings: Mapping[str, Any]) -> None:
        given = {**settings, "node": f"{model}-{number}", "model": model}
        super().__init__(f"{model}-{number}", folder, "mocker", given)
        self.model = model
        self.lives: dict[str, float | None] = {}

    @property
    def instance(self) -> str | None:
        """Of the life that it lives, once it has begun."""
        self._read()
        last = next(reversed(self.lives), None)
        return last if last is not None and self.lives[last] is None else None

    @property
    def worker(self) -> str:
        return f"{self.instance}.0"

    def kill(self) -> None:
        self._read()
        super().kill()
        for instance, killed_s in self.lives.items():
            if killed_s is None:
                self.lives[instance] = self.away[-1][0]

    def _read(self) -> None:
        for line in self.log.read_text(errors="replace").splitlines() if self.log.exists() else ():
            if line.startswith('{"ready"'):
                self.lives.setdefault(json.loads(line)["engines"][0]["instance"], None)


class Fleet:
    """An asynchronous context manager: nothing is started on entering, all is ended on leaving."""

    def __init__(self, folder: Path, *, etcd: bool = False) -> None:
        self.folder = folder
        self._run = Path(tempfile.mkdtemp(prefix="kvbm-fleet-"))  # a socket's path is short
        nats_port, etcd_port, *ports = free_ports(6)
        self.nats = EmbeddedNats(folder / "nats", port=nats_port)
        self.frontend_url, self.operators_url, self.router_url, self.daemon_url = (
            f"http://127.0.0.1:{port}" for port in ports
        )
        self.discovery = DiscoverySettings(
            discovery="etcd" if etcd else "file",
            ttl=TTL_S,
            file_directory=folder / "found",
            file_poll=0.1,
            etcd_url=f"http://127.0.0.1:{etcd_port}",
        )
        shared = self._shared()
        self.frontend = Process("frontend", folder, "frontend", self._frontend(shared, ports))
        self.router = Process("router", folder, "router", self._router(shared, ports))
        self.daemon = Process("daemon", folder, "kvbm.daemon", self._daemon(shared, ports))
        self.engines = [
            Engine(model, number, folder, self._engine(shared))
            for model in MODELS
            for number in range(ENGINES)
        ]
        brokers = [Broker("nats", self.nats)]
        if etcd:
            server = EmbeddedEtcd(folder / "etcd", port=etcd_port)
            brokers.append(Broker("etcd", server))
        self.processes: list[Process] = [self.frontend, self.router, self.daemon, *self.engines]
        self.programs: list[Program] = [*brokers, *self.processes]
        self._servers: list[Server] = [broker._server for broker in brokers]
        self.http = httpx.AsyncClient(timeout=30.0, verify=PLAIN)
        self._watching: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        (self.folder / "nats").mkdir()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self.http.aclose()
        for process in self.processes:
            process.end()
        for server in self._servers:
            server.stop()
        shutil.rmtree(self._run, ignore_errors=True)

    async def get(self, url: str) -> Any:
        """Raises httpx.HTTPError where there is no good answer."""
        return (await self.http.get(url)).raise_for_status().json()

    async def until(self, what: str, true: Any) -> None:
        """Raises AssertionError with all logs' ends; processes must not end meanwhile."""
        said = ""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    for process in self.processes:
                        process.check()
                    try:
                        said = await true()
                    except (httpx.HTTPError, ValueError) as error:
                        said = repr(error)
                    if not said:
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            logs = "\n".join(f"--- {one.name}\n{one.tail()}" for one in self.processes)
            raise AssertionError(f"not within {WAIT_S:g} s: {what}: {said}\n{logs}") from None

    def watch(self, started: Sequence[Program]) -> None:
        """Note when those of them that answer requests do so again."""
        for program, url in ((self.frontend, self.operators_url), (self.router, self.router_url)):
            if program in started:
                task = asyncio.create_task(self._note_back(program, url))
                self._watching.append(task)

    async def _note_back(self, program: Program, url: str) -> None:
        async def answers() -> str:
            models = {m["model"] for m in (await self.get(f"{url}/v1/workers"))["models"]}
            if program is self.frontend:
                models &= (await self.get(f"{self.frontend_url}/health"))["engines"].keys()
            return "" if models == set(MODELS) else f"{program.name} has {models}"

        await self.until(f"{program.name} answers again", answers)
        program.is_back()

    async def serves(self) -> str:
        """Empty once the frontend and the router have all engines; else what is missing."""
        for url in (self.operators_url, self.router_url):
            told = await self.get(f"{url}/v1/workers")
            found = {
                worker["worker"]
                for model in told["models"]
                for worker in model["workers"]
                if worker["state"] == "serving"
            }
            wanted = {engine.worker for engine in self.engines}
            if found != wanted:
                return f"{url} has {sorted(found)}, not {sorted(wanted)}"
            ready = await self.http.get(f"{url}/ready")
            if ready.status_code != 200:
                return ready.text
        if (await self.http.get(f"{self.daemon_url}/readyz")).status_code != 200:
            return "the daemon is not ready"
        health = await self.http.get(f"{self.frontend_url}/health")
        return "" if health.status_code == 200 else health.text

    async def serves_without(self, engine: Engine) -> str:
        """Empty if the frontend has another engine of this one's model, so that it may go."""
        told = await self.get(f"{self.operators_url}/v1/workers")
        others = {one.worker for one in self.engines if one.model == engine.model} - {engine.worker}
        found = {w["worker"] for m in told["models"] for w in m["workers"]}
        return "" if others & found else f"only {sorted(found)}"

    # -- settings --------------------------------------------------------------------------

    def _shared(self) -> dict[str, Any]:
        found = self.discovery.model_dump(exclude_unset=True)
        return {
            **{f"discovery.{key}": value for key, value in found.items()},
            "events.plane": "nats",
            "events.nats_url": f"nats://127.0.0.1:{self.nats.port}",
            "events.nats_user": self.nats.user,
            "events.nats_password": self.nats.password,
        }

    def _router(self, shared: Mapping[str, Any], ports: list[int]) -> dict[str, Any]:
        return {
            **shared,
            "http.port": ports[2],
            "name": "router",
            "index.capacity": 100_000,
            "replicas.silence": "2s",
        }

    def _frontend(self, shared: Mapping[str, Any], ports: list[int]) -> dict[str, Any]:
        return {
            **self._router(shared, ports),
            "name": "frontend",
            "http.port": ports[1],
            "openai.port": ports[0],
            "openai.migrations": 3,
            "tokens_for": [MADE],
            f"model_paths.{MADE}": written_tokenizer(self.folder / "made"),
        }

    def _daemon(self, shared: Mapping[str, Any], ports: list[int]) -> dict[str, Any]:
        return {
            **shared,
            "socket": self._run / "s",
            "node": "daemon",
            "dram.capacity": "32MiB",
            "ssd.path": self.folder / "ssd",
            "ssd.capacity": "128MiB",
            "admin.port": ports[3],
        }

    def _engine(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **shared,
            "block_tokens": BLOCK_TOKENS,
            "kv_blocks": 384,  # the prompts do not all fit
            "context_tokens": 4096,
            "daemon": self._run / "s",
            "chunk_bytes": "16KiB",
        }


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = str(value) if isinstance(value, Path) else value
    return found


def written_tokenizer(folder: Path) -> Path:
    """Of the mock engines' tokens: each one's text is one word of it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {text.decode(): number for number, text in enumerate(TEXTS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=TEXTS[0].decode()))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
