"""Everything the demo runs: NATS, S3, a daemon, two engines and a frontend, ended together.

A context manager: whatever happens within, nothing of it is left running. All it writes is under
one build folder, so one runs at a time. Programs that a killed run left behind are ended first.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from examples.demo.daemon import Daemon, DaemonConfig
from examples.demo.engine import Engine, EngineConfig
from examples.demo.frontend import Frontend, FrontendConfig
from examples.demo.planner import Planner, settings_of
from examples.demo.process import ProcessError, end_recorded, free_port, recorded, write_record
from runtime.embedded import EmbeddedNats, EmbeddedS3

HOLDER = "holder.pid"  # the record of the program that runs a stack
ENGINE_NAMES = ("engine-a", "engine-b")
BUCKET = "kvbm-demo"
CONNECT_TIMEOUT_S = 60.0

Say = Callable[[str], None]


class Stack:
    """All of it; `settle` and `restart_daemon` for measurements."""

    nats: EmbeddedNats
    daemon: Daemon
    frontend: Frontend
    engines: tuple[Engine, Engine]

    def __init__(
        self,
        build: Path,
        model: str,
        say: Say,
        *,
        block_tokens: int = 32,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        more_engines: int = 0,
    ) -> None:
        """`arguments` and `environment`: more of vLLM's for the engines. With `more_engines` a
        planner starts that many beside the two while the load asks for it."""
        self.model = model
        self._arguments = tuple(arguments)
        self._environment = tuple((environment or {}).items())
        self.block_tokens = block_tokens
        self._more_engines = more_engines
        self.planner: Planner | None = None
        self.records = build / "run"
        self._build = build
        self._folder = build / "demo"
        self.discovery_folder = self._folder / "discovery"
        self._logs = build / "logs"
        self._say = say
        self._running = ExitStack()

    def __enter__(self) -> Self:
        holder = self.records / HOLDER
        if (pid := recorded(holder)) is not None:
            raise ProcessError(f"a stack is running already, pid {pid}; end it with `make down`")
        for name in end_recorded(self.records):
            self._say(f"ended {name}, which an earlier run had left")
        write_record(holder, os.getpid())
        self._running.callback(holder.unlink, missing_ok=True)
        try:
            self._start()
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def addresses(self) -> Mapping[str, str]:
        """What a user may want to open or to connect to."""
        engines = {engine.name: f"{engine.url}/v1" for engine in self.engines}
        return {
            "openai": f"{self.frontend.url}/v1",
            "router": self.frontend.operators,
            **engines,
            "kvbm-daemon": self.daemon.url,
            **({"planner": self.planner.url} if self.planner is not None else {}),
            "socket": str(self.daemon.socket),
            "nats": self.nats.url,
            "s3": f"{self._s3.endpoint_url}/{BUCKET}",
            "settings": str(self._folder / "kvbm.yaml"),
            "logs": str(self._logs),
        }

    def engine_names(self) -> Mapping[str, str]:
        """By worker, as routers name it."""
        return {f"{engine.instance:x}.0": engine.name for engine in self.engines}

    def settle(self) -> None:
        """Wait until what the engines have stored has reached every tier."""
        self.daemon.settle()

    def restart_daemon(self, *, empty_ssd: bool) -> None:
        """End the daemon, which forgets host memory, start it, and wait for the engines."""
        self.daemon.stop()
        if empty_ssd:
            self.daemon.empty_ssd()
        took_s = self.daemon.start()
        self.wait_connected()
        self._say(f"kvbm-daemon was ready after {took_s:.1f} s, it keeps {self._kept()}")

    def check(self) -> None:
        """Raises ProcessError if any of it has ended on its own."""
        self.daemon.process.check()
        self.frontend.process.check()
        if self.planner is not None:
            self.planner.process.check()
        for engine in self.engines:
            engine.process.check()

    def _start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._say("starting NATS and S3")
        servers = self._running
        self.nats = servers.enter_context(
            # On a fixed port: whoever starts it again finds its clients waiting there.
            EmbeddedNats(self._folder / "nats", port=free_port(), log_directory=self._logs)
        )
        self._s3 = servers.enter_context(
            EmbeddedS3(self._folder / "s3", buckets=[BUCKET], log_directory=self._logs)
        )
        # A socket's path must be short, which a checkout's need not be.
        socket_folder = servers.enter_context(tempfile.TemporaryDirectory(prefix="kvbm-demo-"))
        self.daemon = Daemon(self._daemon_config(Path(socket_folder) / "kvbm.sock"))
        servers.callback(self.daemon.process.stop)
        self._say("starting kvbm-daemon")
        self.daemon.start()
        planner: Planner | None = None
        if self._more_engines:
            planner = Planner(self._folder, self._logs, self.records)
        self.frontend = self.make_frontend(planner=planner.url if planner else None)
        servers.callback(self.frontend.stop)
        self.frontend.start()
        self._start_engines()
        if planner is not None:
            self._start_planner(planner)

    def _start_planner(self, planner: Planner) -> None:
        given = settings_of(
            *(self.engines[0].config, self.frontend.url, self._logs),
            *(self.events(), self.discovery()),
        )
        least = len(self.engines)
        self._say(f"starting kvbm-planner, for {least} to {least + self._more_engines} engines")
        self._running.callback(planner.stop)
        planner.start(given, least=least, most=least + self._more_engines)
        self.planner = planner

    def _start_engines(self) -> None:
        config = EngineConfig(
            self.model,
            node_settings=self.daemon.settings,
            block_tokens=self.block_tokens,
            arguments=self._arguments,
            environment=self._environment,
        )
        first, second = (
            Engine(name, config, logs=self._logs, records=self.records) for name in ENGINE_NAMES
        )
        self.engines = (first, second)
        # Side by side: a start is mostly imports, which use one core each.
        for engine in self.engines:
            self._running.callback(engine.stop)
            engine.start()
        self._say("starting kvbm-frontend and two engines, a minute or two on a small machine")
        start_s = time.monotonic()
        self.frontend.wait_live()
        for engine in self.engines:
            engine.wait_ready()
            self._say(f"{engine.name} is ready after {time.monotonic() - start_s:.0f} s")
        self.wait_connected()

    def wait_connected(self) -> None:
        """Until the daemon and the frontend have both engines, and the router knows their KV."""
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        while not self._is_connected():
            self.check()
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"after {CONNECT_TIMEOUT_S:.0f} s kvbm-daemon had {self.daemon.engines()} of "
                    f"{len(self.engines)} engines, kvbm-frontend {self.frontend.engines()}"
                )
            time.sleep(0.1)

    def _is_connected(self) -> bool:
        wanted = len(self.engines)
        return (
            self.daemon.engines() == wanted
            and self.frontend.engines() == wanted
            and self.frontend.knows_tokens()
            and self.frontend.is_exact()
        )

    def _daemon_config(self, socket: Path) -> DaemonConfig:
        return DaemonConfig(
            folder=self._folder,
            socket=socket,
            logs=self._logs,
            records=self.records,
            s3={
                **self._s3.settings(BUCKET),
                "linger": "250ms",
            },
            events=self.events(),
            discovery=self.discovery(),
        )

    def make_frontend(self, **more: Any) -> Frontend:
        """One that is not started yet; `more` of FrontendConfig's fields."""
        return Frontend(
            FrontendConfig(
                folder=self._folder,
                logs=self._logs,
                records=self.records,
                events=self.events(),
                discovery=self.discovery(),
                **more,
            )
        )

    def events(self) -> Mapping[str, str]:
        return {
            "plane": "nats",
            "nats_url": self.nats.url,
            "nats_user": self.nats.user,
            "nats_password": self.nats.password,
        }

    def discovery(self) -> Mapping[str, str]:
        return {"discovery": "file", "file_directory": str(self.discovery_folder)}

    def _kept(self) -> str:
        return ", ".join(f"{tier}: {n} chunks" for tier, n in self.daemon.kept_chunks().items())
