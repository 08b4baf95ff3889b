"""Components call each other by name, over real connections and a shared directory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from runtime.component import NoInstance, Runtime
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.instances import Instances
from runtime.lifecycle import State
from runtime.names import NameRefused
from runtime.pipeline import Stage, pipeline
from runtime.requests import Canary, RequestContext, RequestPlaneSettings, create_request_plane
from runtime.requests.errors import HandlerFailed
from runtime.service import ServiceError, endpoint, handler_of, serve, service


def program(folder: Path, plane: str = "tcp", drain_s: float = 5.0) -> Runtime:
    """A runtime as each program has its own; what they share is the directory."""
    settings = DiscoverySettings(discovery="file", file_directory=folder, file_poll=0.02)
    requests = RequestPlaneSettings(plane=plane)  # type: ignore[arg-type]
    return Runtime(
        create_discovery(settings, {}),
        create_request_plane(requests, "test"),
        drain_timeout_s=drain_s,
    )


def naming(name: str) -> Any:
    async def handler(payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        for part in payload.split():
            yield name.encode() + b":" + part

    return handler


async def all_of(answer: AsyncIterator[bytes]) -> list[bytes]:
    return [item async for item in answer]


@pytest.mark.parametrize("plane", ["tcp", "http"])
async def test_a_function_is_found_by_name_and_its_stream_comes_back(
    tmp_path: Path, plane: str
) -> None:
    async with program(tmp_path, plane) as server, program(tmp_path, plane) as caller:
        place = server.namespace("production").component("Processor").endpoint("chat/completions")
        serving = await place.serve(naming("a"), labels={"gpu": "1"})
        client = caller.endpoint("dyn://production.Processor.chat/completions").client()
        assert await client.wait_for_instances(1) == [serving.name.id]
        assert await all_of(client.generate(b"x y z")) == [b"a:x", b"a:y", b"a:z"]
        assert await all_of(client.direct(b"x", serving.name.id)) == [b"a:x"]
        with pytest.raises(NoInstance, match="no instance 1 that serves; 1 are registered"):
            await all_of(client.direct(b"x", 1))


async def test_namespaces_do_not_see_each_other(tmp_path: Path) -> None:
    async with program(tmp_path) as one, program(tmp_path) as other:
        await one.endpoint("blue.C.e").serve(naming("blue"))
        await one.endpoint("green.C.e").serve(naming("green"))
        assert await all_of(other.endpoint("green.C.e").client().generate(b"x")) == [b"green:x"]
        with pytest.raises(NoInstance, match=r"red\.C\.e has no instance"):
            await all_of(other.endpoint("red.C.e").client().generate(b"x"))
    with pytest.raises(NameRefused, match="component"):
        one.namespace("a").component("no.dots").endpoint("e")


async def test_requests_go_round_and_around_an_instance_that_is_gone(tmp_path: Path) -> None:
    async with program(tmp_path) as caller, AsyncExitStack() as programs:
        runtimes = [await programs.enter_async_context(program(tmp_path)) for _ in range(3)]
        for name, runtime in zip("abc", runtimes, strict=True):
            await runtime.endpoint("n.C.e").serve(naming(name))
        client = caller.endpoint("n.C.e").client(seed=1)
        await client.wait_for_instances(3)
        seen = Counter([(await all_of(client.round_robin(b"x")))[0] for _ in range(9)])
        assert seen == {b"a:x": 3, b"b:x": 3, b"c:x": 3}
        assert len({(await all_of(client.random(b"x")))[0] for _ in range(60)}) == 3
        # Its server ends without a word to discovery, as that of a killed program does.
        await runtimes[0].serving[0].server.close()
        seen = Counter([(await all_of(client.round_robin(b"x")))[0] for _ in range(9)])
        assert set(seen) == {b"b:x", b"c:x"}


async def test_a_handlers_error_reaches_the_caller_and_is_not_tried_elsewhere(
    tmp_path: Path,
) -> None:
    calls = 0

    async def failing(payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        nonlocal calls
        calls += 1
        yield b"first"
        raise ValueError("no such voice")

    async with program(tmp_path) as one, program(tmp_path) as other, program(tmp_path) as caller:
        await one.endpoint("n.C.e").serve(failing)
        await other.endpoint("n.C.e").serve(failing)
        client = caller.endpoint("n.C.e").client()
        await client.wait_for_instances(2)
        answer = client.generate(b"")
        assert await anext(answer) == b"first"
        with pytest.raises(HandlerFailed, match="no such voice"):
            await anext(answer)
        assert calls == 1


async def test_leaving_takes_the_instance_back_and_lets_requests_end(tmp_path: Path) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        begun.set()
        await go_on.wait()
        yield b"done"

    async with program(tmp_path) as caller:
        runtime = program(tmp_path)
        async with runtime:
            serving = await runtime.endpoint("n.C.e").serve(slow)
            client = caller.endpoint("n.C.e").client()
            await client.wait_for_instances(1)
            answer = asyncio.create_task(all_of(client.generate(b"")))
            await begun.wait()
            ending = asyncio.create_task(runtime.close())
            async with asyncio.timeout(60):
                while client.instance_ids:
                    await asyncio.sleep(0.01)
            assert not answer.done(), "it is found no more, and still answers"
            go_on.set()
            assert await answer == [b"done"]
            await ending
        assert serving.state is State.DEREGISTERED


async def test_closing_an_answer_cancels_its_handler(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def endless(payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
                await asyncio.sleep(0)
        finally:
            ended.set()

    async with program(tmp_path) as server, program(tmp_path) as caller:
        await server.endpoint("n.C.e").serve(endless)
        client = caller.endpoint("n.C.e").client()
        await client.wait_for_instances(1)
        answer = client.generate(b"")
        assert await anext(answer) == b"more"
        await answer.aclose()
        async with asyncio.timeout(60):
            await ended.wait()


async def test_a_canary_makes_an_instance_healthy_and_its_failure_is_seen(tmp_path: Path) -> None:
    sick = False

    async def handler(payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        if sick:
            raise RuntimeError("out of memory")
        yield payload

    async with program(tmp_path) as runtime:
        canary = Canary(b"ping", interval_s=0.05, timeout_s=5.0)
        serving = await runtime.endpoint("n.C.e").serve(handler, canary=canary)

        async def reach(state: State) -> None:
            async with asyncio.timeout(60):
                while serving.state is not state:
                    await asyncio.sleep(0.02)

        await reach(State.HEALTHY)
        sick = True
        await reach(State.RUNNING)
        sick = False
        await reach(State.HEALTHY)


class Ask(BaseModel):
    text: str
    times: int = 1


class Said(BaseModel):
    text: str
    by: str


@service(namespace="production", workers=2)
class Echo:
    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting

    @endpoint("chat/completions")
    async def chat(self, request: Ask, context: RequestContext) -> AsyncIterator[Said]:
        for _ in range(request.times):
            yield Said(text=f"{self.greeting} {request.text}", by=context.headers["x-user"])

    @endpoint()
    async def raw(self, payload: bytes) -> AsyncIterator[bytes]:
        yield payload[::-1]


CONFIG = """
Echo:
  ServiceArgs: {workers: 3, resources: {gpu: 1}}
  greeting: good morning
"""


async def test_a_class_is_a_service_with_settings_from_yaml(tmp_path: Path) -> None:
    async with program(tmp_path) as server, program(tmp_path) as caller:
        workers = await serve(server, Echo, yaml.safe_load(CONFIG)["Echo"])
        assert len(workers) == 3
        client = caller.endpoint("production.Echo.chat/completions").client()
        assert len(await client.wait_for_instances(3)) == 3
        payload = Ask(text="you", times=2).model_dump_json().encode()
        items = await all_of(client.generate(payload, headers={"x-user": "me"}))
        assert [Said.model_validate_json(item) for item in items] == [
            Said(text="good morning you", by="me")
        ] * 2
        with pytest.raises(HandlerFailed, match="times: Input should be a valid integer"):
            await all_of(client.generate(b'{"text": "x", "times": "many"}'))
        raw = caller.endpoint("production.Echo.raw").client()
        assert await all_of(raw.generate(b"abc")) == [b"cba"]


async def test_what_is_no_service_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with program(tmp_path) as runtime:
        with pytest.raises(ServiceError, match="not marked"):
            await serve(runtime, object)
        with pytest.raises(ServiceError, match="workers"):
            await serve(runtime, Echo, {"ServiceArgs": {"workers": 0}})
        with pytest.raises(ServiceError, match=r"Echo.*salutation"):
            await serve(runtime, Echo, {"salutation": "hi"})
    with pytest.raises(ServiceError, match="no method marked"):
        service(namespace="n")(type("Empty", (), {}))

    async def plain(request: bytes) -> bytes:
        return request

    with pytest.raises(ServiceError, match="no async generator"):
        endpoint()(plain)  # type: ignore[type-var]

    async def untyped(request, context: RequestContext) -> AsyncIterator[bytes]:  # type: ignore[no-untyped-def]
        yield request

    with pytest.raises(ServiceError, match="annotated parameter"):
        handler_of(untyped)


async def test_operators_change_both_directions_and_all_are_closed() -> None:
    closed: list[str] = []

    async def engine(request: Any, context: RequestContext) -> Any:
        try:
            for word in request:
                yield word
        finally:
            closed.append("engine")

    async def splitting(request: Any, context: RequestContext, following: Stage) -> Any:
        try:
            async for word in following(request.split(), context):
                yield word.upper()
        finally:
            closed.append("splitting")

    async def numbering(request: Any, context: RequestContext, following: Stage) -> Any:
        number = 0
        async for word in following(request + " end", context):
            number += 1
            yield f"{number} {word}"

    whole = pipeline(numbering, splitting, engine=engine)
    context = RequestContext("n.C.e", {}, 1e9)
    assert [word async for word in whole("a b", context)] == ["1 A", "2 B", "3 END"]
    assert sorted(closed) == ["engine", "splitting"]
    closed.clear()
    answer = whole("a b", context)
    assert await anext(answer) == "1 A"
    await answer.aclose()
    assert sorted(closed) == ["engine", "splitting"]


async def test_what_an_instance_says_of_itself_may_change_while_it_serves(tmp_path: Path) -> None:
    async with program(tmp_path) as server, program(tmp_path) as caller:
        serving = await server.endpoint("a.b.c").serve(naming("a"), labels={"gpu": "1"})
        seen: list[dict[str, str]] = []
        view = Instances(
            caller.discovery,
            serving.name.endpoint.instances_prefix,
            lambda _, record: seen.append({} if record is None else dict(record.labels)),
        )
        await view.start()
        await view.wait_for(1, 60)
        assert seen[-1] == {"gpu": "1"}
        await serving.relabel({"gpu": "2"})
        async with asyncio.timeout(60):
            while seen[-1] != {"gpu": "2"}:
                await asyncio.sleep(0.01)
        assert view.serving[0].state is State.RUNNING
        await serving.stop()
        await serving.relabel({"gpu": "3"})  # it is gone, and stays so
        async with asyncio.timeout(60):
            while view.known:
                await asyncio.sleep(0.01)
        await view.close()
