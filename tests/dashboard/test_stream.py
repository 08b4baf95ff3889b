"""The stream behind the page: what is sent, to whom, and that it costs nobody the program."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx2
from fastapi import Depends, FastAPI

from runtime.web.access import readers
from runtime.web.dashboard import WATCHERS_MAX, Dashboard
from runtime.web.problems import handle_problems
from runtime.web.server import WebServer
from tests.plain_http import PLAIN

TOKEN = "a-token-of-16-up"
WAIT_S = 60.0


class Source:
    kind: Final = "node"
    name: Final = "node-1"

    def __init__(self) -> None:
        self.count = 0
        self.is_broken = False
        self.failures = 0
        self.states = 0

    def figures(self) -> Mapping[str, float]:
        self.count += 1
        if self.is_broken:
            raise RuntimeError("a bug")
        return {"count": self.count, "endless": float("inf")}

    def failed(self) -> None:
        self.failures += 1

    def state(self) -> Mapping[str, Any]:
        self.states += 1
        return {"made": self.states}


class Watching:
    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines

    async def next(self) -> tuple[str, Any]:
        async with asyncio.timeout(WAIT_S):
            name = (await anext(self._lines)).removeprefix("event: ")
            data = json.loads((await anext(self._lines)).removeprefix("data: "))
            assert await anext(self._lines) == ""
        return name, data

    async def more(self) -> bool:
        return await anext(self._lines, None) is not None


class Served:
    def __init__(self, source: Source, dashboard: Dashboard, client: httpx2.AsyncClient) -> None:
        self.source = source
        self.dashboard = dashboard
        self.client = client

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Watching]:
        async with self.client.stream("GET", "/v1/dashboard") as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            yield Watching(response.aiter_lines())


@asynccontextmanager
async def served(token: str | None = None) -> AsyncIterator[Served]:
    source = Source()
    dashboard = Dashboard(source, interval_s=0.02)
    app = FastAPI()
    handle_problems(app, "test")
    dashboard.add_to(app, [Depends(readers(token, "test.token"))])
    server = WebServer(app, "127.0.0.1", 0, section="test")
    await server.start()
    try:
        async with httpx2.AsyncClient(base_url=server.url, trust_env=False, verify=PLAIN) as client:
            yield Served(source, dashboard, client)
    finally:
        await server.stop()


async def test_the_last_minutes_come_first_and_then_each_state() -> None:
    async with served() as it, it.dashboard.running(), it.watch() as watching:
        name, hello = await watching.next()
        assert (name, hello["kind"], hello["name"]) == ("hello", "node", "node-1")
        assert hello["figures"]["count"] == list(range(1, len(hello["at"]) + 1))
        assert hello["figures"]["endless"] == [None] * len(hello["at"])
        seen = [await watching.next() for _ in range(3)]
        assert {name for name, _ in seen} == {"state"}
        counts = [state["figures"]["count"] for _, state in seen]
        assert counts == sorted(set(counts)), "each is newer"
        assert [state["state"]["made"] for _, state in seen] == [1, 2, 3]


async def test_states_are_made_only_while_somebody_watches_and_once_for_all() -> None:
    async with served() as it, it.dashboard.running():
        while it.source.count < 5:
            await asyncio.sleep(0.01)
        assert it.source.states == 0
        async with it.watch() as one, it.watch() as other:
            for watching in (one, other):
                assert (await watching.next())[0] == "hello"
                await watching.next()  # made for the one that came
            shared = {(await one.next())[1]["at"] for _ in range(3)}
            assert shared & {(await other.next())[1]["at"] for _ in range(3)}
        async with asyncio.timeout(WAIT_S):
            while it.dashboard._watchers:
                await asyncio.sleep(0.01)


async def test_a_fault_in_what_is_shown_is_not_the_programs() -> None:
    async with served() as it, it.dashboard.running(), it.watch() as watching:
        await watching.next()
        before = it.source.count
        it.source.is_broken = True
        while it.source.count < before + 3:
            await asyncio.sleep(0.01)
        assert it.source.failures >= 2, "each time it is counted"
        it.source.is_broken = False
        while (await watching.next())[1]["figures"]["count"] <= before + 3:
            pass


async def test_who_watches_is_sent_away_at_the_end() -> None:
    async with served() as it, it.watch() as watching:
        async with it.dashboard.running():
            for _ in range(3):
                await watching.next()
        async with asyncio.timeout(WAIT_S):
            while await watching.more():
                pass


async def test_no_more_than_so_many_may_watch() -> None:
    async with served() as it, it.dashboard.running():
        watching = [it.dashboard.watch() for _ in range(WATCHERS_MAX)]
        for one in watching:
            await anext(one)
        refused = await it.client.get("/v1/dashboard")
        assert refused.status_code == 503 and "watch already" in refused.json()["detail"]
        await watching.pop().aclose()
        async with it.watch() as last:
            assert (await last.next())[0] == "hello"
        for one in watching:
            await one.aclose()


async def test_the_page_is_for_all_and_its_figures_for_who_has_the_token() -> None:
    async with served(TOKEN) as it, it.dashboard.running():
        home = await it.client.get("/", follow_redirects=True)
        assert home.status_code == 200 and home.url.path == "/dashboard/"
        assert "default-src 'self'" in home.headers["content-security-policy"]
        assert (await it.client.get("/dashboard/dashboard.js")).status_code == 200
        assert (await it.client.get("/dashboard/..%2fdashboard.py")).status_code == 404
        assert (await it.client.get("/v1/dashboard")).status_code == 401
        it.client.headers["authorization"] = f"Bearer {TOKEN}"
        async with it.watch() as watching:
            assert (await watching.next())[0] == "hello"
