"""Engines as they come, change, drain and go, and records that are no engine's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runtime.engine_card import EngineCard
from runtime.instances import Registration
from runtime.lifecycle import Lifecycle
from runtime.names import InstanceName
from tests.router.service.world import MODEL, PLACE, World
from tests.runtime.planes import until

PROMPT = list(range(100, 420))


async def test_each_rank_of_an_engine_is_a_worker(world: World) -> None:
    router = await world.router()
    await world.engines.add(0x1F, dp_size=3, kv_blocks=500)
    await router.see("1f.0", "1f.1", "1f.2")
    found = {(await router.route(PROMPT, request=f"{n}"))["dp_rank"] for n in range(3)}
    assert found == {0, 1, 2}
    report = (await router.client.get("/v1/workers")).json()
    assert [w["capacity"]["kv_blocks"] for w in report["models"][0]["workers"]] == [500] * 3
    await world.engines.remove(0x1F)
    await router.see()
    assert len(router.assembly.reservations) == 0 and router.assembly.reservations.lost_total == 3
    assert b'kvbm_router_requests_total{ending="worker-gone",model="m"} 3.0' in (
        router.assembly.metrics.render()
    )
    assert (await router.client.post("/v1/requests/1/first_token")).status_code == 404


async def test_a_draining_worker_finishes_what_it_has_and_gets_no_more(world: World) -> None:
    router = await world.router()
    await world.engines.add(1)
    await world.engines.add(2)
    await router.see("1.0", "2.0")
    await router.route(PROMPT, worker="1.0", request="a")
    await world.engines.drain(1)
    await router.see("2.0")
    assert (await router.load("1.0"))["requests"] == 1
    assert {(await router.route(PROMPT))["worker"] for _ in range(5)} == {"2.0"}
    refused = await router.post("/v1/route", tokens=PROMPT, worker="1.0")
    assert refused.status_code == 503
    assert (await router.client.post("/v1/requests/a/end")).status_code == 200
    assert (await router.load("1.0"))["requests"] == 0


async def test_healthy_engines_come_before_those_that_merely_run(world: World) -> None:
    router = await world.router(index__source="routes")
    for instance in (1, 2):
        await world.engines.add(instance)
    await router.see("1.0", "2.0")
    told = await router.explain(PROMPT)
    assert [one["healthy"] for one in told["candidates"]] == [False, False]
    await router.route(PROMPT, worker="1.0", request="a")  # which knows the prompt now
    await router.client.post("/v1/requests/a/end")
    assert (await router.route(PROMPT, request="b"))["worker"] == "1.0"
    await router.client.post("/v1/requests/b/end")
    await world.engines.well(2)
    await router.until(lambda told: [one["worker"] for one in told["candidates"]] == ["2.0"])
    told = await router.explain(PROMPT)
    assert told["candidates"][0]["healthy"]
    assert [(one["worker"], one["why"]) for one in told["excluded"]] == [
        ("1.0", "its health check has not passed, and others' have")
    ]
    assert {(await router.route(PROMPT))["worker"] for _ in range(5)} == {"2.0"}
    report = (await router.client.get("/v1/workers")).json()["models"][0]["workers"]
    assert [one["healthy"] for one in report] == [False, True]
    assert (await router.route(PROMPT, worker="1.0"))["worker"] == "1.0"
    await world.engines.well(2, is_well=False)
    await router.until(lambda told: len(told["candidates"]) == 2)


async def test_an_engine_that_was_never_measured_is_as_the_models_others(world: World) -> None:
    router = await world.router()
    for instance in (1, 2, 3):
        await world.engines.add(instance)
    await world.engines.add(4, model="other")
    await router.see("1.0", "2.0", "3.0", "4.0")
    speeds = await router.speeds(PROMPT)
    assert {one["prefill_from"] for one in speeds.values()} == {"assumed"}
    assert {one["prefill_s_per_token"] for one in speeds.values()} == {1e-4}
    for name, seconds in (("1.0", 0.02), ("2.0", 0.06)):
        await router.route(PROMPT, model="m", worker=name, request=name)
        await asyncio.sleep(seconds)
        for path in ("first_token", "output?tokens=50", "end"):
            await router.client.post(f"/v1/requests/{name}/{path}")
    speeds = await router.speeds(PROMPT)
    first, second, third = (speeds[name] for name in ("1.0", "2.0", "3.0"))
    for what, figure in (("prefill", "prefill_s_per_token"), ("step", "step_s")):
        assert first[f"{what}_from"] == second[f"{what}_from"] == "learnt"
        assert third[f"{what}_from"] == "others"
        assert third[figure] == pytest.approx((first[figure] + second[figure]) / 2)
    assert (await router.speeds(PROMPT, model="other"))["4.0"]["prefill_from"] == "assumed"
    # One that joins later begins so, whatever was learnt of it when it was here before.
    await world.engines.add(5)
    await router.see("1.0", "2.0", "3.0", "4.0", "5.0")
    joined = (await router.speeds(PROMPT))["5.0"]
    assert joined["prefill_from"] == joined["step_from"] == "others"
    assert joined["prefill_s_per_token"] == third["prefill_s_per_token"]


async def test_records_that_cannot_be_used_are_counted_and_harm_nobody(world: World) -> None:
    router = await world.router(models=["m", "n"], index__workers_max=8)
    await world.engines.add(1)
    await router.see("1.0")
    await world.engines.add(2, block_tokens=32)
    await world.engines.add(3, model="foreign")
    await world.engines.add(4, dp_size=8)
    for instance, labels in (
        (5, {"model": "m", "url": "x"}),  # registered, and not ready to say more: no fault
        (6, {"model": "m", "url": "x", "block_tokens": "sixteen"}),
        (7, {"model": "m", "url": "x", "block_tokens": "16", "dp_size": "1000000000"}),
        (8, {"model": "", "url": "x", "block_tokens": "16"}),
    ):
        name = InstanceName(PLACE, instance)
        record = Registration(world.engines.discovery, name, Lifecycle(), "tcp://x", labels)
        await record.register()
    await world.engines.discovery.put(f"{PLACE.instances_prefix}9", b"no record")
    await world.engines.add(10, model="n", block_tokens=64)
    await router.see("1.0", "a.0")
    # As often as they come; engines that start come twice, registered and running.
    least: dict[Any, int] = {"record": 1, "block_tokens": 1, "model": 1, "workers": 1, "card": 3}
    refused = router.assembly.fleet
    await until(lambda: all(refused.refused_total.get(w, 0) >= n for w, n in least.items()))
    report = (await router.client.get("/v1/workers")).json()
    assert set(report["refused_total"]) == set(least)
    why = {one["instance"]: one["detail"] for one in report["refused"]}
    assert why["2"] == "blocks of 32 tokens; others of m have 16"
    assert "block_tokens" in why["6"]
    assert "5" not in why
    named = await router.post("/v1/route", tokens=PROMPT)
    assert named.status_code == 400 and "at `$.model`" in named.json()["detail"]
    assert (await router.route(PROMPT, model="n"))["block_tokens"] == 64


async def test_a_model_whose_engines_all_went_may_come_back_with_other_blocks(
    world: World,
) -> None:
    router = await world.router()
    await world.engines.add(1)
    await router.see("1.0")
    await world.engines.remove(1)
    await router.see()
    await world.engines.add(2, block_tokens=64)
    await router.see("2.0")
    assert (await router.route(PROMPT))["block_tokens"] == 64
    assert router.assembly.models[MODEL].block_tokens == 64


async def test_an_engine_that_says_something_else_of_itself_is_believed(world: World) -> None:
    router = await world.router(busy__blocks_fraction=0.5)
    await world.engines.add(1, kv_blocks=30)
    await router.see("1.0")
    await router.route(PROMPT)
    assert (await router.post("/v1/route", tokens=PROMPT)).status_code == 529
    name = InstanceName(PLACE, 1)
    record = world.engines.records[1].record
    bigger = EngineCard.of_labels({**record.labels, "kv_blocks": "1000"}).labels()
    changed = type(record)(**{**_fields(record), "labels": bigger})
    await world.engines.discovery.put(name.key, changed.encode())
    async with asyncio.timeout(60):
        while (await router.post("/v1/route", tokens=PROMPT)).status_code != 200:
            await asyncio.sleep(0.02)
    assert len(router.assembly.reservations) == 2


async def test_a_fleet_without_events_is_routed_by_its_routes(world: World) -> None:
    router = await world.router(index__source="routes")
    for instance in (1, 2, 3):
        await world.engines.add(instance)
    await router.see("1.0", "2.0", "3.0")
    first = await router.route(PROMPT, request="a")
    await router.client.post("/v1/requests/a/end")
    again = await router.route(PROMPT)
    assert again["worker"] == first["worker"] and again["cached_tokens"] == 320
    assert (await router.client.get("/v1/index")).json()["feed"] is None


async def test_what_a_router_sees_of_its_requests_teaches_it_speeds(world: World) -> None:
    router = await world.router()
    await world.engines.add(1)
    await router.see("1.0")
    for number in range(4):
        await router.route(PROMPT, request=f"{number}")
        await asyncio.sleep(0.02)
        for path in ("first_token", "output?tokens=50", "end"):
            await router.client.post(f"/v1/requests/{number}/{path}")
    told = (await router.post("/v1/route/explain", tokens=PROMPT)).json()
    speed = told["decode"]["candidates"][0]["speed"]
    assert speed["prefill_from"] == speed["step_from"] == "learnt"
    assert 320 * speed["prefill_s_per_token"] > 0.005  # it took at least 0.02 s, now and then more


def _fields(record: object) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}  # type: ignore[attr-defined]
