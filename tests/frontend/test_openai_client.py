"""OpenAI's own client against the frontend: answers, streams, errors, as its users see them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from frontend.gate import Gate
from tests.frontend.engines import MODEL, Running, frontend
from tests.runtime.engines.scripted import Asked, Wire

USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 8},
}
MESSAGES: Any = [{"role": "user", "content": "hello"}]


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}] if "usage" not in more else []
    found = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return b"data: " + json.dumps({**found, "choices": choices, **more}).encode() + b"\n\n"


async def chat(wire: Wire, asked: Asked) -> None:
    """As vLLM answers."""
    if not asked.json.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "Hi there"}}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
        choices = [{**choice, "finish_reason": "stop"}]
        wire.whole(json.dumps({**head, "choices": choices, "usage": USAGE}).encode())
        return
    wire.begin()
    wire.part(chunk({"role": "assistant", "content": ""}))
    for word in ("Hi", " there"):
        wire.part(chunk({"content": word}))
        await asyncio.sleep(0.01)
    wire.part(chunk({}, "stop"))
    wire.part(chunk({}, usage=USAGE))
    wire.part(b"data: [DONE]\n\n")
    wire.end()


def client(running: Running, **given: Any) -> openai.AsyncOpenAI:
    base = running.url + "/v1"
    return openai.AsyncOpenAI(**{"base_url": base, "api_key": "k", "max_retries": 0, **given})


async def test_an_answer_and_its_usage() -> None:
    async with frontend(chat) as running, client(running) as asking:
        found = await asking.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert found.choices[0].message.content == "Hi there"
        assert found.usage is not None
        assert found.usage.prompt_tokens_details is not None
        assert found.usage.prompt_tokens_details.cached_tokens == 8
        assert found._request_id


async def test_a_stream() -> None:
    async with frontend(chat) as running, client(running) as asking:
        stream = await asking.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [one async for one in stream]
        text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
        assert text == "Hi there"
        assert chunks[-1].usage is not None


async def test_the_client_that_blocks() -> None:
    async with frontend(chat) as running:

        def ask() -> str:
            with openai.OpenAI(base_url=running.url + "/v1", api_key="k") as asking:
                stream = asking.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
                return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

        assert await asyncio.to_thread(ask) == "Hi there"


async def test_models() -> None:
    async with frontend(chat) as running, client(running) as asking:
        assert [model.id async for model in asking.models.list()] == [MODEL]
        assert (await asking.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError, match="test/model"):
            await asking.models.retrieve("other")


async def test_embeddings_in_the_form_the_client_asks_for() -> None:
    async def embed(wire: Wire, asked: Asked) -> None:
        assert asked.json["encoding_format"] == "base64"
        data = [{"object": "embedding", "index": 0, "embedding": "AACAPwAAAEA="}]
        wire.whole(json.dumps({"object": "list", "data": data, "model": MODEL}).encode())

    async with frontend(embed) as running, client(running) as asking:
        found = await asking.embeddings.create(model=MODEL, input="hello")
        assert found.data[0].embedding == [1.0, 2.0]


async def test_errors_are_the_clients_exceptions() -> None:
    async with frontend(chat, gate=Gate(("right",), 8, 1 << 20)) as running:
        async with client(running) as asking:
            with pytest.raises(openai.AuthenticationError):
                await asking.chat.completions.create(model=MODEL, messages=MESSAGES)
        async with client(running, api_key="right") as asking:
            with pytest.raises(openai.NotFoundError) as missing:
                await asking.chat.completions.create(model="other", messages=MESSAGES)
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await asking.chat.completions.create(model=MODEL, messages="hello")  # type: ignore[arg-type]
            assert bad.value.param == "messages"


async def test_a_stream_that_breaks_raises() -> None:
    async def breaks(wire: Wire, asked: Asked) -> None:
        wire.begin()
        wire.part(chunk({"content": "Hi"}))
        await asyncio.sleep(0.05)
        wire.break_off()

    async with frontend(breaks) as running, client(running) as asking:
        stream = await asking.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in stream:
                pass


async def test_no_engine_is_a_refusal_that_says_when_to_come_back() -> None:
    async with frontend() as running, client(running) as asking:
        with pytest.raises(openai.InternalServerError) as full:
            await asking.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert full.value.status_code == 503
        assert full.value.response.headers["retry-after"] == "1"
