"""Tokens in, tokens out, of engines that have nothing but an OpenAI server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import pytest

from runtime.engines.completions import CompletionEngines
from runtime.engines.upstream import EngineFault, Upstream
from runtime.generation import EngineRefused, Generate, Generated, Sampling
from tests.runtime.engines.scripted import Engine, Script, ending, event, refusing, saying

TOKENS = [11, 12, 13, 14, 15]
END = 2  # a token that ends answers
BUSY = b'data: {"error":{"message":"dead","code":500}}\n\n'


@dataclass(frozen=True)
class Place:
    url: str
    dp_rank: int = 0
    dp_size: int = 1


Ask = Callable[..., AsyncIterator[Generated]]


@contextlib.asynccontextmanager
async def asking(script: Script) -> AsyncIterator[tuple[Ask, Engine]]:
    engine, upstream = Engine(1, script), Upstream(30.0)
    await engine.start()
    await upstream.open()

    async def ask(ranks: int = 1, **sampling: float) -> AsyncIterator[Generated]:
        request = Generate(
            token_ids=[1, 2, 3],
            sampling=Sampling(max_tokens=9, **sampling),  # type: ignore[arg-type]
            model="m",
            session="not the engine's",
        )
        place = Place(engine.url, ranks - 1, ranks)
        async for items in CompletionEngines(upstream).generate(place, request, {"x-own": "yes"}):
            for item in items:
                yield item

    try:
        yield ask, engine
    finally:
        await engine.stop()
        await upstream.close()


async def given(items: AsyncIterator[Generated]) -> list[Generated]:
    return [item async for item in items]


def whole(*last: bytes) -> Sequence[bytes]:
    return event(TOKENS[:3]), b": a comment\n\n", event(TOKENS[3:]), *last


async def test_tokens_go_in_and_come_out() -> None:
    """However its events are cut."""
    stream = b"".join(whole(event([END], "stop", stop_reason=None), ending(7)))
    async with asking(saying(stream[:9], stream[9:70], stream[70:])) as (ask, engine):
        items = await given(ask(ranks=3, temperature=0.5))
        assert [token for item in items for token in item.token_ids] == TOKENS
        assert items[-1] == Generated(
            token_ids=[], finish_reason="stop", stop_token=END, cached_tokens=7
        )
        [asked] = engine.asked
        assert (asked.path, asked.headers["x-own"]) == ("/v1/completions", "yes")
        assert asked.headers["x-data-parallel-rank"] == "2"
        assert asked.json == {
            "model": "m",
            "prompt": [1, 2, 3],
            "max_tokens": 9,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }, "what the request does not say is the engine's own choice"


@pytest.mark.parametrize(
    ("finish", "reason", "tokens", "stop_token"),
    [("stop", TOKENS[-1], 4, TOKENS[-1]), ("stop", "a text", 5, None), ("length", None, 5, None)],
)
async def test_its_last_item_says_why_it_ended(
    finish: str, reason: int | str | None, tokens: int, stop_token: int | None
) -> None:
    async with asking(saying(event(TOKENS, finish, stop_reason=reason), ending(0))) as (ask, _):
        [item] = await given(ask())
        assert (item.finish_reason, item.stop_token) == (finish, stop_token)
        assert item.token_ids == TOKENS[:tokens]


@pytest.mark.parametrize(
    "script",
    [
        saying(event(TOKENS), broken=True),
        saying(event(TOKENS), event([], "abort")),
        saying(event(TOKENS), BUSY),
        saying(event(TOKENS) + BUSY),
        saying(event(TOKENS), b"data: nothing that is JSON\n\n"),
        saying(event(TOKENS), b'data: {"choices":[{"text":"text alone"}]}\n\n'),
    ],
    ids=["broken", "aborted", "failed", "failed at once", "nonsense", "no tokens"],
)
async def test_what_came_before_a_fault_is_given(script: Script) -> None:
    async with asking(script) as (ask, _):
        items = ask()
        assert (await anext(items)).token_ids == TOKENS
        with pytest.raises(EngineFault) as fault:
            await anext(items)
        assert fault.value.begun


async def test_a_stream_may_end_without_saying_why() -> None:
    async with asking(saying(event(TOKENS))) as (ask, _):
        assert await given(ask()) == [Generated(token_ids=TOKENS)]


async def test_an_engine_lost_behind_its_last_token_is_not_missed() -> None:
    parts = event(TOKENS), event([END], "stop", stop_reason=None)
    async with asking(saying(*parts, broken=True)) as (ask, _):
        assert (await given(ask()))[-1].finish_reason == "stop"


async def test_connections_are_used_again() -> None:
    async with asking(saying(*whole(event([], "length"), ending(0)))) as (ask, engine):
        for _ in range(3):
            assert len(await given(ask())) == 3
        assert len(engine.wires) == 1


@pytest.mark.parametrize(
    "script",
    [
        refusing(400, "no such token"),
        saying(b'data: {"error":{"message":"no such token","code":400}}\n\n', b"data: [DONE]\n\n"),
    ],
    ids=["at once", "in its stream"],
)
async def test_what_the_request_is_to_blame_for_is_told(script: Script) -> None:
    async with asking(script) as (ask, _):
        with pytest.raises(EngineRefused) as told:
            await given(ask())
        assert (told.value.refused.status, told.value.refused.message) == (400, "no such token")


async def test_an_engine_that_is_overloaded_is_at_fault() -> None:
    async with asking(refusing(503, "too busy")) as (ask, _):
        with pytest.raises(EngineFault, match="503: too busy"):
            await given(ask())
