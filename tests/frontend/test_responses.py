"""Responses that engines keep: each request about one goes to the engine that has it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from frontend.meter import Meter
from frontend.responses import Makers
from tests.frontend.engines import MODEL, Running, Worker, frontend
from tests.frontend.test_openai_client import client
from tests.plain_http import PLAIN
from tests.runtime.engines.scripted import Asked, Wire


class Keeping:
    """An engine's script that keeps what it answered, as OpenAI does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: dict[str, dict[str, Any]] = {}

    async def __call__(self, wire: Wire, asked: Asked) -> None:
        path, _, _ = asked.path.partition("?")
        parts = path.removeprefix("/v1/responses").strip("/").split("/")
        if parts == [""]:
            self._create(wire, asked.json)
        elif parts[0] not in self.kept:
            wire.whole(b'{"error": {"message": "not here", "code": 404}}', 404)
        elif parts[1:] == ["input_items"]:
            item = {"id": "i", "type": "message", "role": "user", "content": (), "status": None}
            wire.whole(json.dumps({"object": "list", "data": [item], "has_more": False}).encode())
        elif "stream=true" in asked.path:
            self._stream(wire, self.kept[parts[0]])
        else:
            response = self.kept[parts[0]]
            if asked.method == "DELETE":
                del self.kept[parts[0]]
                response = {"id": parts[0], "object": "response.deleted", "deleted": True}
            elif parts[1:] == ["cancel"]:
                response["status"] = "cancelled"
            wire.whole(json.dumps(response).encode())

    def _create(self, wire: Wire, asked: dict[str, Any]) -> None:
        previous = asked.get("previous_response_id")
        if previous is not None and previous not in self.kept:
            wire.whole(b'{"error": {"message": "no such previous response"}}', 404)
            return
        made: dict[str, Any] = {
            "id": f"resp_{self.name}{len(self.kept)}",
            "object": "response",
            "created_at": 1,
            "model": MODEL,
            "status": "completed",
            "output": [],
            "previous_response_id": previous,
        }
        self.kept[str(made["id"])] = made
        if asked.get("stream"):
            self._stream(wire, made)
        else:
            wire.whole(json.dumps(made).encode())

    def _stream(self, wire: Wire, made: dict[str, Any]) -> None:
        wire.begin()
        for number, kind in enumerate(("response.created", "response.completed")):
            event = {"type": kind, "sequence_number": number, "response": made}
            data = f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode()
            wire.part(data[:20])  # an event comes in pieces
            wire.part(data[20:])
        wire.end()


def searches(meter: Meter) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for sample in next(iter(meter.response_searches.collect())).samples
        if sample.name.endswith("_total")
    }


def turn(running: Running) -> None:
    """Other engines come first from now on."""
    running.fleet.engines = list(reversed(running.fleet.engines))


async def test_what_the_official_client_asks_about_one() -> None:
    a, b = Keeping("a"), Keeping("b")
    async with frontend(a, b) as running, client(running) as asking:
        made = await asking.responses.create(model=MODEL, input="hello")
        turn(running)
        assert (await asking.responses.retrieve(made.id)).id == made.id == "resp_a0"
        assert [item.id async for item in asking.responses.input_items.list(made.id)] == ["i"]
        assert (await asking.responses.cancel(made.id)).status == "cancelled"
        again = await asking.responses.retrieve(made.id, stream=True)
        assert [event.type async for event in again][-1] == "response.completed"
        follows = await asking.responses.create(
            model=MODEL, input="more", previous_response_id=made.id
        )
        assert (follows.id, follows.previous_response_id) == ("resp_a1", made.id)
        await asking.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError) as gone:
            await asking.responses.retrieve(made.id)
        assert gone.value.code == "response_not_found"
        assert not b.kept
        assert searches(running.meter) == {"not_found": 1.0}  # of the one that was deleted
        requests = running.meter.requests.labels("", "/v1/responses/{response_id}", "success")
        assert requests._value.get() == 5.0


async def test_an_id_is_known_before_the_client_sees_it_in_a_stream() -> None:
    a, b = Keeping("a"), Keeping("b")
    async with frontend(a, b) as running, client(running) as asking:
        stream = await asking.responses.create(model=MODEL, input="hello", stream=True)
        turn(running)
        async for event in stream:
            if event.type == "response.created":
                assert (await asking.responses.retrieve(event.response.id)).id == "resp_a0"
        assert searches(running.meter) == {}


async def test_what_another_frontend_answered_is_found_by_asking_the_engines() -> None:
    a, b = Keeping("a"), Keeping("b")
    b.kept["resp_b7"] = {"id": "resp_b7", "object": "response", "output": [], "status": "queued"}
    async with frontend(a, b) as running, client(running) as asking:
        assert (await asking.responses.retrieve("resp_b7")).id == "resp_b7"
        assert (await asking.responses.retrieve("resp_b7")).id == "resp_b7"
        made = await asking.responses.create(
            model=MODEL, input="more", previous_response_id="resp_b7"
        )
        assert made.id == "resp_b1"
        assert searches(running.meter) == {"found": 1.0}


async def test_an_id_that_no_engine_has() -> None:
    async def dead(wire: Wire, asked: Asked) -> None:
        wire.break_off()

    async with frontend(Keeping("a"), dead) as running, client(running) as asking:
        with pytest.raises(openai.NotFoundError) as missing:
            await asking.responses.retrieve("resp_x")
        assert missing.value.body == {
            "message": "Response with id 'resp_x' not found",
            "type": "not_found_error",
            "param": "response_id",
            "code": "response_not_found",
        }
        with pytest.raises(openai.NotFoundError, match="no such previous"):  # the engine's say
            await asking.responses.create(model=MODEL, input="x", previous_response_id="resp_x")
        asked = [len(engine.asked) for engine in running.fleet.engines]
        async with httpx.AsyncClient(verify=PLAIN) as http:
            for odd in ("%2e%2e", "a%20b", "x" * 300):
                reply = await http.get(f"{running.url}/v1/responses/{odd}")
                assert (reply.status_code, reply.json()["error"]["code"]) == (
                    404,
                    "response_not_found",
                )
        assert [len(engine.asked) for engine in running.fleet.engines] == asked  # not worth asking


async def test_what_an_engine_that_has_left_kept_is_gone() -> None:
    a, b = Keeping("a"), Keeping("b")
    async with frontend(a, b) as running, client(running) as asking:
        made = await asking.responses.create(model=MODEL, input="hello")
        running.fleet.engines = running.fleet.engines[1:]
        with pytest.raises(openai.NotFoundError):
            await asking.responses.retrieve(made.id)


async def test_an_engine_that_breaks_is_told_as_lost() -> None:
    a = Keeping("a")

    async def then_dies(wire: Wire, asked: Asked) -> None:
        if asked.method == "POST":
            await a(wire, asked)
        else:
            wire.break_off()

    async with frontend(then_dies) as running, client(running) as asking:
        made = await asking.responses.create(model=MODEL, input="hello")
        with pytest.raises(openai.InternalServerError) as lost:
            await asking.responses.retrieve(made.id)
        assert (lost.value.status_code, lost.value.code) == (502, "engine_lost")


async def test_an_engine_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frontend.responses.ASK_DEADLINE_S", 0.2)
    left = asyncio.Event()

    async def silent(wire: Wire, asked: Asked) -> None:
        await wire.gone.wait()
        left.set()

    async with frontend(silent) as running, client(running) as asking:
        with pytest.raises(openai.NotFoundError):
            await asking.responses.retrieve("resp_x")
        async with asyncio.timeout(30):
            await left.wait()  # nor is it left with the question


def test_only_so_many_are_remembered() -> None:
    meter = Meter()
    makers = Makers(2, meter)
    for number in range(4):
        makers.note(f"r{number}", number)
    makers.forget("r3")
    assert [makers.get(f"r{number}") for number in range(4)] == [None, None, 2, None]
    text = {m.name: m.samples[0].value for m in meter.registry.collect() if "responses" in m.name}
    assert text == {
        "kvbm_frontend_responses_remembered": 1.0,
        "kvbm_frontend_responses_forgotten": 2.0,
    }


async def test_the_engine_that_computes_the_prompt_keeps_nothing() -> None:
    a, prefills = Keeping("a"), Keeping("p")
    async with frontend(a, prefills) as running, client(running) as asking:
        other = running.fleet.engines[1]
        running.fleet.prefill = Worker(2, other.url)
        made = await asking.responses.create(model=MODEL, input="hello", max_output_tokens=50)
        (asked,) = other.asked
        assert (asked.json["max_output_tokens"], asked.json["store"]) == (1, False)
        await asking.responses.create(model=MODEL, input="x", previous_response_id=made.id)
        assert len(other.asked) == 1  # which does not know what came before
