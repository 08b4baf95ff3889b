"""A mock engine's OpenAI server: what clients of the real ones rely on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocker.gauges import Gauges
from mocker.http import HEAD_BYTES_MAX, HttpServer
from mocker.openai import OpenAi
from mocker.realtime import RealtimeEngine
from mocker.text import VOCABULARY, conversation, text_of, tokens_of
from mocker.timing import PS_PER_MS, StepTiming
from runtime.hashing import block_hashes
from tests.mocker.builders import settings
from tests.plain_http import PLAIN

TIMING = StepTiming(PS_PER_MS, PS_PER_MS, 1000, 0, 0)
MODEL = "mock"
WAIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Kernels, so that no request waits for them."""
    block_hashes(range(16), 16)


@dataclass
class Served:
    engine: RealtimeEngine
    client: httpx.AsyncClient
    port: int

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def raw(self, *pieces: bytes) -> bytes:
        """What comes back for these bytes until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        async with asyncio.timeout(WAIT_S):
            data = await reader.read()
        writer.close()
        return data


@asynccontextmanager
async def served(speedup: float = 1000.0, **engine: Any) -> AsyncIterator[Served]:
    gauges = Gauges(MODEL)
    given = settings(timing=TIMING, num_blocks=4096, **engine)
    async with RealtimeEngine(
        given, speedup=speedup, on_end=gauges.ended, vocabulary=VOCABULARY
    ) as mock:
        server = HttpServer(OpenAi(mock, MODEL, gauges, context_tokens=8192))
        await server.start()
        port = int(server.url.rpartition(":")[2])
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, verify=PLAIN) as client:
            yield Served(mock, client, port)
        await server.close()
        mock.engine.check_integrity()
        assert mock.engine.pool.used_count == 0


def events(text: str) -> list[dict[str, Any]]:
    *pieces, done, empty = text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces]


async def test_a_streamed_answer_is_the_whole_one_in_pieces() -> None:
    asked = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 7}
    async with served() as one:
        whole = (await one.post("/v1/completions", asked)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = await one.post("/v1/completions", asked | options)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        *pieces, usage = events(streamed.text)
        assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
        assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * 6 + ["length"]
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 7
        assert whole["usage"]["prompt_tokens"] == 4
        assert len(tokens_of(whole["choices"][0]["text"])) == 7


async def test_the_next_turn_of_a_conversation_finds_the_ones_before() -> None:
    said = [{"role": "user", "content": "How do I brew coffee without a machine?"}]
    async with served() as one:
        first = (
            await one.post("/v1/chat/completions", {"messages": said, "max_tokens": 40})
        ).json()
        said.append(first["choices"][0]["message"])
        said.append({"role": "user", "content": "And tea?"})
        asked = {"messages": said, "max_tokens": 2, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        *pieces, last = events((await one.post("/v1/chat/completions", asked)).text)
        assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        before = first["usage"]["total_tokens"]
        cached = last["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert before - 8 < cached <= before, "all whole blocks but what has no KV yet"


async def test_a_client_that_leaves_ends_its_request() -> None:
    async with served(speedup=1.0) as one:
        asked = {"prompt": "x", "max_tokens": 8000, "stream": True}
        async with one.client.stream("POST", "/v1/completions", json=asked) as answer:
            async for _ in answer.aiter_bytes():
                break
        async with asyncio.timeout(WAIT_S):
            while one.engine.engine.running_count:
                await asyncio.sleep(0.005)
        text = (await one.client.get("/metrics")).text
        assert 'finished_reason="abort"} 1' in text


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "does not exist"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "one text"),
        ("/v1/completions", {"prompt": [1, -1]}, 400, "token ids"),
        ("/v1/completions", {"prompt": "x", "n": 2}, 400, "n:"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 9000}, 400, "8192"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/nothing", {}, 404, "/v1/nothing"),
    ],
)
async def test_what_cannot_be_answered_is_an_error_object(
    path: str, body: dict[str, Any], status: int, said: str
) -> None:
    async with served() as one:
        answer = await one.post(path, body)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert said in error["message"] and error["code"] == status


async def test_what_is_asked_of_every_engine() -> None:
    async with served() as one:
        assert (await one.client.get("/health")).status_code == 200
        models = (await one.client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["max_model_len"]) for model in models] == [(MODEL, 8192)]
        await one.post("/v1/completions", {"prompt": [[5, 6, 7, 8, 9]], "max_tokens": 3})
        text = (await one.client.get("/metrics")).text
        for line in (
            'vllm:prompt_tokens_total{model_name="mock",engine="0"} 5',
            'vllm:generation_tokens_total{model_name="mock",engine="0"} 3',
            'vllm:time_to_first_token_seconds_count{model_name="mock",engine="0"} 1',
            'vllm:inter_token_latency_seconds_count{model_name="mock",engine="0"} 2',
            'vllm:num_requests_running{model_name="mock",engine="0"} 0',
        ):
            assert line in text.splitlines()


async def test_requests_come_in_pieces_one_behind_another_and_in_chunks() -> None:
    body = b'{"prompt":"x","max_tokens":1}'
    plain = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    chunks = b"3\r\n" + body[:3] + b"\r\n%x\r\n" % (len(body) - 3) + body[3:] + b"\r\n0\r\n\r\n"
    chunked = b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n"
    chunked += b"connection: close\r\n\r\n" + chunks
    async with served() as one:
        data = await one.raw(plain[:10], plain[10:] + plain + chunked[:70], chunked[70:])
        assert data.count(b"HTTP/1.1 200 OK") == 3
        assert data.count(b'"text_completion"') == 3


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\ncontent-length: many\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n", b"413"),
        (b"GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"x" * (HEAD_BYTES_MAX + 10), b"431"),
    ],
)
async def test_bytes_that_are_no_request_are_answered_and_the_connection_closed(
    sent: bytes, status: bytes
) -> None:
    async with served() as one:
        assert (await one.raw(sent)).startswith(b"HTTP/1.1 " + status)
        assert (await one.client.get("/health")).status_code == 200


async def test_closing_the_engine_ends_streams_with_an_error() -> None:
    async with served(speedup=1.0) as one:
        asked = {"prompt": "x", "max_tokens": 8000, "stream": True}
        async with one.client.stream("POST", "/v1/completions", json=asked) as answer:
            pieces = answer.aiter_text()
            text = await anext(pieces)
            one.engine.close()
            text += "".join([piece async for piece in pieces])
        assert "the engine was closed" in text
        refused = await one.post("/v1/completions", asked)
        assert refused.status_code == 503
        # What was running is left as it was when the engine closed.
        for number in list(one.engine.engine._by_id):
            one.engine.engine.cancel(number, one.engine._moment_ps())


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=50))
def test_text_and_tokens_are_each_others(tokens: list[int]) -> None:
    assert tokens_of(text_of(tokens)) == tokens


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=30)), max_size=5)
)
def test_a_longer_conversation_begins_with_the_shorter(said: list[tuple[str, str]]) -> None:
    long = tokens_of(conversation([*said, ("assistant", "well"), ("user", "so")]))
    short = tokens_of(conversation(said))
    assert long[: len(short)] == short
