"""Users of a fleet: every answer is compared with what the engines' must be, failures are kept."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from mocker.realtime import answer_to
from mocker.text import VOCABULARY, text_of
from tests.chaos.fleet import MADE, MODELS, RELAYED, WAIT_S, Fleet
from tests.plain_http import PLAIN

USERS = 5
PROMPTS = 40  # three times what an engine holds
PAUSE_S = 0.1  # a refused connection takes no time


@dataclass(frozen=True)
class Failure:
    model: str
    began_s: float
    ended_s: float
    code: str
    worker: str  # that was at work on it, as far as is known
    streamed: bool


class Failed(Exception):
    """What a client was told instead of an answer, or of the rest of it."""


@dataclass
class Load:
    fleet: Fleet
    prompts: dict[str, list[list[int]]]  # by model
    dice: random.Random
    answers: int = 0
    routes: int = 0
    wrong: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    route_failures: list[tuple[float, float, str]] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for number in range(USERS):
                tasks.create_task(self._use(ended, random.Random(self.dice.random()), number))
            tasks.create_task(self._ask_router(ended, random.Random(self.dice.random())))
            try:
                yield
            finally:
                ended.set()

    async def more(self, count: int = 2 * USERS) -> None:
        """So many more answers have come."""
        wanted = self.answers + count
        try:
            async with asyncio.timeout(WAIT_S):
                while self.answers < wanted:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(
                f"no more answers; the last failures: {self.failures[-5:]}"
            ) from None

    async def _use(self, ended: asyncio.Event, dice: random.Random, number: int) -> None:
        async with httpx.AsyncClient(
            base_url=self.fleet.frontend_url, timeout=60.0, verify=PLAIN
        ) as http:
            while not ended.is_set():
                model = dice.choice(MODELS)
                prompt, tokens = dice.choice(self.prompts[model]), dice.randint(4, 48)
                is_stream = dice.random() < 0.7
                body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": is_stream}
                true = text_of(answer_to(prompt, tokens, VOCABULARY))
                said, worker, began_s = "", [""], time.monotonic()
                try:
                    ask = streamed if is_stream else whole
                    async for part in ask(http, body, worker):
                        said += part
                except (Failed, httpx.HTTPError, ValueError) as error:
                    code = str(error) if isinstance(error, Failed) else "broken"
                    now_s = time.monotonic()
                    kept = Failure(model, began_s, now_s, code, worker[0], is_stream)
                    self.failures.append(kept)
                    if not true.startswith(said):
                        self.wrong.append(f"{model}: {said!r} is no beginning of {true!r}")
                    await asyncio.sleep(PAUSE_S)
                    continue
                if said != true:
                    self.wrong.append(f"{model}, user {number}: {said!r} is not {true!r}")
                self.answers += 1

    async def _ask_router(self, ended: asyncio.Event, dice: random.Random) -> None:
        """As a frontend elsewhere does that asks the router alone."""
        async with httpx.AsyncClient(
            base_url=self.fleet.router_url, timeout=30.0, verify=PLAIN
        ) as http:
            for number in itertools.count():
                if ended.is_set():
                    return
                model = dice.choice(MODELS)
                body = {"model": model, "tokens": dice.choice(self.prompts[model])}
                began_s = time.monotonic()
                try:
                    routed = await http.post("/v1/route", json={**body, "request": f"r{number}"})
                    if routed.status_code != 200:
                        raise Failed(routed.text)
                    await asyncio.sleep(0.02)
                    for event in ("first_token", "end"):
                        told = await http.post(f"/v1/requests/r{number}/{event}")
                        # Its worker may have gone, and the request with it.
                        if told.status_code not in {200, 404}:
                            raise Failed(told.text)
                except (Failed, httpx.HTTPError) as error:
                    self.route_failures.append((began_s, time.monotonic(), repr(error)))
                    await asyncio.sleep(PAUSE_S)
                else:
                    self.routes += 1

    def __str__(self) -> str:
        return (
            f"{self.answers} answers, {len(self.failures)} failures, "
            f"{self.routes} routes, {len(self.route_failures)} failures"
        )

    # -- what may have failed --------------------------------------------------------------

    def check(self) -> None:
        """Only what was in flight on something that was killed, and that as the manual has it."""
        assert not self.wrong, self.wrong[:3]
        strange = [failure for failure in self.failures if not self._is_right(failure)]
        assert not strange, strange[:5]
        router = self.fleet.router
        strange_routes = [one for one in self.route_failures if not router.was_away(*one[:2])]
        assert not strange_routes, strange_routes[:5]

    def _is_right(self, failure: Failure) -> bool:
        if self.fleet.frontend.was_away(failure.began_s, failure.ended_s):
            return True
        # A stream that had begun at an engine that was killed under it.
        killed_s = next(
            (
                at_s
                for engine in self.fleet.engines
                for instance, at_s in engine.lives.items()
                if f"{instance}.0" == failure.worker
            ),
            None,
        )
        return (
            failure.model == RELAYED
            and failure.streamed
            and failure.code == "engine_lost"
            and killed_s is not None
            and failure.began_s <= killed_s
        )


async def whole(http: httpx.AsyncClient, body: Any, worker: list[str]) -> AsyncIterator[str]:
    answer = await http.post("/v1/completions", json=body)
    worker[0] = answer.headers.get("x-kvbm-worker", "")
    told = answer.json()
    if answer.status_code != 200:
        raise Failed(told["error"]["code"])
    yield told["choices"][0]["text"]


async def streamed(http: httpx.AsyncClient, body: Any, worker: list[str]) -> AsyncIterator[str]:
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        worker[0] = answer.headers.get("x-kvbm-worker", "")
        if answer.status_code != 200:
            raise Failed(json.loads(await answer.aread())["error"]["code"])
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return
            if data:
                told = json.loads(data)
                if "error" in told:
                    raise Failed(told["error"]["code"])
                for choice in told["choices"]:
                    yield choice["text"]
    raise Failed("the stream ended before its end")


def prompts(dice: random.Random) -> dict[str, list[list[int]]]:
    """Of each model: some begin as others do."""
    found: dict[str, list[list[int]]] = {}
    for model in (RELAYED, MADE):
        made: list[list[int]] = []
        for _ in range(PROMPTS):
            begin = (
                dice.choice(made)[: dice.randint(64, 256)] if made and dice.random() < 0.5 else []
            )
            rest = [dice.randrange(VOCABULARY) for _ in range(dice.randint(80, 400))]
            made.append([*begin, *rest])
        found[model] = made
    return found
