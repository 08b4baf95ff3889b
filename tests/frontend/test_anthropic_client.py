"""Anthropic's own client against the frontend: answers, streams, counts, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import httpx
import pytest

from frontend.gate import Gate
from tests.frontend.engines import MODEL, Running, frontend
from tests.plain_http import PLAIN
from tests.runtime.engines.scripted import Asked, Wire

MESSAGES: Any = [{"role": "user", "content": "hello"}]
USAGE = {"input_tokens": 9, "output_tokens": 2}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": MODEL}


def event(kind: str, **told: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **told})}\n\n".encode()


async def answer(wire: Wire, asked: Asked) -> None:
    """As vLLM answers `/v1/messages`."""
    if asked.path.startswith("/v1/messages/count_tokens"):
        wire.whole(b'{"input_tokens": 9}')
        return
    if not asked.json.get("stream"):
        text = {"type": "text", "text": "Hi there"}
        told = {**MESSAGE, "content": [text], "stop_reason": "end_turn", "usage": USAGE}
        wire.whole(json.dumps(told).encode())
        return
    wire.begin()
    wire.part(event("message_start", message={**MESSAGE, "content": [], "usage": USAGE}))
    wire.part(event("content_block_start", index=0, content_block={"type": "text", "text": ""}))
    for word in ("Hi", " there"):
        delta = {"type": "text_delta", "text": word}
        wire.part(event("content_block_delta", index=0, delta=delta))
    wire.part(event("content_block_stop", index=0))
    wire.part(event("message_delta", delta={"stop_reason": "end_turn"}, usage=USAGE))
    wire.part(event("message_stop"))
    wire.end()


def client(running: Running, api_key: str = "a-client") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=running.url, api_key=api_key, max_retries=0)


async def test_a_message() -> None:
    async with frontend(answer) as running, client(running) as asking:
        found = await asking.messages.create(model=MODEL, messages=MESSAGES, max_tokens=4)
        assert found.content[0].text == "Hi there"  # type: ignore[union-attr]
        assert found.usage.input_tokens == 9
        (asked,) = running.fleet.engines[0].asked
        assert asked.headers["anthropic-version"]


async def test_a_stream() -> None:
    async with frontend(answer) as running, client(running) as asking:
        given = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
        async with asking.messages.stream(**given) as stream:
            assert "".join([text async for text in stream.text_stream]) == "Hi there"
            assert (await stream.get_final_message()).stop_reason == "end_turn"


async def test_a_count_of_tokens() -> None:
    async with frontend(answer) as running, client(running) as asking:
        found = await asking.messages.count_tokens(model=MODEL, messages=MESSAGES)
        assert found.input_tokens == 9


async def test_errors_are_the_clients_exceptions() -> None:
    given: Any = {"messages": MESSAGES, "max_tokens": 4}
    async with frontend(answer, gate=Gate(("a-client",), 8, 1 << 20)) as running:
        async with client(running, "another") as asking:
            with pytest.raises(anthropic.AuthenticationError, match="Incorrect API key"):
                await asking.messages.create(model=MODEL, **given)
        async with client(running) as asking:
            with pytest.raises(anthropic.NotFoundError) as missing:
                await asking.messages.create(model="other", **given)
            body = missing.value.body
            assert isinstance(body, dict)
            assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
            with pytest.raises(anthropic.BadRequestError):
                await asking.messages.create(model=MODEL, messages="x", max_tokens=1)  # type: ignore[arg-type]
            with pytest.raises(anthropic.NotFoundError):
                await asking.messages.count_tokens(model="other", messages=MESSAGES)
        async with httpx.AsyncClient(base_url=running.url, verify=PLAIN) as http:
            wrong_method = await http.get("/v1/messages")
            assert wrong_method.json()["type"] == "error"


async def test_a_stream_that_breaks_raises() -> None:
    """Without the event's name the client would take what came for all."""

    async def breaks(wire: Wire, asked: Asked) -> None:
        wire.begin()
        wire.part(event("message_start", message={**MESSAGE, "content": [], "usage": USAGE}))
        await asyncio.sleep(0.05)
        wire.break_off()

    async with frontend(breaks) as running, client(running) as asking:
        stream = await asking.messages.create(
            model=MODEL, messages=MESSAGES, max_tokens=4, stream=True
        )
        with pytest.raises(anthropic.APIStatusError, match="broke off"):
            async for _ in stream:
                pass


async def test_no_engine_is_a_refusal_that_says_when_to_come_back() -> None:
    async with frontend() as running, client(running) as asking:
        with pytest.raises(anthropic.APIStatusError) as full:
            await asking.messages.create(model=MODEL, messages=MESSAGES, max_tokens=4)
        assert full.value.status_code == 503
        assert full.value.response.headers["retry-after"] == "1"
