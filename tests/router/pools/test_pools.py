"""Three pools of mock engines behind a global router, a frontend and OpenAI's own client."""

from __future__ import annotations

import asyncio
import operator
import random
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from runtime.embedded import EmbeddedNats
from tests.router.pools.configs import agg, disagg
from tests.router.pools.world import MODEL, Site, a_site, answer_text, until


async def complete(client: openai.AsyncOpenAI, prompt: list[int], tokens: int, **more: Any) -> Any:
    """The answer is the one that any engine would give."""
    found = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0.0, **more
    )
    assert found.choices[0].text == answer_text(prompt, tokens)
    return found


async def complete_all(
    client: openai.AsyncOpenAI, prompts: list[list[int]], tokens: int, **more: Any
) -> None:
    """Together; but what the client does with each prompt holds up the loop that all share."""
    async with asyncio.TaskGroup() as tasks:
        for prompt in prompts:
            tasks.create_task(complete(client, prompt, tokens, **more))
            await asyncio.sleep(0.01)


async def stream(client: openai.AsyncOpenAI, prompt: list[int], tokens: int, **more: Any) -> None:
    text = ""
    events = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, stream=True, **more
    )
    async for event in events:
        text += event.choices[0].text
    assert text == answer_text(prompt, tokens)


def target(ttft: float | None = None, itl: float | None = None, **hints: Any) -> dict[str, Any]:
    router = {"ttft_target": ttft, "itl_target": itl}
    return {"extra_body": {"nvext": {"router": router, "agent_hints": hints}}}


def prompts(count: int, tokens: int, seed: int = 1) -> list[list[int]]:
    """Of which none begins like another."""
    dice = random.Random(seed)
    return [[dice.randrange(30_000) for _ in range(tokens)] for _ in range(count)]


async def three(site: Site, **given: Any) -> None:
    for name in ("fast", "mid", "slow"):
        await site.engines(name, **given)


async def test_targets_priorities_and_hits_choose_among_aggregated_pools(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    rules = [{"min_priority": 5, "max_priority": 9, "target_pool": 2}]
    async with a_site(tmp_path, nats) as site:
        await three(site)
        config = agg("fast", "mid", "slow", strategy={"priority_overrides": rules})
        # What a busy machine makes of the engines' speeds is no reason to leave the grid.
        routing = await site.global_router(config, feedback__margin="1h")
        client = await site.frontend(1)
        prompt = list(range(100, 1300))
        await complete(client, prompt, 5)  # nothing said: the middle
        await complete(client, prompt, 5, **target(ttft=900))
        await stream(client, prompt, 5, **target(ttft=2999.0, itl=50))
        await complete(client, prompt, 5, extra_headers={"x-ttft-target-ms": "2500"})
        again = await complete(client, prompt, 5, **target(ttft=900, priority=5))
        assert again.usage.prompt_tokens_details.cached_tokens == 1200 - 16
        found = await routing.decisions()
        assert [one["pool"] for one in found] == ["mid", "fast", "slow", "slow", "slow"], found
        assert [one["reason"] for one in found] == ["grid"] * 4 + ["override"]
        assert found[0]["grid"] == {
            "cell": {"ttft_ms": 1, "itl_ms": 0},
            "override": None,
            "pool": "mid",
        }
        assert (found[1]["ttft_target_ms"], found[1]["itl_target_ms"]) == (900, None)
        assert {one["outcome"] for one in found} == {"done"}
        assert [one["output_tokens"] for one in found] == [5] * 5


async def test_prompts_and_answers_go_to_pools_of_their_own(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    async with a_site(tmp_path, nats) as site:
        await site.engines("short", "prefill")
        await site.engines("long")  # engines that do both compute prompts too
        await site.engines("decode", "decode")
        routing = await site.global_router(disagg(["short", "long"], ["decode"]))
        client = await site.frontend(2)
        for prompt in (list(range(n, n + n)) for n in (200, 2000)):
            await complete(client, prompt, 6)
        found = await routing.decisions()
        assert [(one["role"], one["pool"], one["output_tokens"]) for one in found] == [
            *(("prefill", "short", 1), ("decode", "decode", 6)),
            *(("prefill", "long", 1), ("decode", "decode", 6)),
        ]
        decode = found[1]["pools"][0]
        assert decode["terms"]["compute_s"] == 0.0 and decode["step_s"] > 0.0
        told = await routing.explain(list(range(2000, 4000)), itl_target_ms=20)
        assert told["prefill"]["pool"] == "long" and told["decode"]["itl_target_ms"] == 20


@pytest.mark.parametrize("kind", ["own", "found"])
async def test_load_and_hits_move_requests_and_do_not_without_feedback(
    tmp_path: Path, nats: EmbeddedNats, kind: str
) -> None:
    """All say that the slow pool is enough; when its line is long the others take some."""
    said = target(ttft=2500)
    async with a_site(tmp_path, nats) as site:
        await three(site, speedup=0.5)  # so that a busy machine asks quicker than they compute
        services = []
        if kind == "found":
            services = [await site.router(name) for name in ("fast", "mid", "slow")]
        config = agg("fast", "mid", "slow")
        routing = await site.global_router(config, pool_routers=kind)
        told = (await routing.client.get("/v1/pools")).json()
        assert {pool["router"] for pool in told["roles"][0]["pools"]} == {kind}
        client = await site.frontend(1)
        known, *others = prompts(13, 8000)
        await complete(client, known, 2, **target(ttft=1500))  # which the pool mid now has
        await complete_all(client, others, 2, **said)
        first, *found = await routing.decisions()
        assert first["pool"] == "mid"
        assert {one["grid"]["pool"] for one in found} == {"slow"}
        reasons = {one["reason"] for one in found}
        assert "grid" in reasons and reasons & {"target", "saves"}, reasons
        pools = [one["pool"] for one in found]
        moved = set(pools) - {"slow"}
        assert moved and "slow" in pools
        # What a pool has of a prompt counts as the seconds it saves.
        await until("nothing runs", lambda: idle(routing.assembly.pools.values()))
        told = (await routing.explain(known, ttft_target_ms=2500))["aggregated"]
        assert {one["pool"]: one["cached_tokens"] for one in told["pools"]} == {
            "fast": 0,
            "slow": 0,
            "mid": 8000 - 8000 % 16,
        }
        for service in services:  # they were told of every end
            held = service.assembly.reservations
            await until("its requests end", partial(operator.not_, held))
            assert not service.assembly.reservations.expired_total
        computes = {one["pool"]: one["terms"]["compute_s"] for one in told["pools"]}
        assert computes["mid"] < computes["slow"] - 0.1
        metrics = (await routing.client.get("/metrics")).text
        for name in moved:
            counted = f'kvbm_global_router_moved_total{{grid_pool="slow",pool="{name}",role="agg'
            assert counted in metrics


@pytest.mark.parametrize("kind", ["own", "found"])
async def test_a_session_stays_on_one_engine_of_its_pool(
    tmp_path: Path, nats: EmbeddedNats, kind: str
) -> None:
    """Its prompts have nothing in common that would keep them there.

    Which engine has which session is chance: that one has all of a dozen is one in four million.
    """
    names = [*(f"session {n}" for n in range(11)), "4" * 300]
    async with a_site(tmp_path, nats) as site:
        await site.engines("only", engines=4)
        if kind == "found":
            await site.router("only")
        routing = await site.global_router(agg("only"), pool_routers=kind)
        client = await site.frontend(1)
        asked = prompts(2 * len(names), 100)
        for number, prompt in enumerate(asked):
            said = {"x-session-id": names[number % len(names)]}
            await complete(client, prompt, 2, extra_headers=said)
        found = [one["attempts"][0]["instance"] for one in await routing.decisions()]
        assert found == found[: len(names)] * 2 and len(set(found)) > 1
        pools = (await routing.explain(asked[0], session=names[0]))["aggregated"]["pools"]
        assert pools[0]["worker"] == f"{found[0]}.0"


def idle(pools: Any) -> bool:
    return not any(pool.in_flight for pool in pools)


async def test_without_feedback_the_grid_alone_decides(tmp_path: Path, nats: EmbeddedNats) -> None:
    async with a_site(tmp_path, nats) as site:
        await three(site, speedup=4.0)
        routing = await site.global_router(agg("fast", "mid", "slow"), feedback__enabled=False)
        client = await site.frontend(1)
        said = target(ttft=2500)
        await complete_all(client, prompts(12, 4000), 2, **said)
        found = await routing.decisions()
        assert [(one["pool"], one["reason"]) for one in found] == [("slow", "grid")] * 12
        assert found[0]["pools"] == [{"pool": name} for name in ("fast", "mid", "slow")]


async def test_a_pool_is_killed_under_load_and_every_answer_is_right(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    async with a_site(tmp_path, nats) as site:
        doomed = site.engines_apart("slow", speedup=0.5, **{"discovery.ttl": "2s"})
        for name in ("fast", "mid"):
            await site.engines(name)
        assert doomed.stdout is not None
        assert await asyncio.to_thread(doomed.stdout.readline)
        config = agg("fast", "mid", "slow", enable_priority_retry=True)
        routing = await site.global_router(config, feedback__margin="1h")
        pools = routing.assembly.pools
        await until("the slow pool is seen", lambda: bool(pools["slow"].engines))
        client = await site.frontend(1)
        said = target(ttft=1e6)  # at the edge of the grid, and never missed
        asking = []
        for prompt in prompts(16, 4000):
            asking.append(asyncio.create_task(complete(client, prompt, 400, **said)))
            await asyncio.sleep(0.01)
        log = routing.assembly.log
        await until("some have begun", lambda: sum(0 < d.tokens < 400 for d in log.latest(99)) > 1)
        begun = {one.id for one in log.latest(99) if 0 < one.tokens < 400}
        assert {one.pool for one in log.latest(99)} == {"slow"}
        doomed.kill()
        await asyncio.gather(*asking)  # right, all of them
        await complete(client, prompts(1, 100, 7)[0], 3, **said)
        found = await routing.decisions()
        moved = [one for one in found if len({a["pool"] for a in one["attempts"]}) > 1]
        assert moved and all(one["attempts"][0]["pool"] == "slow" for one in moved)
        # Those were sent on before anything had come; where tokens had, the frontend asked anew.
        broken = [one for one in found if one["outcome"] == "failed"]
        assert begun <= {one["request"] for one in broken}
        assert all(one["output_tokens"] and len(one["attempts"]) == 1 for one in broken)
        assert {one["attempts"][-1]["pool"] for one in moved} == {"mid"}  # the next faster one
        assert {one["outcome"] for one in found} == {"done", "failed"}
        await until("the slow pool is gone", lambda: not pools["slow"].engines)
        await complete(client, prompts(1, 100, 8)[0], 3, **said)
        skipped = (await routing.decisions())[-1]
        assert (
            skipped["reason"] == "away" and "no engine of 'mock' serves in slow" in skipped["why"]
        )


async def test_what_the_client_ends_ends_in_the_pool(tmp_path: Path, nats: EmbeddedNats) -> None:
    async with a_site(tmp_path, nats) as site:
        [engine] = await site.engines("only", speedup=1.0)
        routing = await site.global_router(agg("only"))
        client = await site.frontend(1)
        events = await client.completions.create(
            model=MODEL, prompt=prompts(1, 100)[0], max_tokens=8000, stream=True
        )
        async for _ in events:
            break
        await events.close()
        await until("the engine is idle", lambda: not engine.engine.engine.running_count)
        await until("it is told", lambda: routing.assembly.log.latest(1)[0].outcome is not None)
        assert (await routing.decisions())[0]["outcome"] == "cancelled"
        assert idle(routing.assembly.pools.values())


async def test_no_pool_is_an_answer_and_no_pause(tmp_path: Path, nats: EmbeddedNats) -> None:
    async with a_site(tmp_path, nats) as site:
        async with a_site(tmp_path, nats) as short:
            await short.engines("only")
            routing = await site.global_router(agg("only"))
            client = await site.frontend(1)
            await complete(client, [1, 2, 3], 2)
        pool = routing.assembly.pools["only"]
        await until("the engine has gone", lambda: not pool.engines)
        with pytest.raises(openai.InternalServerError) as refused:
            await complete(client, [1, 2, 3], 2)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "1"
        found = (await routing.decisions())[-1]
        assert (found["outcome"], found["pool"], found["attempts"]) == ("refused", None, [])


async def test_a_pool_s_router_that_goes_is_replaced_by_one_here(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    async with a_site(tmp_path, nats) as site:
        await site.engines("only")
        async with a_site(tmp_path, nats) as theirs:
            service = await theirs.router("only")
            routing = await site.global_router(agg("only"))
            client = await site.frontend(1)
            [pool] = routing.assembly.pools.values()
            await complete(client, [1, 2, 3], 2)
            assert pool.router_kind == "found"
            await until("it is told of the end", lambda: not len(service.assembly.reservations))
        await complete(client, [1, 2, 3], 2)
        await until("its going is seen", lambda: pool.router_kind == "own")
        assert [one["outcome"] for one in await routing.decisions()] == ["done", "done"]
