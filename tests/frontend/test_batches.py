"""Tokens that come together: they go on together, and a fault behind them loses none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, MutableMapping, Sequence
from typing import Any, Self

import pytest

from frontend.exchanges import make_exchanges
from frontend.fleet import Place
from frontend.gate import Gate
from frontend.generate import Generation, RequestPlaneEngines
from frontend.meter import Meter
from frontend.prompt import PromptMaker
from frontend.token_routes import TokenRoutes
from frontend.tokenizer import Tokenizer
from runtime.engines.upstream import EngineFault, Upstream
from runtime.generation import Generate, Generated, Sampling, encode
from tests.frontend.engines import MODEL, InTurn, Worker
from tests.frontend.test_tokenizer import byte_level_once
from tests.runtime.engines.scripted import Asked, Engine, Wire

ANSWER = "the lazy dog jumps over it"
TOKENS = byte_level_once().encode(ANSWER, add_special_tokens=False).ids
PROMPT = byte_level_once().encode("a quick fox").ids
PATH = "/v1/completions"
BODY = {"model": MODEL, "prompt": "a quick fox", "max_tokens": 100}
END = Generated(token_ids=[], finish_reason="stop")
Batch = list[Generated]


def each(tokens: Sequence[int]) -> Batch:
    return [Generated(token_ids=[token]) for token in tokens]


class Engines:
    """Of each request the next script: batches, and whether the engine is lost behind them."""

    def __init__(self, *scripts: tuple[list[Batch], bool]) -> None:
        self.asked: list[Generate] = []
        self._scripts = iter(scripts)

    async def generate(
        self, place: Place, request: Generate, headers: Mapping[str, str]
    ) -> AsyncGenerator[Sequence[Generated]]:
        self.asked.append(request)
        batches, is_lost = next(self._scripts)
        for batch in batches:
            yield batch
        if is_lost:
            raise EngineFault(place.url, "lost", begun=True)


class Fleet(InTurn):
    def takes_tokens(self, model: str) -> bool:
        return True


async def nothing(wire: Wire, asked: Asked) -> None:
    raise AssertionError("nobody is asked by HTTP")


async def written(engines: Engines, **more: Any) -> list[bytes]:
    """What the frontend writes as the answer, write by write."""
    servers = [Engine(number, nothing) for number in (1, 2)]
    for server in servers:
        server.url = "tcp://nowhere"
    fleet = Fleet(servers, PromptMaker(Tokenizer(byte_level_once()), None))
    routes = TokenRoutes(fleet, Generation(fleet, engines, migrations_max=1))
    gate, meter = Gate((), 64, 1 << 20), Meter()
    exchanges = make_exchanges(fleet, gate, meter, Upstream(1.0), routes, migrations_max=1)
    bodies = [json.dumps({**BODY, **more}).encode()]
    sent: list[bytes] = []

    async def receive() -> MutableMapping[str, Any]:
        if not bodies:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
    await exchanges.posted[PATH](scope, receive, send)
    return sent


def texts(data: bytes) -> list[str]:
    events = [part.removeprefix(b"data: ") for part in data.split(b"\n\n") if part]
    return [json.loads(one)["choices"][0]["text"] for one in events if one != b"[DONE]"]


async def test_items_that_come_together_are_one_write() -> None:
    batches = [each(TOKENS[:4]), [*each(TOKENS[4:]), END]]
    first, second, *ending = await written(Engines((batches, False)), stream=True)
    assert len(texts(first)) > 1
    assert "".join(texts(first) + texts(second)) == ANSWER
    assert b"".join(ending) == b"data: [DONE]\n\n"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_batch_behind_which_the_engine_is_lost_is_kept(stream: bool) -> None:
    engines = Engines(([each(TOKENS[:4])], True), ([[*each(TOKENS[4:]), END]], False))
    data = b"".join(await written(engines, stream=stream))
    found = "".join(texts(data)) if stream else json.loads(data)["choices"][0]["text"]
    assert found == ANSWER
    assert engines.asked[1].token_ids == PROMPT + TOKENS[:4]
    assert engines.asked[1].sampling.max_tokens == 96


async def test_what_comes_behind_the_last_item_is_not_said() -> None:
    data = await written(Engines(([[*each(TOKENS), END, *each(TOKENS)]], False)))
    answer = json.loads(b"".join(data))
    assert answer["choices"][0]["text"] == ANSWER
    assert answer["usage"]["completion_tokens"] == len(TOKENS)


class Stream:
    """Of the request plane: one batch, of which the last item is none."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def batches(self) -> AsyncIterator[list[bytes]]:
        yield [*map(encode, each(TOKENS[:2])), b"no item"]


class Client:
    def stream(self, *_: Any, **__: Any) -> Stream:
        return Stream()


async def test_items_before_one_that_is_none_are_kept() -> None:
    client: Any = Client()
    engines = RequestPlaneEngines(client, "x", 1.0)
    request = Generate(token_ids=PROMPT, sampling=Sampling(max_tokens=9))
    batches = engines.generate(Worker(1, "tcp://nowhere"), request, {})
    assert await anext(batches) == each(TOKENS[:2])
    with pytest.raises(EngineFault):
        await anext(batches)
