"""Engines in discovery that are only records, and routers in this process that find them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

import httpx2
import numpy as np

from router.app import create_app
from router.assembly import Assembly, running
from router.component import serve_component
from router.index import Tier, WorkerId
from router.metrics import RouterMetrics
from router.service import RouterService
from router.settings import RouterSettings
from runtime.discovery import Discovery, DiscoverySettings, create_discovery
from runtime.discovery.memory import MemoryStore
from runtime.engine_card import COMPONENT, ENDPOINT, EngineCard
from runtime.hashing import block_hashes, sequence_hashes
from runtime.instances import Registration
from runtime.lifecycle import Lifecycle, State
from runtime.names import EndpointName, InstanceName
from runtime.web.server import WebServer
from tests.plain_http import PLAIN
from tests.runtime.planes import until

MODEL = "m"
BLOCK = 16
PLACE = EndpointName("default", COMPONENT, ENDPOINT)


def card(**fields: Any) -> EngineCard:
    known: dict[str, Any] = {
        "model": MODEL,
        "url": "http://engine:8000",
        "block_tokens": BLOCK,
        "kv_blocks": 1000,
        "batch_tokens": 1000,
    }
    return EngineCard(**{**known, **fields})


class Engines:
    """Their records; each call is another engine."""

    def __init__(self, discovery: Discovery) -> None:
        self.discovery = discovery
        self.records: dict[int, Registration] = {}

    async def add(self, instance: int, labels: dict[str, str] | None = None, **fields: Any) -> None:
        record = Registration(
            self.discovery,
            InstanceName(PLACE, instance),
            Lifecycle(),
            f"tcp://engine:{instance}",
            {**card(**fields).labels(), **(labels or {})},
        )
        self.records[instance] = record
        await record.register()
        await record.move(State.RUNNING)

    async def well(self, instance: int, *, is_well: bool = True) -> None:
        """Its health check has passed, or does no more."""
        await self.records[instance].move(State.HEALTHY if is_well else State.RUNNING)

    async def drain(self, instance: int) -> None:
        await self.records[instance].move(State.STOPPING)

    async def remove(self, instance: int) -> None:
        await self.records.pop(instance).deregister()


class Routing:
    """A router with its API."""

    def __init__(self, service: RouterService, client: httpx2.AsyncClient) -> None:
        self.service = service
        self.assembly: Assembly = service.assembly
        self.client = client

    async def see(self, *workers: str) -> None:
        """These workers and no others take requests."""
        await until(lambda: self.serving() == set(workers))

    def serving(self) -> set[str]:
        return {
            str(worker.id)
            for model in self.assembly.models.values()
            for pool in model.pools.values()
            for worker in pool.workers
            if worker.accepting
        }

    def store(self, worker: str, tokens: list[int], blocks: int, tier: Tier = Tier.G1) -> None:
        instance, _, rank = worker.partition(".")
        local = block_hashes(np.array(tokens, dtype=np.uint32), BLOCK)[:blocks]
        self.assembly.index.stored(
            WorkerId(int(instance, 16), int(rank)), tier, None, sequence_hashes(local), local
        )

    async def post(self, path: str, **body: Any) -> httpx2.Response:
        return await self.client.post(path, json=body)

    async def route(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        answer = await self.post("/v1/route", tokens=tokens, **more)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def explain(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        """Where the prompt would be decoded."""
        answer = await self.post("/v1/route/explain", tokens=tokens, **more)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["decode"])

    async def until(self, true: Callable[[dict[str, Any]], bool]) -> None:
        """Of what is explained of any prompt."""
        async with asyncio.timeout(60):
            while not true(await self.explain([1])):
                await asyncio.sleep(0.02)

    async def speeds(self, tokens: list[int], model: str = MODEL) -> dict[str, dict[str, Any]]:
        """By worker."""
        told = await self.explain(tokens, model=model)
        return {one["worker"]: one["speed"] for one in told["candidates"]}

    async def load(self, worker: str) -> dict[str, float]:
        models = (await self.client.get("/v1/workers")).json()["models"]
        [found] = [w["load"] for model in models for w in model["workers"] if w["worker"] == worker]
        return dict(found)

    def at_rest(self) -> bool:
        for model in self.assembly.models.values():
            for pool in model.pools.values():
                pool.active.check_integrity()
                pool.workers.check_integrity()
                assert not len(pool.active), (model.name, pool.name, len(pool.active))
        return not len(self.assembly.reservations)


class World:
    def __init__(self, store: MemoryStore, engines: Engines, stack: AsyncExitStack) -> None:
        self.store = store
        self.engines = engines
        self._stack = stack

    @classmethod
    @asynccontextmanager
    async def begin(cls) -> AsyncIterator[Self]:
        store = MemoryStore()
        discovery = create_discovery(DiscoverySettings(discovery="memory"), {}, store)
        await discovery.start()
        async with AsyncExitStack() as stack:
            yield cls(store, Engines(discovery), stack)
        await discovery.close()

    async def router(self, **overrides: Any) -> Routing:
        """Settings by their dotted keys, with `__` for dots."""
        settings = RouterSettings.load(
            environ={},
            overrides={
                "discovery.discovery": "memory",
                "requests.plane": "memory",
                "http.port": 0,
                "index.capacity": 10_000,
                "index.routes_capacity": 10_000,
                **{key.replace("__", "."): value for key, value in overrides.items()},
            },
        ).value
        metrics = RouterMetrics("1.2.3", settings.name)
        assembly = await self._stack.enter_async_context(running(settings, {}, metrics, self.store))
        service = RouterService(assembly)
        server = WebServer(create_app(service), "127.0.0.1", 0, section="http")
        await server.start()
        self._stack.push_async_callback(server.stop)
        await serve_component(service)
        token = settings.http.token_text
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        client = httpx2.AsyncClient(
            base_url=server.url, headers=headers, timeout=30.0, verify=PLAIN
        )
        await self._stack.enter_async_context(client)
        await until(lambda: assembly.fleet.is_synced)
        return Routing(service, client)


async def soon(work: Any) -> Any:
    async with asyncio.timeout(60):
        return await work
