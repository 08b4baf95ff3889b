"""Pass-through over real connections: bytes, faults, retries, limits, clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from frontend.gate import Gate
from tests.frontend.engines import MODEL, Running, Worker, frontend
from tests.runtime.engines.scripted import Asked, Wire

COMPLETION = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
EVENTS = [b'data: {"n":%d}\n\n' % n for n in range(5)] + [b"data: [DONE]\n\n"]


async def answer(wire: Wire, asked: Asked) -> None:
    wire.whole(b'{"object": "text_completion",  "weird":  [1, 2.50]}')


async def stream(wire: Wire, asked: Asked) -> None:
    wire.begin()
    for event in EVENTS:
        wire.part(event)
        await asyncio.sleep(0)
    wire.end()


async def refuse(wire: Wire, asked: Asked) -> None:
    wire.break_off()


async def break_mid_stream(wire: Wire, asked: Asked) -> None:
    wire.begin()
    wire.part(EVENTS[0])
    await asyncio.sleep(0.05)
    wire.break_off()


async def break_mid_body(wire: Wire, asked: Asked) -> None:
    wire.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
    await asyncio.sleep(0.05)
    wire.break_off()


async def say_nothing(wire: Wire, asked: Asked) -> None:
    await wire.gone.wait()


class Reply:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


async def post(
    running: Running,
    body: Any = COMPLETION,
    path: str = "/v1/completions",
    headers: dict[str, str] | None = None,
) -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    timeout = aiohttp.ClientTimeout(total=30)
    headers = {"content-type": "application/json", **(headers or {})}
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(running.url + path, data=data, headers=headers) as response,
    ):
        return Reply(response.status, response.headers, await response.read())


async def test_an_answer_comes_back_as_the_engine_made_it() -> None:
    async with frontend(answer) as running:
        sent = b'{"model":"test/model",  "prompt": "h\\u00e9llo", "own_field": {"a": 1}}'
        reply = await post(running, sent, headers={"X-Request-Id": "mine-1", "x-own": "yes"})
        (asked,) = running.fleet.engines[0].asked
        assert reply.body == b'{"object": "text_completion",  "weird":  [1, 2.50]}'
        assert reply.headers["x-request-id"] == "mine-1"
        assert reply.headers["x-kvbm-worker"] == "1.0"
        assert reply.headers["x-kvbm-cached-tokens"] == "32"
        assert asked.body == sent
        assert asked.headers["x-request-id"] == "mine-1"
        assert asked.headers["x-own"] == "yes"
        assert asked.headers["traceparent"].startswith("00-")
        assert running.fleet.given[0].notes == ["end"], "its end is no first token"
        assert not [sample for one in running.meter.ttft.collect() for sample in one.samples]
        assert running.outcomes() == {"success": 1.0}


async def test_a_stream_comes_back_as_the_engine_made_it() -> None:
    async with frontend(stream) as running:
        reply = await post(running, {**COMPLETION, "stream": True})
        assert reply.body == b"".join(EVENTS)
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        notes = running.fleet.given[0].notes
        assert notes[0] == "first"
        assert notes[-1] == "end"
        assert _output(running) == len(EVENTS) - 2, "[DONE] is no token; the first was told of"
        assert _counts(running) == {"estimated": len(EVENTS) - 1}


async def test_a_whole_answers_tokens_are_counted_and_an_errors_are_not() -> None:
    async def whole(wire: Wire, asked: Asked) -> None:
        status = 500 if b"bad" in asked.body else 200
        wire.whole(b'{"choices":[],"usage":{"completion_tokens":5}}', status)

    async with frontend(whole) as running:
        await post(running)
        await post(running, {**COMPLETION, "prompt": "bad"})
        assert [given.notes for given in running.fleet.given] == [["answered 5", "end"], ["end"]]
        assert _counts(running) == {"told": 5}


async def test_a_stream_that_says_its_tokens_is_believed() -> None:
    async def burst(wire: Wire, asked: Asked) -> None:
        wire.begin()
        for event in (*EVENTS[:2], b'data: {"usage":{"completion_tokens":9}}\n\n', EVENTS[-1]):
            wire.part(event)
        wire.end()

    async with frontend(burst) as running:
        await post(running, {**COMPLETION, "stream": True})
        assert _output(running) == 8
        assert _counts(running) == {"told": 9}


def _output(running: Running) -> int:
    """Tokens that the router was told of, but the first."""
    notes = running.fleet.given[0].notes
    return sum(int(note.split()[1]) for note in notes if "output" in note)


def _counts(running: Running) -> dict[str, float]:
    return {
        sample.labels["count"]: sample.value
        for metric in running.meter.output_tokens.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


async def test_a_trace_goes_on() -> None:
    async with frontend(answer) as running:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await post(running, headers={"traceparent": trace, "tracestate": "a=b"})
        await post(running, headers={"traceparent": "nonsense"})
        first, second = running.fleet.engines[0].asked
        assert first.headers["traceparent"][:36] == trace[:36]
        assert first.headers["traceparent"][36:52] != trace[36:52]
        assert first.headers["tracestate"] == "a=b"
        assert second.headers["traceparent"].startswith("00-")


async def test_an_engines_own_error_is_its_answer() -> None:
    async def error(wire: Wire, asked: Asked) -> None:
        wire.whole(b'{"error":{"message":"too long","code":400}}', 400)

    async with frontend(error, answer) as running:
        reply = await post(running)
        assert (reply.status, reply.error["code"]) == (400, 400)
        assert running.outcomes() == {"engine_400": 1.0}
        assert len(running.fleet.given) == 1


@pytest.mark.parametrize("broken", [refuse, break_mid_body])
async def test_a_request_goes_to_another_engine_while_nothing_was_answered(broken: Any) -> None:
    async with frontend(broken, answer) as running:
        reply = await post(running)
        assert reply.status == 200
        assert reply.headers["x-kvbm-worker"] == "2.0"
        assert running.fleet.given[0].notes == ["failed", "end"]
        assert running.fleet.jobs[1].excluded == (1,)


async def test_engines_that_cannot_be_reached_are_all_tried() -> None:
    async with frontend(answer, answer, answer, answer) as running:
        for engine in running.fleet.engines[:3]:
            await engine.stop()
        reply = await post(running)
        assert reply.headers["x-kvbm-worker"] == "4.0"


async def test_a_request_that_kills_engines_does_not_kill_all() -> None:
    async with frontend(refuse, refuse, answer, migrations_max=1) as running:
        reply = await post(running)
        assert (reply.status, reply.error["code"]) == (502, "engine_lost")
        assert not running.fleet.engines[2].asked


async def test_a_stream_that_breaks_ends_with_an_error() -> None:
    async with frontend(break_mid_stream, answer) as running:
        reply = await post(running, {**COMPLETION, "stream": True})
        first, last = reply.body.strip().split(b"\n\n")
        assert first + b"\n\n" == EVENTS[0]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_lost"
        assert running.outcomes() == {"engine_lost": 1.0}


async def test_an_engine_that_says_nothing_is_given_up() -> None:
    async with frontend(say_nothing, answer, silence_s=0.3) as running:
        assert (await post(running)).headers["x-kvbm-worker"] == "2.0"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_ends_the_engines_work(streamed: bool) -> None:
    async def slow(wire: Wire, asked: Asked) -> None:
        if streamed:
            wire.begin()
            wire.part(EVENTS[0])
        await wire.gone.wait()

    async with frontend(slow) as running:
        _, writer = await _asking(running)
        engine = running.fleet.engines[0]
        while not engine.asked:
            await asyncio.sleep(0.01)
        writer.close()
        async with asyncio.timeout(60):
            await engine.wires[0].gone.wait()
            while not running.outcomes():
                await asyncio.sleep(0.01)
        assert running.outcomes() == {"cancelled": 1.0}
        assert running.gate.requests == 0
        assert running.fleet.given[0].notes[-1] == "end"
        assert "whole" not in running.fleet.given[0].notes


async def test_a_client_may_leave_once_it_has_all() -> None:
    """As OpenAI's does: its engine may still have to end the stream."""

    async def all_but_the_end(wire: Wire, asked: Asked) -> None:
        wire.begin()
        for event in (*EVENTS[:2], b'data: {"usage":{"completion_tokens":9}}\n\n', EVENTS[-1]):
            wire.part(event)
        await wire.gone.wait()

    async with frontend(all_but_the_end) as running:
        reader, writer = await _asking(running)
        async with asyncio.timeout(60):
            await reader.readuntil(b"data: [DONE]\n\n")
            assert running.fleet.given[0].notes[-1] == "whole", "told before the client has it"
            writer.close()
            while not running.outcomes():
                await asyncio.sleep(0.01)
        assert running.outcomes() == {"success": 1.0}
        assert _counts(running) == {"told": 9}


async def _asking(running: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = running.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(COMPLETION).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    return reader, writer


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_json", None),
        (b"\xff\xfe", 400, "invalid_json", None),
        (b"[1]", 400, "invalid_value", None),
        ({"prompt": "x"}, 400, "missing", "model"),
        ({"model": "other", "prompt": "x"}, 404, "model_not_found", "model"),
        ({"model": MODEL, "prompt": 4}, 400, "invalid_value", "prompt"),
        ({"model": MODEL, "prompt": [1, "x", -1]}, 400, "invalid_value", "prompt"),
        ({"model": MODEL, "prompt": [1, 1 << 40]}, 400, "invalid_value", "prompt"),
        ({"model": MODEL, "prompt": "x", "max_tokens": "many"}, 400, "invalid_value", "max_tokens"),
    ],
)
async def test_bad_requests_say_what_is_wrong(
    body: Any, status: int, code: str, param: str | None
) -> None:
    async with frontend(answer) as running:
        reply = await post(running, body)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (status, code, param)
        assert not running.fleet.engines[0].asked


async def test_chat_needs_messages() -> None:
    async with frontend(answer) as running:
        reply = await post(running, {"model": MODEL}, "/v1/chat/completions")
        assert (reply.status, reply.error["param"]) == (400, "messages")


async def test_engines_that_ask_for_a_key_get_theirs_and_not_the_clients() -> None:
    async with frontend(answer, engine_key="the-engines") as running:
        await post(running, headers={"authorization": "Bearer the-clients", "x-api-key": "same"})
        [asked] = running.fleet.engines[0].asked
        assert asked.headers["authorization"] == "Bearer the-engines"
        assert "x-api-key" not in asked.headers


async def test_keys() -> None:
    async with frontend(answer, gate=Gate(("one", "two"), 8, 1 << 20)) as running:
        assert (await post(running)).status == 401
        for headers, status in [
            ({"authorization": "Bearer three"}, 401),
            ({"authorization": "Bearer two"}, 200),
            ({"x-api-key": "one"}, 200),
            ({"authorization": "Basic one"}, 401),
        ]:
            assert (await post(running, headers=headers)).status == status
        for asked in running.fleet.engines[0].asked:
            assert not asked.headers.keys() & {"authorization", "x-api-key"}
        async with aiohttp.ClientSession() as session:
            async with session.get(running.url + "/v1/models") as response:
                assert response.status == 401
            async with session.get(running.url + "/health") as response:
                assert response.status == 200


async def test_too_much_is_refused() -> None:
    async with frontend(answer, gate=Gate((), 8, 100)) as running:
        reply = await post(running, {**COMPLETION, "prompt": "x" * 100})
        assert (reply.status, reply.error["code"]) == (413, "body_too_large")

        async def pieces() -> Any:
            for _ in range(20):
                yield b"x" * 10

        async with aiohttp.ClientSession() as session:
            url = running.url + "/v1/completions"
            async with session.post(url, data=pieces()) as response:
                assert response.status == 413


async def test_too_many_are_refused() -> None:
    async with frontend(say_nothing, gate=Gate((), 1, 1 << 20)) as running:
        waiting = asyncio.ensure_future(post(running))
        while running.gate.requests == 0:
            await asyncio.sleep(0.01)
        reply = await post(running)
        assert (reply.status, reply.error["code"]) == (503, "overloaded")
        assert reply.headers["retry-after"] == "1"
        waiting.cancel()


async def test_a_rank_is_named_where_there_are_several() -> None:
    async with frontend(answer) as running:
        running.fleet.dp_size = 2
        await post(running)
        assert running.fleet.engines[0].asked[0].headers["x-data-parallel-rank"] == "0"


@pytest.mark.parametrize("prefill", [answer, refuse])
async def test_a_prompt_is_computed_elsewhere_first(prefill: Any) -> None:
    async with frontend(answer, prefill) as running:
        first, second = running.fleet.engines
        running.fleet.prefill = Worker(second.instance, second.url)
        more = {"stream": True, "stream_options": {"include_usage": True}, "own": [1]}
        reply = await post(running, {**COMPLETION, **more})
        assert reply.status == 200
        sent = second.asked[0].json
        assert (sent["max_tokens"], sent["stream"], sent["own"]) == (1, False, [1])
        assert "stream_options" not in sent
        assert first.asked[0].json == {**COMPLETION, **more}
        assert running.fleet.given[0].notes == ["prefilled", "end"]


@pytest.mark.parametrize(
    ("path", "given", "only"),
    [
        (
            "/v1/chat/completions",
            {"messages": [], "max_completion_tokens": 9},
            {"max_completion_tokens": 1, "max_tokens": 1, "n": 1},
        ),
        (
            "/v1/responses",
            {"input": "x", "background": True},
            {"max_output_tokens": 1, "store": False, "background": False},
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [5], "sampling_params": {"max_tokens": 9, "seed": 3}},
            {"sampling_params": {"max_tokens": 1, "n": 1, "seed": 3}},
        ),
    ],
)
async def test_the_one_who_computes_a_prompt_makes_one_token(
    path: str, given: dict[str, Any], only: dict[str, Any]
) -> None:
    async with frontend(answer, answer) as running:
        second = running.fleet.engines[1]
        running.fleet.prefill = Worker(second.instance, second.url)
        await post(running, {"model": MODEL, **given}, path)
        assert second.asked[0].json == {"model": MODEL, **given, "stream": False, **only}


async def test_a_worker_that_is_asked_for() -> None:
    async with frontend(answer) as running:
        await post(running, headers={"x-worker-instance-id": "1f"})
        assert running.fleet.jobs[0].pinned == 0x1F
        reply = await post(running, headers={"x-worker-instance-id": "first"})
        assert (reply.status, reply.error["param"]) == (400, "x-worker-instance-id")


async def test_paths_that_are_not_there() -> None:
    async with frontend(answer) as running:
        reply = await post(running, path="/v1/nothing")
        assert (reply.status, reply.error["code"]) == (404, "not_found")
        async with (
            aiohttp.ClientSession() as session,
            session.get(running.url + "/v1/completions") as response,
        ):
            assert response.status == 405
