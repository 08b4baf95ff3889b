"""Fleets of scripted engines without a router, and a frontend before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import uvicorn

from frontend.app import make_app
from frontend.errors import model_not_found, overloaded
from frontend.exchanges import make_exchanges
from frontend.fleet import Assigned, Job, ModelInfo, Place
from frontend.gate import Gate
from frontend.keep_alive import KeepAlive
from frontend.meter import Meter
from frontend.pages import Pages
from frontend.prompt import PromptMaker
from router.asks import AskRefused
from router.service import NotRouted
from runtime.engines.upstream import Upstream
from tests.runtime.engines.scripted import Engine, Script

MODEL = "test/model"


@dataclass
class Worker:
    instance: int
    url: str
    dp_size: int = 1
    dp_rank: int = 0
    relays: bool = False

    @property
    def transport(self) -> str:
        return self.url


@dataclass
class Given:
    """An assignment that notes what it is told."""

    place: Worker
    prefill: Worker | None = None
    notes: list[str] = field(default_factory=list)
    cached_tokens: int = 32

    def prefilled(self) -> None:
        self.notes.append("prefilled")

    def first_token(self) -> None:
        self.notes.append("first")

    def output(self, tokens: int) -> None:
        self.notes.append(f"output {tokens}")

    def answered(self, tokens: int) -> None:
        self.notes.append(f"answered {tokens}")

    def end(self) -> None:
        self.notes.append("whole")

    def failed(self) -> None:
        self.notes.append("failed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.notes.append("end")


class InTurn:
    """A fleet that takes its engines in order, but those that are excluded."""

    def __init__(self, engines: Sequence[Engine], text: PromptMaker | None = None) -> None:
        self.engines = engines
        self.given: list[Given] = []
        self.jobs: list[Job] = []
        self.dp_size = 1
        self.prefill: Worker | None = None
        self._text = text

    def models(self) -> Sequence[ModelInfo]:
        return [ModelInfo(MODEL, 1, len(self.engines), 4096)] if self.engines else []

    def waits_for(self) -> Mapping[str, str]:
        return {} if self.engines else {"discovery": "nobody was found"}

    def text(self, model: str) -> PromptMaker | None:
        if model != MODEL:
            raise model_not_found(model, [MODEL])
        return self._text

    def takes_tokens(self, model: str) -> bool:
        return False

    def places(self) -> Sequence[Place]:
        return [Worker(engine.instance, engine.url) for engine in self.engines]

    def has_servers(self, model: str) -> bool:
        return False

    async def assign(self, job: Job) -> Assigned:
        self.jobs.append(job)
        for engine in self.engines:
            if engine.instance not in job.excluded and job.pinned in (None, engine.instance):
                place = Worker(engine.instance, engine.url, self.dp_size)
                self.given.append(Given(place, self.prefill))
                return self.given[-1]
        raise overloaded("there is no engine", 1)


class OneLimit:
    """Limits of one model, of which one can be set."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = dict.fromkeys(
            ("blocks_fraction", "prefill_tokens", "prefill_fraction")
        )

    def busy_threshold(self, model: str | None = None) -> dict[str, Any]:
        if model not in (None, MODEL):
            raise NotRouted("unknown-model", f"no engine serves {model!r}")
        return {"models": [{"model": MODEL, **self.found}]}

    def set_busy_threshold(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        told = self.busy_threshold(asked.get("model"))
        if not 0 < asked.get("active_decode_blocks_threshold", 1) <= 1:
            raise AskRefused("blocks_fraction must be in (0, 1]")
        self.found["blocks_fraction"] = asked.get("active_decode_blocks_threshold")
        return self.busy_threshold(told["models"][0]["model"])


@dataclass
class Running:
    """A frontend that listens, and its parts."""

    url: str
    fleet: InTurn
    gate: Gate
    meter: Meter

    def outcomes(self) -> dict[str, float]:
        return {
            sample.labels["outcome"]: sample.value
            for metric in self.meter.requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def frontend(
    *scripts: Script,
    gate: Gate | None = None,
    text: PromptMaker | None = None,
    silence_s: float = 30.0,
    cors_origins: Sequence[str] = (),
    keep_alive_s: float = 0.0,
    engine_key: str | None = None,
    **given: Any,
) -> AsyncIterator[Running]:
    """With one engine for each script; `given` goes to `make_exchanges`."""
    engines = [Engine(number, script) for number, script in enumerate(scripts, 1)]
    for engine in engines:
        await engine.start()
    fleet, meter, upstream = InTurn(engines, text), Meter(), Upstream(silence_s, engine_key)
    gate = gate or Gate((), 64, 1 << 20)
    await upstream.open()
    given = {"migrations_max": 1, "keep_alive": KeepAlive(keep_alive_s), **given}
    exchanges = make_exchanges(fleet, gate, meter, upstream, **given)
    app = make_app(exchanges, Pages(fleet, gate, meter, OneLimit()), cors_origins)
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", access_log=False)
    server = _Server(config)
    task = asyncio.ensure_future(server.serve())
    while not server.started:
        assert not task.done(), task
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", fleet, gate, meter)
    finally:
        server.should_exit = True
        for engine in engines:
            await engine.stop()
        await task
        await upstream.close()
