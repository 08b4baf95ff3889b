"""KServe's protocol, spoken by Triton's own client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from frontend.kserve.messages import _TABLE, message
from frontend.kserve.service import InferenceService, start_server
from runtime.server_process import free_ports
from tests.frontend.engines import MODEL
from tests.frontend.test_token_routes import ANSWER
from tests.frontend.token_engines import Asking, TokenEngine, token_frontend

PROMPT = b"the quick brown fox"


@contextlib.asynccontextmanager
async def serving(*engines: TokenEngine) -> AsyncIterator[tuple[Any, Asking]]:
    async with token_frontend(*engines) as asking:
        service = InferenceService(asking.fleet, asking.exchanges.posted["/v1/completions"], "1.2")
        (port,) = free_ports(1)
        server = await start_server(service, "127.0.0.1", port, bytes_max=1 << 20)
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        try:
            yield client, asking
        finally:
            await client.close()
            await server.stop(1.0)


def inputs(text: bytes = PROMPT, streaming: bool | None = None) -> list[Any]:
    import numpy as np

    made = triton.InferInput("text_input", [1], np_to_triton_dtype(np.object_))
    made.set_data_from_numpy(np.array([text], dtype=np.object_))
    if streaming is None:
        return [made]
    flag = triton.InferInput("streaming", [1], "BOOL")
    flag.set_data_from_numpy(np.array([streaming]))
    return [made, flag]


def test_fields_are_the_protocols() -> None:
    """By name, number and kind, for every message that a client's library has."""
    for name in _TABLE:
        ours = message(name).DESCRIPTOR
        theirs = service_pb2.DESCRIPTOR.message_types_by_name.get(name.partition(".")[0])
        if theirs is None:
            from tritonclient.grpc import model_config_pb2

            theirs = model_config_pb2.DESCRIPTOR.message_types_by_name[name]
        for inner in name.split(".")[1:]:
            theirs = theirs.nested_types_by_name[inner]
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            is_enumeration = other.type == other.TYPE_ENUM
            assert field.number == other.number, field.full_name
            assert is_enumeration or field.type == other.type, field.full_name
            assert field.is_repeated == other.is_repeated, field.full_name


async def test_what_describes_it() -> None:
    async with serving(TokenEngine(1, ANSWER)) as (client, asking):
        assert await client.is_server_live()
        assert await client.is_model_ready(MODEL) is bool(asking.fleet.models())
        assert await client.is_server_ready()
        assert (await client.get_server_metadata()).version == "1.2"
        found = await client.get_model_metadata(MODEL)
        assert [one.name for one in found.inputs] == ["text_input", "streaming"]
        assert [one.name for one in found.outputs] == ["text_output", "finish_reason"]
        config = (await client.get_model_config(MODEL)).config
        assert config.model_transaction_policy.decoupled
        assert config.input[0].data_type == 13  # TYPE_STRING
        assert not await client.is_model_ready("other")
        with pytest.raises(InferenceServerException, match="does not exist") as unknown:
            await client.get_model_metadata("other")
        assert "NOT_FOUND" in unknown.value.status()


async def test_an_inference() -> None:
    engine = TokenEngine(1, ANSWER)
    async with serving(engine) as (client, _):
        found = await client.infer(
            MODEL, inputs(), request_id="r1", parameters={"max_tokens": 200, "top_k": 5}
        )
        assert found.as_numpy("text_output")[0].decode() == ANSWER
        assert found.as_numpy("finish_reason")[0] == b"stop"
        assert found.get_response().id == "r1"
        assert engine.asked[0].sampling.top_k == 5


async def test_a_streamed_inference() -> None:
    async with serving(TokenEngine(1, ANSWER)) as (client, _):

        async def requests() -> AsyncIterator[dict[str, Any]]:
            more = {"max_tokens": 200}
            yield {"model_name": MODEL, "inputs": inputs(streaming=True), "parameters": more}
            yield {"model_name": MODEL, "inputs": inputs(streaming=False), "parameters": more}
            yield {"model_name": "other", "inputs": inputs()}
            yield {"model_name": MODEL, "inputs": inputs(), "parameters": {"max_tokens": 2}}

        texts: list[list[str]] = [[]]
        errors = []
        async for result, error in client.stream_infer(requests()):
            if error is not None:
                errors.append(error.message())
                continue
            texts[-1].append(result.as_numpy("text_output")[0].decode())
            if result.as_numpy("finish_reason")[0]:
                texts.append([])
        assert "".join(texts[0]) == ANSWER
        assert len(texts[0]) > 5
        assert texts[1] == [ANSWER]
        assert "".join(texts[2]) and ANSWER.startswith("".join(texts[2]))
        assert len(errors) == 1
        assert "other" in errors[0]


async def test_bad_requests_say_what_is_wrong() -> None:
    async with serving(TokenEngine(1, ANSWER)) as (client, asking):
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"model_name": "other", "inputs": inputs()}, "other"),
            ({"model_name": MODEL, "inputs": inputs(b"\xff\xfe")}, "UTF-8"),
            ({"model_name": MODEL, "inputs": inputs(streaming=True)[1:]}, "text_input"),
            (
                {"model_name": MODEL, "inputs": inputs(), "parameters": {"max_tokens": "x"}},
                "max_tokens",
            ),
        ]
        for given, said in wrong:
            with pytest.raises(InferenceServerException, match=said):
                await client.infer(**given)
        assert not asking.given


async def test_an_engine_that_is_lost_for_good() -> None:
    engines = [TokenEngine(number, ANSWER, crash_after=1) for number in (1, 2)]
    async with serving(*engines) as (client, _):
        with pytest.raises(InferenceServerException, match="lost") as lost:
            await client.infer(MODEL, inputs())
        assert str(grpc.StatusCode.UNAVAILABLE) in lost.value.status()
