"""Pools of engines that have nothing but an OpenAI server, behind a global router."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from mocker.text import text_of
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.embedded import EmbeddedNats
from runtime.engine_card import COMPONENT, ENDPOINT
from runtime.instances import Registration
from runtime.lifecycle import Lifecycle, State
from runtime.names import EndpointName, InstanceName
from tests.router.pools.configs import agg
from tests.router.pools.world import MODEL, GlobalRouting, Site, a_site, until
from tests.router.service.world import card
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

PROMPT = [1, 2, 3]
ANSWER = [4, 5, 6, 7]
KEY = "a-key-of-the-engines"


@asynccontextmanager
async def before(
    folder: Path, nats: EmbeddedNats, **pools: Script
) -> AsyncIterator[tuple[openai.AsyncOpenAI, GlobalRouting, list[Engine]]]:
    """Of each pool one engine that does as its script says. The last pool is the grid's choice."""
    async with a_site(folder, nats) as site, AsyncExitStack() as stack:
        engines = []
        for number, (namespace, script) in enumerate(pools.items(), 1):
            engine = Engine(number, script)
            await engine.start()
            stack.push_async_callback(engine.stop)
            await registered(site, namespace, engine)
            engines.append(engine)
        routing = await site.global_router(
            agg(*pools, mapping=[[len(pools) - 1]] * len(pools), enable_priority_retry=True),
            **{"feedback.margin": "1h", "engines.key": KEY},
        )
        yield await site.frontend(1), routing, engines


async def registered(site: Site, namespace: str, engine: Engine) -> None:
    """In discovery, as `kvbm engine` has a vLLM."""
    place = DiscoverySettings(file_directory=site.place["discovery.file_directory"])
    discovery = create_discovery(place, {})
    await discovery.start()
    site.stack.push_async_callback(discovery.close)
    name = InstanceName(EndpointName(namespace, COMPONENT, ENDPOINT), engine.instance)
    told = card(model=MODEL, url=engine.url, context_tokens=4096)
    record = Registration(discovery, name, Lifecycle(), engine.url, told.labels())
    await record.register()
    await record.move(State.RUNNING)


def answering(after: int = 0) -> Script:
    return saying(
        event(ANSWER[after:3]), event(ANSWER[3:], "length", stop_reason=None), ending(cached=2)
    )


async def complete(client: openai.AsyncOpenAI, **more: Any) -> Any:
    return await client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0.0, **more
    )


async def test_tokens_go_in_and_come_out(tmp_path: Path, nats: EmbeddedNats) -> None:
    async with before(tmp_path, nats, only=answering()) as (client, routing, [engine]):
        said = {"x-session-id": "s", "x-ttft-target-ms": "500", "x-request-id": "one"}
        answer = await complete(client, extra_headers=said)
        assert answer.choices[0].text == text_of(ANSWER)
        assert answer.usage.prompt_tokens_details.cached_tokens == 2
        [asked] = engine.asked
        assert asked.path == "/v1/completions"
        assert (asked.headers["authorization"], asked.headers["x-request-id"]) == (
            f"Bearer {KEY}",
            "one",
        )
        assert asked.json == {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": 4,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        [decision] = await routing.decisions()
        assert (decision["outcome"], decision["output_tokens"]) == ("done", 4)
        assert decision["attempts"][0]["instance"] == "1"


@pytest.mark.parametrize(
    "script", [saying(broken=True), refusing(503, "busy")], ids=["broken", "busy"]
)
async def test_an_engine_that_gives_nothing_is_replaced_by_another_pool_s(
    tmp_path: Path, nats: EmbeddedNats, script: Script
) -> None:
    pools = {"fast": answering(), "slow": script}
    async with before(tmp_path, nats, **pools) as (client, routing, _):
        answer = await complete(client)
        assert answer.choices[0].text == text_of(ANSWER)
        [decision] = await routing.decisions()
        assert [one["pool"] for one in decision["attempts"]] == ["slow", "fast"]


async def test_an_answer_that_breaks_off_goes_on(tmp_path: Path, nats: EmbeddedNats) -> None:
    async def script(wire: Wire, asked: Asked) -> None:
        done = len(asked.json["prompt"]) - len(PROMPT)
        await (answering(done) if done else saying(event(ANSWER[:2]), broken=True))(wire, asked)

    async with before(tmp_path, nats, only=script) as (client, routing, [engine]):
        answer = await complete(client)
        assert answer.choices[0].text == text_of(ANSWER)
        assert [asked.json["prompt"] for asked in engine.asked] == [PROMPT, PROMPT + ANSWER[:2]]
        assert [one["outcome"] for one in await routing.decisions()] == ["failed", "done"]


async def test_what_the_request_is_to_blame_for_is_the_answer(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    pools = {"fast": answering(), "slow": refusing(400, "no such token")}
    async with before(tmp_path, nats, **pools) as (client, routing, [fast, _]):
        with pytest.raises(openai.BadRequestError, match="no such token"):
            await complete(client)
        assert not fast.asked
        [attempt] = (await routing.decisions())[0]["attempts"]
        assert attempt["error"] == "no such token"


async def test_a_client_that_leaves_ends_the_engines_work(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    async def script(wire: Wire, asked: Asked) -> None:
        wire.begin()
        wire.part(event(ANSWER[:1]))  # and no more, ever

    async with before(tmp_path, nats, only=script) as (client, routing, [engine]):
        events = await complete(client, stream=True)
        async for _ in events:
            break
        await events.close()
        await until("the engine is told", engine.wires[0].gone.is_set)
        await until("it is noted", lambda: routing.assembly.log.latest(1)[0].outcome is not None)
        assert (await routing.decisions())[0]["outcome"] == "cancelled"
