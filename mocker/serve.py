"""`python -m mocker serve`: mock engines as servers, for whoever wants engines and has none.

One process is one node: engines by the wall clock, each with an OpenAI server, a `generate`
endpoint on the request plane and a card in discovery, and the node's stream of block events.
Settings come from a file, the environment (`KVBM_MOCK_`) and `--set`, as the daemon's do. Prints
one line of JSON when requests are answered; SIGTERM and SIGINT end it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mocker.compare import Scene
from mocker.content import Chain, TokenContent
from mocker.daemon import DaemonTiers
from mocker.engine import EngineSettings
from mocker.gauges import Gauges
from mocker.http import HttpServer
from mocker.node import MockNode
from mocker.openai import Answer, OpenAi
from mocker.realtime import RealtimeEngine
from mocker.replay import FleetSettings
from mocker.routing import speed_of
from mocker.text import VOCABULARY
from mocker.tiers import LruTier, NodeTiers
from mocker.tokens import generate
from runtime import telemetry
from runtime.component import Runtime, Serving
from runtime.discovery import Discovery, DiscoverySettings, create_discovery
from runtime.drain import drain_asked
from runtime.engine_card import COMPONENT, ENDPOINT, EngineCard, Role
from runtime.events import EventPlaneSettings, create_event_plane
from runtime.events.node_stream import WorkerSpeed
from runtime.generation import decode_generate
from runtime.hashing import block_hashes
from runtime.requests import RequestContext, RequestPlaneSettings, create_request_plane
from runtime.settings import Settings, SettingsError, load, parse_assignments
from runtime.units import Duration, Size

DRAIN_S: Final = 2.0
DRAIN_QUIET_S: Final = 0.5
PORT_MAX: Final = 65535


class MockSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="KVBM_MOCK_")

    namespace: str = Field(default="default", description="Where the engines are found.")
    node: str = Field(default_factory=socket.gethostname, description="This node's name.")
    model: str = Field(default="mock", description="The model's name in requests.")
    machine: Literal["llama-8b-h100", "llama-70b-4xh100"] = Field(
        default="llama-8b-h100", description="Whose timing the engines have."
    )
    engines: int = Field(default=1, ge=1, le=256, description="How many, each with a port.")
    speedup: float = Field(default=1.0, gt=0, description="Seconds of the engines' in one.")
    block_tokens: int = Field(default=16, ge=1, description="Tokens in a block.")
    context_tokens: int = Field(default=131072, ge=2, description="Prompt and answer at most.")
    role: Role = Field(default="aggregated", description="What the engines say that they do.")
    kv_blocks: int = Field(default=0, ge=0, description="Of each engine; 0: the machine's.")
    g2_gb: float = Field(default=0.0, ge=0, description="Simulated host memory of the node.")
    g3_gb: float = Field(default=0.0, ge=0, description="Simulated SSD of the node.")
    daemon: Path | None = Field(
        default=None, description="Socket of a real daemon to store to, instead of simulated tiers."
    )
    chunk_bytes: Size = Field(default=65536, ge=4096, description="Of a block, at that daemon.")
    host: str = Field(default="127.0.0.1", description="Where the OpenAI servers listen.")
    port: int = Field(
        default=0, ge=0, le=PORT_MAX, description="Of the first; the others follow. 0: free ones."
    )
    drain: Duration = Field(
        default=30.0, ge=0, description="At its end it finishes what it has, for this long."
    )
    discovery: DiscoverySettings = DiscoverySettings()
    requests: RequestPlaneSettings = RequestPlaneSettings()
    events: EventPlaneSettings = EventPlaneSettings()

    def fleet(self) -> FleetSettings:
        scene = Scene(
            self.machine,
            self.engines,
            self.engines,
            self.block_tokens,
            self.g2_gb,
            self.g3_gb,
        )
        fleet = scene.fleet()
        if self.kv_blocks:
            fleet = replace(fleet, engine=replace(fleet.engine, num_blocks=self.kv_blocks))
        return fleet


class MockEngine:
    """One engine and its servers. Use through `serving`."""

    def __init__(
        self, settings: MockSettings, engine: RealtimeEngine, gauges: Gauges, port: int
    ) -> None:
        self.engine = engine
        self.instance = 0  # once it is found
        self._settings = settings
        self._openai = OpenAi(
            engine, settings.model, gauges, context_tokens=settings.context_tokens
        )
        self.http = HttpServer(self._openai, settings.host, port)
        self._serving: Serving | None = None
        self._daemon: DaemonTiers | None = None
        self._fetching: set[asyncio.Task[None]] = set()
        self.waiting = 0  # for chunks of a daemon: requests that the engine does not have yet
        self._heeding: asyncio.Task[None] | None = None

    async def start(self, runtime: Runtime, daemon: DaemonTiers | None) -> Self:
        """Raises OSError where there is no address."""
        if daemon is not None:
            self._daemon = daemon
            self._openai.door = self
        await self.http.start()
        engine = self.engine.engine.settings
        card = EngineCard(
            model=self._settings.model,
            url=self.http.url,
            block_tokens=engine.block_size,
            kv_blocks=engine.num_blocks,
            batch_tokens=engine.max_num_batched_tokens,
            context_tokens=self._settings.context_tokens,
            role=self._settings.role,
        )
        component = runtime.namespace(self._settings.namespace).component(COMPONENT)
        self._serving = await component.endpoint(ENDPOINT).serve(
            self.generate, labels=card.labels()
        )
        self.instance = self._serving.name.id
        self._heeding = asyncio.create_task(self._heed(runtime.discovery), name="drain-asked")
        return self

    async def drain(self, timeout_s: float) -> None:
        """Say that it is stopping, and finish what there is and what is on its way here yet."""
        assert self._serving is not None
        await self._serving.leave()
        loop = asyncio.get_running_loop()
        quiet_s, end_s = loop.time(), loop.time() + timeout_s
        while loop.time() < min(quiet_s + DRAIN_QUIET_S, end_s):
            engine = self.engine.engine
            if engine.waiting_count + engine.running_count + self.waiting:
                quiet_s = loop.time()
            await asyncio.sleep(DRAIN_QUIET_S / 10)

    async def generate(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        """The endpoint's handler."""
        request = decode_generate(payload)
        self.waiting += 1
        try:
            await self._fetch(request.token_ids)
        finally:
            self.waiting -= 1
        async with contextlib.aclosing(generate(self.engine, request)) as items:
            async for item in items:
                yield item

    def begin(self, prompt: Sequence[int], tokens: int, answer: Answer) -> None:
        """The door where chunks are fetched from a daemon first."""
        self.waiting += 1

        async def fetch_and_begin() -> None:
            try:
                await self._fetch(prompt)
            finally:
                self.waiting -= 1
            self._openai.begin(prompt, tokens, answer)

        task = asyncio.create_task(fetch_and_begin(), name="fetch")
        self._fetching.add(task)
        task.add_done_callback(self._fetching.discard)

    async def close(self) -> None:
        await self.http.close()
        tasks = [*self._fetching, *([self._heeding] if self._heeding is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.engine.close()

    async def _heed(self, discovery: Discovery) -> None:
        """Somebody wants it gone: it finishes what it has, and waits for whoever ends it."""
        assert self._serving is not None
        await drain_asked(discovery, self._serving.name)
        await self._serving.leave()

    async def _fetch(self, prompt: Sequence[int]) -> None:
        if self._daemon is None:
            return
        engine = self.engine.engine
        size = engine.settings.block_size
        chain = Chain(TokenContent(prompt, size))
        chain.extend(reusable := (len(prompt) - 1) // size)
        here = len(engine.pool.match(chain.hashes, reusable))
        if here < reusable:
            await self._daemon.fetch(chain.hashes[here:])


@contextlib.asynccontextmanager
async def serving(settings: MockSettings) -> AsyncIterator[list[MockEngine]]:
    """A node of engines that answer, whoever else is there already. Raises OSError."""
    fleet = settings.fleet()
    plane = create_event_plane(settings.events, f"mocker {settings.node}")
    discovery = create_discovery(settings.discovery, os.environ)
    requests = create_request_plane(settings.requests, f"mocker {settings.node}")
    node = MockNode(settings.node, settings.namespace, plane)
    simulated = NodeTiers(
        0,
        fleet.tiers,
        LruTier("G2", fleet.g2_blocks) if fleet.g2_blocks else None,
        LruTier("G3", fleet.g3_blocks) if fleet.g3_blocks else None,
        emit=node.emit,
    )
    engines: list[MockEngine] = []
    async with contextlib.AsyncExitStack() as stack:
        await plane.start()
        stack.push_async_callback(plane.close)
        runtime = Runtime(discovery, requests, drain_timeout_s=DRAIN_S)
        await stack.enter_async_context(runtime)
        for number in range(settings.engines):
            daemon: DaemonTiers | None = None
            if settings.daemon is not None:
                daemon = DaemonTiers(settings.daemon, settings.chunk_bytes, awaits=False)
                await stack.enter_async_context(daemon)
            gauges = Gauges(settings.model)
            engine = RealtimeEngine(
                fleet.engine,
                speedup=settings.speedup,
                index=number,
                tiers=daemon or simulated,
                emit=node.emit,
                on_end=gauges.ended,
                vocabulary=VOCABULARY,
            )
            port = settings.port + number if settings.port else 0
            mock = MockEngine(settings, engine, gauges, port)
            stack.push_async_callback(mock.close)
            engines.append(await mock.start(runtime, daemon))
        workers = {number: one.instance for number, one in enumerate(engines)}
        stack.push_async_callback(node.close)
        await node.start(runtime, workers, _speeds(fleet.engine, settings, list(workers.values())))
        yield engines


def _speeds(
    engine: EngineSettings, settings: MockSettings, workers: Sequence[int]
) -> list[WorkerSpeed]:
    speed = speed_of(engine, FleetSettings(engine).tiers, settings.speedup)
    return [
        WorkerSpeed(
            *(worker, 0, speed.prefill_s_per_token, speed.prefill_s_per_token2),
            speed.load_s_per_block,
            speed.load_latency_s,
        )
        for worker in workers
    ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="mocker serve", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML or TOML file")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", default=[])
    given = parser.parse_args(arguments)
    try:
        overrides = parse_assignments(given.set)
        loaded = load(MockSettings, file=given.config, environ=os.environ, overrides=overrides)
    except SettingsError as error:
        parser.error(str(error))
    telemetry.configure("auto", "info", sys.stderr, os.environ)
    try:
        asyncio.run(_serve(loaded.value))
    except OSError as error:
        sys.stderr.write(f"cannot serve: {error}\n")
        raise SystemExit(1) from None


async def _serve(settings: MockSettings) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    block_hashes(range(16), 16)  # compiled now, not when the first request waits for it
    async with serving(settings) as engines:
        told = [{"instance": f"{one.instance:x}", "url": one.http.url} for one in engines]
        sys.stdout.write(json.dumps({"ready": settings.node, "engines": told}) + "\n")
        sys.stdout.flush()
        await ending.wait()
        await asyncio.gather(*(one.drain(settings.drain) for one in engines))
