"""Answers made from tokens of engines that have nothing but an OpenAI server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from frontend.app import make_app
from frontend.exchanges import make_exchanges
from frontend.gate import Gate
from frontend.generate import ByAddress, Generation, TokenEngines
from frontend.meter import Meter
from frontend.pages import Pages
from frontend.prompt import PromptMaker
from frontend.token_routes import TokenRoutes
from frontend.tokenizer import Tokenizer
from runtime.engines.completions import CompletionEngines
from runtime.engines.upstream import Upstream
from tests.frontend.engines import MODEL, InTurn, OneLimit
from tests.frontend.test_tokenizer import byte_level_once
from tests.runtime.engines.scripted import (
    Asked,
    Engine,
    Script,
    Wire,
    ending,
    event,
    refusing,
    saying,
)

ANSWER = "the lazy dog jumps over it"
TOKENS = byte_level_once().encode(ANSWER, add_special_tokens=False).ids
END = 2  # a token that ends answers
BODY: dict[str, Any] = {"model": MODEL, "prompt": "a quick fox", "max_tokens": 100}


class Nobody:
    """On the request plane."""

    generate: Any = None


class Servers(InTurn):
    def takes_tokens(self, model: str) -> bool:
        return True

    def has_servers(self, model: str) -> bool:
        return True


@contextlib.asynccontextmanager
async def before(*scripts: Script) -> AsyncIterator[tuple[httpx.AsyncClient, list[Engine]]]:
    engines = [Engine(number, script) for number, script in enumerate(scripts, 1)]
    for engine in engines:
        await engine.start()
    fleet, meter, upstream = Servers(engines), Meter(), Upstream(30.0)
    fleet._text = PromptMaker(Tokenizer(byte_level_once()), None)
    await upstream.open()
    on_plane: TokenEngines = Nobody()
    token_engines = ByAddress(on_plane, CompletionEngines(upstream))
    routes = TokenRoutes(fleet, Generation(fleet, token_engines, migrations_max=1))
    gate = Gate((), 64, 1 << 20)
    exchanges = make_exchanges(fleet, gate, meter, upstream, routes, migrations_max=1)
    pages = Pages(fleet, gate, meter, OneLimit())
    transport = httpx.ASGITransport(make_app(exchanges, pages))
    async with httpx.AsyncClient(transport=transport, base_url="http://frontend") as http:
        try:
            yield http, engines
        finally:
            for engine in engines:
                await engine.stop()
            await upstream.close()


def rest(after: int) -> Script:
    """A whole stream, from so many tokens of the answer on, cut where no event ends."""
    whole = (
        event(TOKENS[after:-1])
        + b": a comment\n\n"
        + event([TOKENS[-1], END], "stop", stop_reason=None)
        + ending(7)
    )
    return saying(whole[:9], whole[9:70], whole[70:])


async def test_tokens_go_in_and_come_out() -> None:
    async with before(rest(0)) as (http, [engine]):
        given = {"temperature": 0.5, "seed": 3, "logit_bias": {"5": 1}, "stop": "never", "min_p": 0}
        reply = await http.post("/v1/completions", json={**BODY, **given})
        assert reply.headers["x-kvbm-worker"] == "1.0"
        answer = reply.json()
        assert answer["choices"][0]["text"] == ANSWER
        assert answer["choices"][0]["finish_reason"] == "stop"
        usage = answer["usage"]
        assert usage["completion_tokens"] == len(TOKENS) + 1, "with the one that ended it"
        assert usage["prompt_tokens_details"] == {"cached_tokens": 7}
        [asked] = engine.asked
        assert asked.path == "/v1/completions"
        assert asked.json == {
            "model": MODEL,
            "prompt": byte_level_once().encode(BODY["prompt"]).ids,
            "max_tokens": 100,
            "temperature": 0.5,
            "min_p": 0.0,
            "seed": 3,
            "logit_bias": {"5": 1.0},
            "stop": ["never"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }, "what the request does not say is the engine's own choice"


async def test_what_ended_it_is_shown_if_asked_for() -> None:
    parts = event(TOKENS, "stop", stop_reason=TOKENS[-1]), ending(0)
    async with before(saying(*parts)) as (http, _):
        shown = {**BODY, "include_stop_str_in_output": True}
        for body, count in ((BODY, len(TOKENS) - 1), (shown, len(TOKENS))):
            answer = (await http.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["text"] == byte_level_once().decode(TOKENS[:count])
            assert answer["usage"]["completion_tokens"] == len(TOKENS)


async def test_an_engine_that_stops_at_a_text_says_all_its_tokens() -> None:
    parts = event(TOKENS, "stop", stop_reason="it"), ending(3)
    async with before(saying(*parts)) as (http, _):
        answer = (await http.post("/v1/completions", json={**BODY, "stop": ["it"]})).json()
        assert answer["choices"][0]["text"] == ANSWER.removesuffix("it")
        assert answer["usage"]["completion_tokens"] == len(TOKENS)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize(
    "first",
    [
        saying(event(TOKENS[:3]), broken=True),
        saying(event(TOKENS[:3])),
        saying(event(TOKENS[:3]), b'data: {"error":{"message":"dead","code":500}}\n\n'),
    ],
    ids=["broken", "no end", "failed"],
)
async def test_a_stream_goes_on_at_another_engine(first: Script) -> None:
    async with before(first, rest(3)) as (http, [_, second]):
        answer = (await http.post("/v1/completions", json=BODY)).json()
        assert answer["choices"][0]["text"] == ANSWER
        assert answer["usage"]["completion_tokens"] == len(TOKENS) + 1
        asked = second.asked[0].json
        assert asked["prompt"] == byte_level_once().encode(BODY["prompt"]).ids + TOKENS[:3]
        assert asked["max_tokens"] == 97


async def test_an_engine_that_is_overloaded_is_replaced() -> None:
    async with before(refusing(503, "too busy"), rest(0)) as (http, _):
        reply = await http.post("/v1/completions", json=BODY)
        assert reply.json()["choices"][0]["text"] == ANSWER
        assert reply.headers.get_list("x-kvbm-worker") == ["2.0"]


async def test_what_the_request_is_to_blame_for_is_the_answer() -> None:
    async with before(refusing(400, "no such token"), rest(0)) as (http, [_, second]):
        answer = await http.post("/v1/completions", json=BODY)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "no such token"
        assert not second.asked


async def test_what_cannot_be_made_here_is_passed_through() -> None:
    async def script(wire: Wire, asked: Asked) -> None:
        wire.whole(b'{"made":"by the engine"}')

    async with before(script) as (http, [engine]):
        body = {**BODY, "logprobs": 2}
        answer = await http.post("/v1/completions", json=body)
        assert answer.json() == {"made": "by the engine"}
        assert engine.asked[0].json == body
