"""Pools of mock engines, a global router over them, and a frontend: all on real planes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
from tokenizers import Tokenizer, decoders, models

from frontend.server import listening
from frontend.server import serving as serving_frontend
from frontend.settings import FrontendSettings
from mocker.realtime import answer_to
from mocker.serve import MockEngine, MockSettings
from mocker.serve import serving as serving_engines
from mocker.text import TEXTS, VOCABULARY, text_of
from router.assembly import running as running_router
from router.component import serve_component
from router.metrics import RouterMetrics
from router.pools.app import create_app
from router.pools.assembly import GlobalAssembly, running
from router.pools.config import strategies_of
from router.pools.meter import GlobalRouterMetrics
from router.pools.settings import GlobalRouterSettings
from router.service import RouterService
from router.settings import RouterSettings
from runtime.embedded import EmbeddedNats
from runtime.engine_card import Role
from runtime.hashing import block_hashes
from runtime.settings import load
from runtime.web.server import WebServer
from tests.plain_http import PLAIN

ROOT = Path(__file__).parents[3]
WAIT_S = 120.0
MODEL = "mock"


class GlobalRouting:
    def __init__(self, assembly: GlobalAssembly, client: httpx2.AsyncClient) -> None:
        self.assembly = assembly
        self.client = client

    async def explain(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        answer = await self.client.post("/v1/route/explain", json={"tokens": tokens, **more})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def decisions(self, count: int = 1000) -> list[dict[str, Any]]:
        """The oldest first."""
        answer = await self.client.get("/v1/decisions", params={"count": count})
        return list(reversed(answer.json()["decisions"]))

    async def until(self, what: str, condition: Callable[[], bool]) -> None:
        await until(what, condition)


class Site:
    """One machine's discovery directory and NATS server."""

    def __init__(self, folder: Path, nats: EmbeddedNats, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.place: dict[str, Any] = {
            "discovery.file_directory": folder / "found",
            "discovery.file_poll": 0.05,
            "discovery.ttl": 60.0,  # one loop has them all, and kernels may be compiled in it
            "events.plane": "nats",
            "events.nats_url": nats.url,
            "events.nats_user": nats.user,
            "events.nats_password": nats.password,
        }

    async def engines(
        self, namespace: str, role: Role = "aggregated", **given: Any
    ) -> list[MockEngine]:
        """A pool of them in this process."""
        overrides = self._of_engines(namespace, role, given)
        settings = load(MockSettings, overrides=overrides).value
        return await self.stack.enter_async_context(serving_engines(settings))

    def engines_apart(self, namespace: str, **given: Any) -> subprocess.Popen[str]:
        """The same in a process of their own; it says a line when they serve."""
        command = [sys.executable, "-m", "mocker", "serve"]
        for key, value in self._of_engines(namespace, "aggregated", given).items():
            command += ["--set", f"{key}={value}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.stack.callback(_end, process)
        return process

    async def router(self, namespace: str) -> RouterService:
        """A pool's own kvbm-router, but in this process."""
        overrides = {**self.place, "events.namespace": namespace, "index.capacity": 100_000}
        settings = RouterSettings.load(environ={}, overrides=overrides).value
        metrics = RouterMetrics("1", settings.name)
        assembly = await self.stack.enter_async_context(running_router(settings, {}, metrics))
        service = RouterService(assembly)
        await serve_component(service)
        return service

    async def global_router(self, config: dict[str, Any], **given: Any) -> GlobalRouting:
        file = self.folder / "pools.json"
        file.write_text(json.dumps(config))
        overrides = {
            **self.place,
            "events.namespace": "front",
            "config": file,
            "http.port": 0,
            "index.capacity": 100_000,
            # What one process does for all of them on a busy machine is no engine's delay.
            "feedback.timeout": 10.0,
            **{key.replace("__", "."): value for key, value in given.items()},
        }
        settings = GlobalRouterSettings.load(environ={}, overrides=overrides).value
        metrics = GlobalRouterMetrics("1", settings.name)
        assembly = await self.stack.enter_async_context(
            running(settings, strategies_of(settings), {}, metrics)
        )
        server = WebServer(create_app(assembly), "127.0.0.1", 0, section="http")
        await server.start()
        self.stack.push_async_callback(server.stop)
        client = httpx2.AsyncClient(base_url=server.url, timeout=WAIT_S, verify=PLAIN)
        await self.stack.enter_async_context(client)
        await until(
            "the global router is ready",
            lambda: not any(assembly.readiness().values()),
        )
        return GlobalRouting(assembly, client)

    async def frontend(self, engines: int, model: str = MODEL) -> openai.AsyncOpenAI:
        """OpenAI's client of a frontend that finds so many engines, as it takes them."""
        tokenizer(self.folder / "model")
        overrides = {
            **self.place,
            "events.namespace": "front",
            "openai.port": 0,
            "openai.migrations": 2,
            "http.port": 0,
            "index.capacity": 10_000,
            "model_paths": {MODEL: self.folder / "model"},
        }
        settings = FrontendSettings.load(environ={}, overrides=overrides).value
        doors = await self.stack.enter_async_context(listening(settings))
        await self.stack.enter_async_context(serving_frontend(settings, {}, doors))
        clients = doors.clients
        async with httpx2.AsyncClient(base_url=clients.url, timeout=WAIT_S, verify=PLAIN) as http:
            async with asyncio.timeout(WAIT_S):
                while (await http.get("/health")).json()["engines"] != {model: engines}:
                    await asyncio.sleep(0.02)
        client = openai.AsyncOpenAI(
            base_url=f"{clients.url}/v1", api_key="k", max_retries=0, timeout=WAIT_S
        )
        return await self.stack.enter_async_context(client)

    def _of_engines(self, namespace: str, role: Role, given: dict[str, Any]) -> dict[str, Any]:
        return {
            **self.place,
            "namespace": namespace,
            "events.namespace": namespace,
            "node": f"node-{namespace}",
            "model": MODEL,
            "role": role,
            "context_tokens": 32768,
            "speedup": 20.0,
            **given,
        }


@asynccontextmanager
async def a_site(folder: Path, nats: EmbeddedNats) -> AsyncIterator[Site]:
    block_hashes(range(16), 16)  # compiled now, not when the first request waits for it
    async with AsyncExitStack() as stack:
        yield Site(folder, nats, stack)


def tokenizer(folder: Path) -> None:
    """Of the mock engines' tokens; prompts are given as tokens."""
    folder.mkdir()
    words = {text.decode(): number for number, text in enumerate(TEXTS)}
    made = Tokenizer(models.WordLevel(words, unk_token=" aaa"))
    made.decoder = decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))


def answer_text(prompt: list[int], tokens: int) -> str:
    """What any mock engine says to it."""
    return text_of(answer_to(prompt, tokens, VOCABULARY))


async def until(what: str, condition: Callable[[], bool]) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S} s: {what}") from None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(WAIT_S)
    assert process.stdout is not None
    process.stdout.close()
