"""Streams that say nothing for long: comments between events, and only there."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anthropic
import pytest

from frontend.errors import overloaded
from frontend.fleet import Assigned, Job
from frontend.keep_alive import COMMENT, EVENT_STREAM, KeepAlive
from frontend.respond import Reply
from tests.frontend.engines import MODEL, Running, Worker, frontend
from tests.frontend.test_openai_client import MESSAGES, chunk, client
from tests.frontend.token_engines import TokenEngine, token_frontend
from tests.runtime.engines.scripted import Asked, Wire

EVERY_S = 0.1
WAIT_S = 60.0
STREAM = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "stream": True}
FIRST, SECOND, DONE = b'data: {"n":1}\n\n', b'data: {"n":2}\n\n', b"data: [DONE]\n\n"


class Halting:
    """An engine's script that waits where it is told to, until it is let go on."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts
        self.go_on = asyncio.Event()

    async def __call__(self, wire: Wire, asked: Asked) -> None:
        wire.begin()
        for part in self.parts:
            if part:
                wire.part(part)
            else:
                await self.go_on.wait()
                self.go_on.clear()
        wire.end()


class Hearing:
    """What has come of a stream so far."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.body = b""

    async def until(self, part: bytes, count: int = 1) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.body.count(part) < count:
                more = await self.response.content.readany()
                assert more, self.body
                self.body += more

    async def rest(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            self.body += await self.response.read()
        return self.body


@asynccontextmanager
async def hearing(running: Running, path: str = "/v1/completions") -> AsyncIterator[Hearing]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(running.url + path, json=STREAM) as response,
    ):
        yield Hearing(response)


async def test_a_silent_stream_says_that_it_is_alive_between_events_only() -> None:
    half, rest = SECOND[:7], SECOND[7:]
    engine = Halting(FIRST, b"", half, b"", rest, DONE)
    async with frontend(engine, keep_alive_s=EVERY_S) as running, hearing(running) as heard:
        await heard.until(COMMENT, 2)
        engine.go_on.set()
        await heard.until(half)
        said = heard.body.count(COMMENT)
        await asyncio.sleep(5 * EVERY_S)  # for long, and in the middle of an event
        engine.go_on.set()
        body = await heard.rest()
    assert body.count(COMMENT) == said
    assert body.replace(COMMENT, b"") == FIRST + SECOND + DONE
    assert SECOND in body


async def test_a_stream_whose_events_end_otherwise() -> None:
    engine = Halting(b'data: {"n":1}\r\n\r\n', b"", b"data: [DONE]\r\n\r\n")
    async with frontend(engine, keep_alive_s=EVERY_S) as running, hearing(running) as heard:
        await heard.until(COMMENT)
        engine.go_on.set()
        assert (await heard.rest()).endswith(b"data: [DONE]\r\n\r\n")


async def test_no_comment_is_made_where_none_is_wanted() -> None:
    async def slow(wire: Wire, asked: Asked) -> None:
        wire.begin()
        await asyncio.sleep(5 * EVERY_S)
        wire.part(FIRST + DONE)
        wire.end()

    async with frontend(slow, keep_alive_s=0.0) as running, hearing(running) as heard:
        assert await heard.rest() == FIRST + DONE


async def test_a_whole_answer_is_waited_for() -> None:
    async def slow(wire: Wire, asked: Asked) -> None:
        await asyncio.sleep(5 * EVERY_S)
        wire.whole(b'{"object":"text_completion"}', 429)

    async with frontend(slow, keep_alive_s=EVERY_S) as running, aiohttp.ClientSession() as session:
        asked = {**STREAM, "stream": False}
        async with session.post(running.url + "/v1/completions", json=asked) as response:
            assert response.status == 429
            assert await response.read() == b'{"object":"text_completion"}'


async def test_it_begins_before_the_first_byte_and_another_engine_can_still_go_on() -> None:
    letting_go = asyncio.Event()

    async def dies(wire: Wire, asked: Asked) -> None:
        wire.begin()
        await letting_go.wait()
        wire.break_off()

    engine = Halting(FIRST, DONE)
    async with frontend(dies, engine, keep_alive_s=EVERY_S) as running:
        async with hearing(running) as heard:
            assert heard.response.status == 200
            assert heard.response.headers["content-type"].startswith("text/event-stream")
            assert heard.response.headers["x-kvbm-worker"] == "1.0"
            await heard.until(COMMENT)
            letting_go.set()
            assert (await heard.rest()).replace(COMMENT, b"") == FIRST + DONE
        assert running.outcomes() == {"success": 1.0}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/completions", b'data: {"error":'),
        ("/v1/responses", b'event: error\ndata: {"error":'),
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":'),
    ],
)
async def test_an_error_after_that_is_the_streams_last_event(path: str, expected: bytes) -> None:
    letting_go = asyncio.Event()

    async def refuses(wire: Wire, asked: Asked) -> None:
        await letting_go.wait()
        wire.whole(b'{"error": {"message": "too long"}}', 400)

    async with frontend(refuses, keep_alive_s=EVERY_S) as running:
        body = {**STREAM, "input": "hello", "messages": MESSAGES}
        async with (
            aiohttp.ClientSession() as session,
            session.post(running.url + path, json=body) as response,
        ):
            heard = Hearing(response)
            await heard.until(COMMENT)
            letting_go.set()
            event = (await heard.rest()).replace(COMMENT, b"")
        assert event.startswith(expected)
        error = json.loads(event.partition(b"data: ")[2])["error"]
        assert (error["message"], error["type"]) == ("too long", "invalid_request_error")
        assert running.outcomes() == {"refused_by_engine": 1.0}


async def test_the_official_clients_pass_over_it() -> None:
    async def slow_chat(wire: Wire, asked: Asked) -> None:
        wire.begin()
        await asyncio.sleep(3 * EVERY_S)
        wire.part(chunk({"content": "Hi"}))
        await asyncio.sleep(3 * EVERY_S)
        wire.part(chunk({"content": " there"}, "stop") + DONE)
        wire.end()

    async def slow_message(wire: Wire, asked: Asked) -> None:
        wire.begin()
        for name, told in (
            ("message_start", {"message": {"id": "m", "role": "assistant", "content": []}}),
            ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
            ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "Hi"}}),
            ("message_stop", {}),
        ):
            await asyncio.sleep(2 * EVERY_S)
            wire.part(f"event: {name}\ndata: {json.dumps({'type': name, **told})}\n\n".encode())
        wire.end()

    async with frontend(slow_chat, keep_alive_s=EVERY_S) as running, client(running) as asking:
        stream = await asking.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        said = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        assert "".join(said) == "Hi there"
    async with (
        frontend(slow_message, keep_alive_s=EVERY_S) as running,
        anthropic.AsyncAnthropic(base_url=running.url, api_key="k") as asks,
    ):
        events = await asks.messages.create(
            model=MODEL, messages=MESSAGES, max_tokens=4, stream=True
        )
        assert [event.type async for event in events][-1] == "message_stop"


class Slow(TokenEngine):
    """Waits before each of its tokens."""

    async def generate(self, payload: bytes, context: Any) -> AsyncIterator[bytes]:
        async for item in super().generate(payload, context):
            await asyncio.sleep(3 * EVERY_S)
            yield item


async def test_answers_made_from_tokens() -> None:
    chat = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "stream": True}
    for path, asked in (("/v1/completions", STREAM), ("/v1/chat/completions", chat)):
        async with token_frontend(Slow(1, " jumps"), keep_alive_s=EVERY_S) as asking:
            response = await asking.http.post(path, json=asked)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.startswith(COMMENT.decode())
        assert response.text.count(COMMENT.decode()) >= 3
        events = response.text.replace(COMMENT.decode(), "").strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])


async def test_a_refusal_keeps_its_status_however_long_an_engine_was_waited_for() -> None:
    async with token_frontend(TokenEngine(1, "x"), keep_alive_s=EVERY_S) as asking:

        async def assign(job: Job) -> Assigned:
            await asyncio.sleep(5 * EVERY_S)
            raise overloaded("all are busy", 1, 529)

        asking.fleet.assign = assign  # type: ignore[method-assign]
        assert (await asking.http.post("/v1/completions", json=STREAM)).status_code == 529


async def test_while_another_engine_computes_the_prompt() -> None:
    prefilling = asyncio.Event()

    async def computes(wire: Wire, asked: Asked) -> None:
        await prefilling.wait()
        wire.whole(b"{}")

    async with frontend(Halting(FIRST, DONE), computes, keep_alive_s=EVERY_S) as running:
        running.fleet.prefill = Worker(2, running.fleet.engines[1].url)
        async with hearing(running) as heard:
            await heard.until(COMMENT)
            prefilling.set()
            assert (await heard.rest()).replace(COMMENT, b"") == FIRST + DONE


async def test_a_client_that_reads_too_slowly_gets_all_in_order() -> None:
    """Sending waits, as a server's does while its buffer is full."""
    sent: list[bytes] = []
    room, waiting = asyncio.Event(), asyncio.Semaphore(1)

    async def send(message: Any) -> None:
        async with waiting:  # in the order of the calls
            await room.wait()
            sent.append(message.get("body", b"start"))

    reply = Reply(send, "r1")
    with KeepAlive(EVERY_S).watching(reply, lambda: EVENT_STREAM):
        await asyncio.sleep(2 * EVERY_S)  # it wants to begin, and cannot
        working = asyncio.ensure_future(reply.part(SECOND[:7]))
        await asyncio.sleep(3 * EVERY_S)
        room.set()
        await working
        await reply.part(SECOND[7:])
    await reply.end()
    assert sent[0] == b"start"
    assert b"".join(sent[1:]).replace(COMMENT, b"") == SECOND
    assert SECOND in b"".join(sent)


async def test_one_timer_sees_to_all_streams_and_rests_when_there_are_none() -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    keeper, said = KeepAlive(EVERY_S), 0
    for _ in range(2):
        replies = [Reply(send, f"r{number}") for number in range(3)]
        with contextlib.ExitStack() as stack:
            for reply in replies:
                stack.enter_context(keeper.watching(reply, lambda: EVENT_STREAM))
            async with asyncio.timeout(WAIT_S):
                while sent.count(COMMENT) < said + len(replies):
                    await asyncio.sleep(0.01)
        said = sent.count(COMMENT)  # a loop that stood still has made more
        assert all(reply.status == 200 for reply in replies)
        await asyncio.sleep(3 * EVERY_S)
        assert sent.count(COMMENT) == said
