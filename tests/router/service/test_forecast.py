"""What a request may expect of a pool, and requests for one part alone."""

from __future__ import annotations

import time
from typing import Any

import pytest

from router.forecast import Forecast
from router.index import Tier
from tests.router.service.world import BLOCK, Routing, World

PROMPT = list(range(100, 420))  # 20 blocks


async def forecast(router: Routing, **more: Any) -> dict[str, Any]:
    answer = await router.post("/v1/route/forecast", tokens=PROMPT, **more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("policy", ["kv", "kv-blocks", "least-loaded"])
async def test_it_is_in_seconds_whatever_the_policy(world: World, policy: str) -> None:
    router = await world.router(policy=policy)
    await world.engines.add(1)
    await router.see("1.0")
    router.store("1.0", PROMPT, 12)
    found = await forecast(router)
    assert (found["worker"], found["why"], found["serving"]) == ("1.0", None, 1)
    assert (found["tokens"], found["cached_tokens"]) == (320, 12 * BLOCK)
    assert found["compute_s"] == pytest.approx(8 * BLOCK * 1e-4)
    assert found["wait_s"] == 0.0 and found["decode_s"] > 0.0 and found["step_s"] > 0.01
    assert not found["measured"]
    now = time.monotonic()
    for pool in router.assembly.models["m"].pools.values():
        pool.workers.clock = lambda: now  # what waits is computed meanwhile
    await router.route(PROMPT, request="a")
    again = await forecast(router)
    assert again["requests"] == 1 and again["prefill_tokens"] == 8 * BLOCK
    assert again["wait_s"] == pytest.approx(8 * BLOCK * 1e-4)
    assert again["step_s"] > found["step_s"]
    await router.post("/v1/requests/a/end")
    assert router.at_rest()


async def test_it_says_why_nobody_would_take_it(world: World) -> None:
    router = await world.router(busy__prefill_tokens=100)
    await world.engines.add(1)
    await router.see("1.0")
    await router.route(PROMPT, request="a")
    found = await forecast(router)
    assert found["why"] == "all of 1 workers are over their limits"
    assert (found["worker"], found["serving"], found["busy"]) == (None, 1, 1)
    missing = await forecast(router, workers=["7.0"])
    assert "none of the workers that the request allows" in missing["why"]


async def test_what_waits_in_the_line_is_counted(world: World) -> None:
    router = await world.router(queue__hold_above=0.0)
    await world.engines.add(1)
    await router.see("1.0")
    await router.route(PROMPT, request="a")
    model = router.assembly.models["m"]
    assert (await forecast(router))["line_s"] == 0.0
    model.pools["decode"].router._waiting_tokens = 5000
    assert (await forecast(router))["line_s"] == pytest.approx(0.5)


async def test_a_prompt_alone_goes_to_prefill_workers_and_else_to_any(world: World) -> None:
    router = await world.router()
    await world.engines.add(1)
    await router.see("1.0")
    assert (await router.route(PROMPT, part="prefill", request="a"))["worker"] == "1.0"
    await world.engines.add(2, role="prefill")
    await router.see("1.0", "2.0")
    router.store("1.0", PROMPT, 20, Tier.G1)
    found = await forecast(router, part="prefill")
    assert found["worker"] == "2.0" and found["decode_s"] == 0.0 and found["compute_s"] > 0.0
    told = await router.route(PROMPT, part="prefill", request="b")
    assert (told["worker"], told["prefill"]) == ("2.0", None)
    explained = (await router.post("/v1/route/explain", tokens=PROMPT, part="prefill")).json()
    assert explained["worker"] == "2.0" and explained["why"] == "asked for prefill alone"
    for request in "ab":
        await router.post(f"/v1/requests/{request}/output")
        await router.post(f"/v1/requests/{request}/end")
    assert router.at_rest()


async def test_decoding_alone_computes_no_prompt(world: World) -> None:
    router = await world.router()
    await world.engines.add(1, role="prefill")
    await world.engines.add(2, role="decode")
    await router.see("1.0", "2.0")
    found = await forecast(router, part="decode")
    assert (found["worker"], found["compute_s"], found["cached_tokens"]) == ("2.0", 0.0, 0)
    told = await router.route(PROMPT, part="decode", request="a")
    assert (told["worker"], told["prefill"]) == ("2.0", None)
    assert (await router.load("2.0"))["prefill_tokens"] == 0
    both = await forecast(router)
    assert both["worker"] == "2.0" and both["compute_s"] == pytest.approx(320 * 1e-4)
    assert both["serving"] == 2
    await router.post("/v1/requests/a/end")
    assert router.at_rest()


def test_the_sums() -> None:
    found = Forecast(line_s=1, wait_s=2, room_s=4, load_s=8, compute_s=16, decode_s=32)
    assert (found.first_token_s, found.cost_s) == (31, 63)
