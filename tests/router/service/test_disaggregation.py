"""Prompts computed by prefill workers, output by decode workers."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.service.world import BLOCK, MODEL, Routing, World
from tests.runtime.planes import until

PROMPT = list(range(100, 420))  # 20 blocks


async def split(world: World, **overrides: object) -> Routing:
    """Prefill workers 1 and 2, decode workers 3 and 4."""
    router = await world.router(**overrides)
    for instance, role in ((1, "prefill"), (2, "prefill"), (3, "decode"), (4, "decode")):
        await world.engines.add(instance, role=role)
    await router.see("1.0", "2.0", "3.0", "4.0")
    return router


@pytest.mark.parametrize("policy", ["kv", "kv-blocks"])
async def test_prompts_go_by_what_is_found_and_decoding_by_load(world: World, policy: str) -> None:
    router = await split(world, policy=policy)
    router.store("2.0", PROMPT, 15)
    router.store("3.0", PROMPT, 20)  # which counts for nothing: the KV comes from elsewhere
    other = list(range(5000, 5100))
    await router.route(other, worker="3.0", prefill_worker="1.0", request="other")
    told = (await router.post("/v1/route/explain", tokens=PROMPT)).json()
    assert told["disaggregated"] and told["why"] == "prefill workers are there"
    assert told["prefill"]["worker"] == "2.0" and told["decode"]["worker"] == "4.0"
    assert {one["worker"] for one in told["decode"]["candidates"]} == {"3.0", "4.0"}
    found = await router.route(PROMPT, request="a")
    assert found["worker"] == "4.0" and found["prefill"]["worker"] == "2.0"
    assert found["cached_tokens"] == 15 * BLOCK
    prefill, decode = await router.load("2.0"), await router.load("4.0")
    assert prefill["prefill_tokens"] == 5 * BLOCK and prefill["blocks"] == 0
    assert decode["prefill_tokens"] == 0 and decode["blocks"] == 20
    assert (await router.client.post("/v1/requests/a/prefilled")).status_code == 200
    assert (await router.load("2.0"))["requests"] == 0
    assert (await router.load("4.0"))["requests"] == 1
    for name in ("a", "other"):
        await router.client.post(f"/v1/requests/{name}/end")
    assert router.at_rest()


async def test_little_that_is_new_is_computed_where_it_decodes(world: World) -> None:
    router = await split(
        world,
        disaggregation__conditional=True,
        disaggregation__local_tokens=100,
        disaggregation__local_ratio=0.5,
    )
    router.store("3.0", PROMPT, 15)  # 80 tokens are new, a quarter
    told = (await router.post("/v1/route/explain", tokens=PROMPT)).json()
    assert not told["disaggregated"] and told["prefill"] is None
    assert told["why"].startswith("80 of 320 prompt tokens are new to decode worker 3.0: few")
    found = await router.route(PROMPT)
    assert found["worker"] == "3.0" and found["prefill"] is None
    assert (await router.load("3.0"))["prefill_tokens"] == 80
    longer = PROMPT + list(range(9000, 9100))  # 180 are new: too many
    assert (await router.route(longer))["prefill"] is not None
    short = list(range(40))  # few, but all of it
    assert (await router.route(short))["prefill"] is not None


async def test_without_prefill_workers_requests_are_served_whole_or_refused(world: World) -> None:
    router = await world.router()
    strict = await world.router(disaggregation__enforce=True)
    await world.engines.add(1, role="decode")
    for one in (router, strict):
        await one.see("1.0")
    assert (await router.route(PROMPT))["prefill"] is None
    refused = await strict.post("/v1/route", tokens=PROMPT)
    assert (refused.status_code, refused.json()["kind"]) == (503, "no-prefill-worker")
    told = (await strict.post("/v1/route/explain", tokens=PROMPT)).json()
    assert told["worker"] is None and told["rejected"] == "no-prefill-worker"
    await world.engines.add(2, role="prefill")
    await strict.see("1.0", "2.0")
    assert (await strict.route(PROMPT))["prefill"]["worker"] == "2.0"


async def test_what_no_decode_worker_takes_is_not_left_with_a_prefill_worker(world: World) -> None:
    router = await split(world)
    refused = await router.post("/v1/route", tokens=PROMPT, worker="9.0")
    assert refused.json()["kind"] == "no-worker"
    refused = await router.post("/v1/route", tokens=PROMPT, prefill_worker="3.0")
    assert refused.json()["kind"] == "no-worker"
    assert refused.json()["detail"].startswith("prefill: worker 3.0")
    assert router.at_rest()
    found = await router.route(PROMPT, prefill_worker="1.0", workers=["4.0"])
    assert (found["prefill"]["worker"], found["worker"]) == ("1.0", "4.0")


async def test_a_prefill_worker_that_goes_while_its_request_waits_is_not_given_out(
    world: World,
) -> None:
    router = await world.router(queue__hold_above=0.1)
    await world.engines.add(3, role="decode")
    await router.see("3.0")
    await router.route(PROMPT, request="first")  # computed there, so that it has no room
    await world.engines.add(1, role="prefill")
    await router.see("1.0", "3.0")
    waits = asyncio.create_task(router.post("/v1/route", tokens=PROMPT))
    decode = router.assembly.models[MODEL].pools["decode"]
    await until(lambda: decode.router.waiting == 1)
    assert (await router.load("1.0"))["requests"] == 1
    await world.engines.remove(1)
    await router.see("3.0")
    await router.client.post("/v1/requests/first/end")
    refused = await waits
    assert (refused.status_code, refused.json()["kind"]) == (503, "no-worker")
    assert "worker 1.0 has gone" in refused.json()["detail"]
    assert router.at_rest()


async def test_an_engine_that_changes_its_role_moves(world: World) -> None:
    router = await split(world)
    await world.engines.remove(2)
    await world.engines.add(2, role="decode")
    model = router.assembly.models[MODEL]
    await router.see("1.0", "2.0", "3.0", "4.0")
    assert len(model.pools["prefill"].workers) == 1 and len(model.pools["decode"].workers) == 3
