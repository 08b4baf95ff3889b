"""Routers as their operators run them: processes that find engines, nodes and each other."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from runtime.discovery import DiscoverySettings, create_discovery
from runtime.embedded import EmbeddedNats
from runtime.server_process import free_ports
from tests.plain_http import PLAIN
from tests.router.service.world import MODEL, Engines

WAIT_S = 240.0  # a fresh checkout compiles its kernels first
PROMPT = list(range(100, 420))
ROOT = Path(__file__).parents[3]


class Process:
    """One router; its client, and its end."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        port = free_ports(1)[0]
        given = {"name": name, "http.port": port, "index.capacity": 10_000, **settings}
        command = [sys.executable, "-m", "router", "serve"]
        for key, value in given.items():
            command += ["--set", f"{key}={value}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)
        self.client = httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=30.0, verify=PLAIN
        )

    async def get(self, path: str) -> Any:
        return (await self.client.get(path)).json()

    async def post(self, path: str, **body: Any) -> httpx2.Response:
        return await self.client.post(path, json=body)

    async def route(self, **more: Any) -> dict[str, Any]:
        answer = await self.post("/v1/route", tokens=PROMPT, **more)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def until(self, what: str, true: Any) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while not await self._asked(true):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"{self.name}: not within {WAIT_S} s: {what}\n{self.log.read_text()}")

    async def _asked(self, true: Any) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return bool(await true())
        except httpx2.TransportError:
            return False

    async def ready(self, workers: int) -> None:
        async def there() -> bool:
            if (await self.client.get("/ready")).status_code != 200:
                return False
            return len(await self.loads()) == workers

        await self.until(f"ready with {workers} workers", there)

    async def loads(self) -> dict[str, dict[str, float]]:
        models = (await self.get("/v1/workers"))["models"]
        return {w["worker"]: w["load"] for model in models for w in model["workers"]}

    async def sees(self, requests: dict[str, int]) -> None:
        async def same() -> bool:
            return {w: n["requests"] for w, n in (await self.loads()).items()} == requests

        await self.until(f"requests {requests}", same)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(WAIT_S)


class Site:
    """A file discovery with engines' records, and routers over it."""

    def __init__(self, folder: Path, engines: Engines, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.engines = engines
        self._stack = stack

    def start(self, name: str, **settings: Any) -> Process:
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        place = {"discovery.file_directory": self.folder / "found", "discovery.file_poll": "50ms"}
        router = Process(self.folder, name, {**place, **dotted})
        self._stack.callback(router.end, signal.SIGKILL)
        self._stack.push_async_callback(router.client.aclose)
        return router


@asynccontextmanager
async def a_site(folder: Path, engines: int) -> AsyncIterator[Site]:
    settings = DiscoverySettings(file_directory=folder / "found", file_poll=0.05)
    discovery = create_discovery(settings, {})
    await discovery.start()
    async with AsyncExitStack() as stack:
        site = Site(folder, Engines(discovery), stack)
        for instance in range(1, engines + 1):
            await site.engines.add(instance)
        yield site
    await discovery.close()


def over(nats: EmbeddedNats) -> dict[str, Any]:
    return {
        "events__plane": "nats",
        "events__nats_url": nats.url,
        "events__nats_user": nats.user,
        "events__nats_password": nats.password,
    }


async def test_replicas_count_the_same_and_one_that_is_killed_is_forgotten(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    async with a_site(tmp_path, 2) as site:
        one = site.start("one", replicas__silence="4s", **over(nats))
        other = site.start("other", replicas__silence="4s", **over(nats))
        for router in (one, other):
            await router.ready(2)
        for number in range(3):
            await one.route(worker="1.0", request=f"one-{number}")
        await other.route(worker="2.0", request="one-0")  # names are each router's own
        for router in (one, other):
            await router.sees({"1.0": 3, "2.0": 1})
        await one.post("/v1/requests/events", events=[{"request": "one-0", "kind": "end"}])
        await one.post("/v1/requests/events", events=[{"request": "one-1", "kind": "first_token"}])
        for router in (one, other):
            await router.sees({"1.0": 2, "2.0": 1})

        async def same() -> bool:
            return (await one.loads()) == (await other.loads())

        await one.until("the same loads everywhere", same)
        assert (await other.route())["worker"] == "2.0"  # which has less to do
        third = site.start("third", replicas__silence="4s", **over(nats))
        await third.ready(2)
        await third.sees({"1.0": 2, "2.0": 2})
        pools = (await third.get("/v1/replicas"))["models"][0]["pools"]
        assert {peer["name"] for peer in pools["decode"]["peers"]} == {"one", "other"}
        one.end(signal.SIGKILL)
        for router in (other, third):
            await router.sees({"1.0": 0, "2.0": 2})
        assert other.end() == 0 and third.end() == 0


async def test_routers_without_a_broker_find_each_other(tmp_path: Path) -> None:
    async with a_site(tmp_path, 1) as site:
        one = site.start("one", events__plane="zmq")
        await one.ready(1)
        await one.route(request="early")
        other = site.start("other", events__plane="zmq")
        await other.ready(1)
        await other.route(request="late")
        for router in (one, other):
            await router.sees({"1.0": 2})
        assert one.end() == 0 and other.end() == 0


async def test_a_router_that_starts_again_has_its_index_from_the_snapshot(tmp_path: Path) -> None:
    settings = {"index__predicted_ttl": "60s", "snapshot__path": tmp_path / "index"}
    async with a_site(tmp_path, 3) as site:
        first = site.start("router", **settings)
        await first.ready(3)
        await first.route()
        assert first.end() == 0
        assert (tmp_path / "index").exists()
        again = site.start("router", **settings)
        await again.ready(3)
        snapshot = (await again.get("/v1/index"))["snapshot"]
        assert snapshot["read"] == "read"
        await site.engines.remove(2)
        await again.ready(2)
        assert again.end() == 0


async def test_drain_thresholds_and_death_of_an_engine_in_a_real_router(tmp_path: Path) -> None:
    async with a_site(tmp_path, 2) as site:
        router = site.start("router")
        await router.ready(2)
        await router.route(worker="1.0", request="a")
        await router.post("/v1/busy_threshold", model=MODEL, prefill_tokens=100)
        assert {(await router.route(request=f"{n}"))["worker"] for n in range(1)} == {"2.0"}
        full = await router.post("/v1/route", tokens=PROMPT)
        assert (full.status_code, full.headers["retry-after"]) == (529, "1")
        await router.post("/v1/busy_threshold", prefill_tokens=None)
        await site.engines.drain(1)

        async def drained() -> bool:
            found = await router.get("/v1/workers")
            return [w["state"] for w in found["models"][0]["workers"]] == ["draining", "serving"]

        await router.until("worker 1 drains", drained)
        assert (await router.route())["worker"] == "2.0"
        await site.engines.remove(2)
        await router.ready(1)
        refused = await router.post("/v1/route", tokens=PROMPT)
        assert (refused.status_code, refused.json()["kind"]) == (503, "no-worker")
        assert "none of 1 workers takes requests" in refused.json()["detail"]
        assert router.end() == 0


def test_settings_that_cannot_be_used_end_it_before_it_begins() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "router", "serve", "--set", "policy=best"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "policy (from override): 'best' is not accepted" in done.stderr


async def test_a_taken_port_ends_it_with_a_reason(tmp_path: Path) -> None:
    async with a_site(tmp_path, 0) as site:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            router = site.start("router", http__port=taken.getsockname()[1])
            assert await asyncio.to_thread(router.process.wait, WAIT_S) == 1
        assert "change http.host or http.port" in router.log.read_text()
