"""Three pools of mock engines behind a global router, a frontend and OpenAI's own client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai

from runtime.embedded import EmbeddedNats
from tests.router.pools.world import MODEL, Site, a_site, agg, answer_text, disagg, until


async def complete(
    client: openai.AsyncOpenAI, prompt: list[int], tokens: int, **more: Any
) -> Any:
    found = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0.0, **more
    )
    assert found.choices[0].text == answer_text(prompt, tokens)
    return found


def target(ttft: float | None = None, itl: float | None = None, **hints: Any) -> dict[str, Any]:
    router = {"ttft_target": ttft, "itl_target": itl}
    return {"extra_body": {"nvext": {"router": router, "agent_hints": hints}}}


async def test_targets_priorities_and_hits_choose_among_aggregated_pools(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    rules = [{"min_priority": 5, "max_priority": 9, "target_pool": 2}]
    async with a_site(tmp_path, nats) as site:
        for name in ("fast", "mid", "slow"):
            await site.engines(name)
        config = agg("fast", "mid", "slow", strategy={"priority_overrides": rules})
        routing = await site.global_router(config)
        client = await site.frontend(1)
        prompt = list(range(100, 1300))
        await complete(client, prompt, 5)  # nothing said: the middle
        await complete(client, prompt, 5, **target(ttft=10))
        await complete(client, prompt, 5, **target(ttft=2999.0, itl=50))
        await complete(client, prompt, 5, extra_headers={"x-ttft-target-ms": "2500"})
        await complete(client, prompt, 5, **target(ttft=10, priority=5))
        found = await routing.decisions()
        assert [one["pool"] for one in found] == ["mid", "fast", "slow", "slow", "slow"], found
        assert [one["reason"] for one in found] == ["grid"] * 4 + ["override"]
        assert found[0]["grid"]["cell"] == {"ttft_ms": 1, "itl_ms": 0}
        assert (found[1]["ttft_target_ms"], found[1]["itl_target_ms"]) == (10, None)
        assert {one["outcome"] for one in found} == {"done"}
        assert [one["output_tokens"] for one in found] == [5] * 5
        told = await routing.explain(prompt, ttft_target_ms=10)
        assert told["aggregated"]["pool"] == "fast"
        assert {one["cached_tokens"] for one in told["aggregated"]["pools"]} == {1200 - 1200 % 16}


async def test_prompts_and_answers_go_to_pools_of_their_own(
    tmp_path: Path, nats: EmbeddedNats
) -> None:
    async with a_site(tmp_path, nats) as site:
        short = await site.engines("short", "prefill")
        long = await site.engines("long")  # engines that do both compute prompts too
        decode = await site.engines("decode", "decode")
        routing = await site.global_router(disagg(["short", "long"], ["decode"]))
        client = await site.frontend(2)
        prompts = [list(range(n, n + n)) for n in (200, 2000)]
        for prompt in prompts:
            await complete(client, prompt, 6)
        found = await routing.decisions()
        assert [(one["role"], one["pool"], one["output_tokens"]) for one in found] == [
            *(("prefill", "short", 1), ("decode", "decode", 6)),
            *(("prefill", "long", 1), ("decode", "decode", 6)),
        ]
        assert [len(one[0].engine.engine.pool.match) if False else 1 for one in (short, long)]
        assert decode[0].engine.engine.running_count == 0
