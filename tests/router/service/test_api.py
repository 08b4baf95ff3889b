"""The HTTP API and the request plane, over records of engines in a discovery of this process."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.index import Tier
from router.metrics import SPECS, router_metrics_page
from runtime.component import Runtime
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.events.router_event import StorageTier
from runtime.hashing import block_hashes
from runtime.requests import RequestPlaneSettings, create_request_plane
from tests.plain_http import PLAIN
from tests.router.feed.node import FakeNode
from tests.router.service.world import BLOCK, MODEL, Routing, World, soon
from tests.runtime.planes import until

ROOT = Path(__file__).parents[3]
PROMPT = list(range(100, 420))  # 20 blocks


async def two(world: World, **overrides: Any) -> Routing:
    router = await world.router(**overrides)
    await world.engines.add(1)
    await world.engines.add(2)
    await router.see("1.0", "2.0")
    return router


async def test_a_request_lives_from_route_to_end(world: World) -> None:
    router = await two(world)
    router.store("2.0", PROMPT, 12)
    router.store("2.0", PROMPT, 18, tier=Tier.G2)
    found = await router.route(PROMPT, request="a")
    assert found["worker"] == "2.0" and found["url"] == "http://engine:8000"
    assert found["transport"] == "tcp://engine:2" and found["model"] == MODEL
    assert found["blocks_found"] == {"g1": 12, "g2": 6, "g3": 0, "g4": 0}
    assert found["cached_tokens"] == 18 * BLOCK
    load = await router.load("2.0")
    assert load["requests"] == 1 and load["blocks"] == 20 and load["prefill_tokens"] == 2 * BLOCK
    for path in ("first_token", "output?tokens=16", "end"):
        assert (await router.client.post(f"/v1/requests/a/{path}")).status_code == 200
        if path == "first_token":
            assert (await router.load("2.0"))["prefill_tokens"] == 0
        if path.startswith("output"):
            assert (await router.load("2.0"))["blocks"] == 22
    again = await router.client.post("/v1/requests/a/end")
    assert again.status_code == 404 and again.json()["kind"] == "unknown-request"
    assert router.at_rest()


async def test_tokens_come_as_numbers_as_bytes_or_as_hashes(world: World) -> None:
    router = await two(world)
    router.store("1.0", PROMPT, 9)
    packed = base64.b64encode(np.array(PROMPT, dtype="<u4").tobytes()).decode()
    hashes = block_hashes(np.array(PROMPT, dtype=np.uint32), BLOCK).tolist()
    for body in (
        {"tokens": PROMPT},
        {"tokens": packed},
        {"block_hashes": hashes, "prompt_tokens": len(PROMPT)},
    ):
        told = (await router.post("/v1/route/explain", **body)).json()
        assert told["worker"] == "1.0"
        assert told["decode"]["candidates"][0]["blocks_found"]["g1"] == 9


@pytest.mark.parametrize(
    "policy", ["kv", "kv-blocks", "round-robin", "random", "power-of-two", "least-loaded"]
)
async def test_an_explanation_names_the_worker_that_is_chosen_next(
    world: World, policy: str
) -> None:
    overrides: dict[str, Any] = {"policy": policy}
    if policy.startswith("kv"):
        overrides["temperature"] = 0.5
    router = await world.router(**overrides)
    for instance in range(1, 6):
        await world.engines.add(instance)
    await router.see(*(f"{n}.0" for n in range(1, 6)))
    now = time.monotonic()
    for pool in router.assembly.models[MODEL].pools.values():
        pool.workers.clock = lambda: now  # what waits is computed meanwhile: another question
    for number in range(20):
        prompt = PROMPT[number:]
        told = (await router.post("/v1/route/explain", tokens=prompt)).json()
        again = (await router.post("/v1/route/explain", tokens=prompt)).json()
        assert told["worker"] == again["worker"]
        assert (await router.route(prompt))["worker"] == told["worker"]
        chosen = [one for one in told["decode"]["candidates"] if one["chosen"]]
        assert [one["worker"] for one in chosen] == [told["worker"]]


async def test_an_explanation_says_why_others_are_not_taken(world: World) -> None:
    router = await world.router(busy__prefill_tokens=50)
    await world.engines.add(1)
    await world.engines.add(2, {"taints": "zone-a, gpu"})
    await world.engines.add(3, {"taints": "gpu"})
    await world.engines.add(4, {"taints": "gpu"})
    await router.see("1.0", "2.0", "3.0", "4.0")
    await router.route(PROMPT, worker="3.0")
    await world.engines.drain(4)
    await router.see("1.0", "2.0", "3.0")
    told = (await router.post("/v1/route/explain", tokens=PROMPT, taints=["gpu"])).json()
    assert told["worker"] == "2.0"
    [candidate] = told["decode"]["candidates"]
    assert set(candidate["terms"]) == {"wait", "load", "compute", "decode", "room"}
    assert candidate["speed"]["prefill_from"] == "assumed"
    why = {one["worker"]: one["why"] for one in told["decode"]["excluded"]}
    assert why == {
        "1.0": "lacks gpu",
        "3.0": "busy: 320 prompt tokens to compute, over 50",
        "4.0": "draining, or not serving yet",
    }
    assert (await router.load("2.0"))["requests"] == 0  # nothing was sent


async def test_wishes_are_kept_or_refused_with_a_reason(world: World) -> None:
    router = await two(world)
    assert (await router.route(PROMPT, worker="1.0"))["reason"] == "pinned"
    assert (await router.route(PROMPT, workers=["2.0"]))["worker"] == "2.0"
    sessions = {(await router.route(PROMPT, session="s"))["worker"] for _ in range(5)}
    assert len(sessions) == 1
    for body, status, kind in (
        ({"worker": "9.0"}, 503, "no-worker"),
        ({"workers": ["9.0"]}, 503, "no-worker"),
        ({"taints": ["none-has-it"]}, 503, "no-worker"),
        ({"model": "another"}, 404, "unknown-model"),
    ):
        answer = await router.post("/v1/route", tokens=PROMPT, **body)
        assert (answer.status_code, answer.json()["kind"]) == (status, kind), answer.text
        assert answer.json()["detail"]
    await router.route(PROMPT, request="twice")
    answer = await router.post("/v1/route", tokens=PROMPT, request="twice")
    assert (answer.status_code, answer.json()["kind"]) == (409, "duplicate")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b"\xff\xfe", "malformed"),
        (b"{}", "give `tokens` or `block_hashes`"),
        (b'{"tokens": []}', "at least one token - at `$.tokens`"),
        (b'{"tokens": [1, 2, -3]}', "at `$.tokens[2]`"),
        (b'{"tokens": [1, "x"]}', "Expected `int`, got `str` - at `$.tokens[1]`"),
        (b'{"tokens": [4294967296]}', "at `$.tokens[0]`"),
        (b'{"tokens": "AAA"}', "at `$.tokens`"),
        (b'{"token": [1]}', "unknown field `token`"),
        (b'{"tokens": [1], "worker": "x"}', "accepted: INSTANCE.RANK"),
        (b'{"tokens": [1], "workers": ["1.0", "x"]}', "at `$.workers[1]`"),
        (b'{"tokens": [1], "deadline_s": -1}', "at `$.deadline_s`"),
        (b'{"block_hashes": [1, 2], "prompt_tokens": 31}', "at `$.prompt_tokens`"),
        (b'{"block_hashes": [-1], "prompt_tokens": 31}', "at `$.block_hashes[0]`"),
        (b'{"tokens": [1], "temperature": 1e300}', "at `$.temperature`"),
    ],
)
async def test_a_question_that_makes_no_sense_is_told_what_and_where(
    world: World, body: bytes, says: str
) -> None:
    router = await two(world)
    for path in ("/v1/route", "/v1/route/explain"):
        answer = await router.client.post(path, content=body)
        told = answer.json()
        assert (answer.status_code, told["kind"]) == (400, "bad-request"), answer.text
        assert says in told["detail"]
    assert router.at_rest()
    assert b'kvbm_router_bad_requests_total{endpoint="/v1/route"} 1.0' in (
        router.assembly.metrics.render()
    )


async def test_a_body_is_bounded(world: World) -> None:
    router = await two(world, http__body_max=4096)
    answer = await router.client.post("/v1/route", content=b" " * 5000)
    assert (answer.status_code, answer.json()["kind"]) == (413, "too-large")


async def test_events_come_in_batches(world: World) -> None:
    router = await two(world)
    for name in ("a", "b"):
        await router.route(PROMPT, request=name)
    events = [
        {"request": "a", "kind": "first_token"},
        {"request": "a", "kind": "output", "tokens": 40},
        {"request": "nobody", "kind": "end"},
        {"request": "a", "kind": "end"},
        {"request": "b", "kind": "end", "ending": "failed"},
        {"request": "b", "kind": "first_token"},
    ]
    told = (await router.post("/v1/requests/events", events=events)).json()
    assert told == {"applied": 4, "unknown": ["nobody", "b"]}
    bad = await router.post("/v1/requests/events", events=[{"request": "a", "kind": "dies"}])
    assert bad.status_code == 400 and "at `$.events[0].kind`" in bad.json()["detail"]
    assert router.at_rest()
    text = router.assembly.metrics.render().decode()
    assert 'kvbm_router_requests_total{ending="done",model="m"} 1.0' in text
    assert 'kvbm_router_requests_total{ending="failed",model="m"} 1.0' in text


async def test_a_request_of_which_nothing_is_heard_ends(world: World) -> None:
    router = await two(world)
    await router.route(PROMPT, request="silent", lease_s=0.05)
    kept = await router.route(PROMPT, request="kept", lease_s=60)
    assert kept["lease_s"] == 60
    async with asyncio.timeout(60):
        while "silent" in router.assembly.reservations:
            await asyncio.sleep(0.05)
    assert router.assembly.reservations.expired_total == 1
    assert (await router.client.post("/v1/requests/kept/end")).status_code == 200
    assert router.at_rest()
    assert b'kvbm_router_requests_total{ending="expired",model="m"} 1.0' in (
        router.assembly.metrics.render()
    )


async def test_limits_change_at_run_time_and_hold_for_those_that_come_later(world: World) -> None:
    router = await two(world, busy__status=503, busy__retry_after="2s")
    for worker in ("1.0", "2.0"):
        await router.route(PROMPT, worker=worker, request=worker)
    answer = await router.post("/v1/busy_threshold", model=MODEL, prefill_tokens=300)
    assert answer.json()["models"] == [
        {"model": MODEL, "blocks_fraction": None, "prefill_tokens": 300, "prefill_fraction": None}
    ]
    full = await router.post("/v1/route", tokens=PROMPT)
    assert (full.status_code, full.json()["kind"]) == (503, "busy")
    assert full.headers["retry-after"] == "2"
    await world.engines.add(3)
    await router.see("1.0", "2.0", "3.0")
    assert (await router.route(PROMPT))["worker"] == "3.0"
    assert (await router.post("/v1/route", tokens=PROMPT)).status_code == 503
    # The reference's name for it, null is off.
    answer = await router.post("/v1/busy_threshold", active_prefill_tokens_threshold=None)
    assert answer.status_code == 200
    await router.route(PROMPT)
    for body, status in (
        ({"blocks_fraction": 2.0}, 400),
        ({"prefill_tokens": "x"}, 400),
        ({"model": "other", "prefill_tokens": 1}, 404),
    ):
        assert (await router.post("/v1/busy_threshold", **body)).status_code == status
    got = (await router.client.get("/v1/busy_threshold", params={"model": MODEL})).json()
    assert got["models"][0]["prefill_tokens"] is None


async def test_waiting_ends_with_room_a_full_line_or_the_deadline(world: World) -> None:
    router = await world.router(queue__hold_above=0.1, queue__limit=1)
    await world.engines.add(1)
    await router.see("1.0")
    await router.route(PROMPT, request="first")
    late = await router.post("/v1/route", tokens=PROMPT, deadline_s=0.02)
    assert (late.status_code, late.json()["kind"]) == (529, "deadline")
    waits = asyncio.create_task(router.route(PROMPT, request="patient", deadline_s=20))
    pool = router.assembly.models[MODEL].pools["decode"]
    async with asyncio.timeout(60):
        while not pool.router.waiting:
            await asyncio.sleep(0.01)
    full = await router.post("/v1/route", tokens=PROMPT)
    assert (full.status_code, full.json()["kind"]) == (529, "queue-full")
    assert full.headers["retry-after"] == "1"
    await router.client.post("/v1/requests/first/first_token")
    found = await soon(waits)
    assert found["waited_s"] > 0
    for name in ("first", "patient"):
        assert (await router.client.post(f"/v1/requests/{name}/end")).status_code == 200
    assert router.at_rest()


async def test_reservations_are_bounded(world: World) -> None:
    router = await two(world, reservations__limit=2)
    for _ in range(2):
        await router.route(PROMPT)
    answer = await router.post("/v1/route", tokens=PROMPT)
    assert (answer.status_code, answer.json()["kind"]) == (529, "full")


async def test_every_metric_of_the_table_is_exported_and_no_other(world: World) -> None:
    router = await world.router(
        events__plane="memory", index__predicted_ttl=5, busy__prefill_tokens=10_000
    )
    await world.engines.add(1)
    await world.engines.add(2, role="prefill")
    await world.engines.add(3, block_tokens=32)
    await router.see("1.0", "2.0")
    await router.route(PROMPT, request="a")
    await router.client.post("/v1/requests/a/output?tokens=30")
    await router.client.post("/v1/requests/a/end")
    await router.post("/v1/route", tokens=PROMPT, worker="9.0")
    await router.client.post("/v1/route", content=b"{")
    router.assembly.metrics.snapshot("written")
    node = FakeNode(router.assembly.runtime, router.assembly.plane, "default", "node-1")
    await node.serve()
    node.stored(("worker", 1, 0, StorageTier.DEVICE), None, [1, 2])
    feed = router.assembly.feed
    assert feed is not None
    await until(lambda: any(node.delay_s is not None for node in feed.status.nodes))
    text = (await router.client.get("/metrics")).text
    families = {
        family.name: family
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }
    for spec in SPECS:
        family = families.pop(spec.name.removesuffix("_total"))
        assert family.type == spec.kind and family.documentation == spec.help
        assert family.samples, f"{spec.name} has no sample"
        sample = next(one for one in family.samples if not one.name.endswith("_created"))
        assert set(sample.labels) - {"le"} == set(spec.labels), spec.name
    assert not families
    assert router_metrics_page() == (ROOT / "docs/ROUTER_METRICS.md").read_text(), (
        "run: python -m router.metrics > docs/ROUTER_METRICS.md"
    )


async def test_a_token_guards_all_below_v1(world: World) -> None:
    router = await two(world, http__token="a-token-of-16-up")
    async with httpx2.AsyncClient(base_url=router.client.base_url, verify=PLAIN) as stranger:
        assert (await stranger.get("/live")).status_code == 200
        assert (await stranger.get("/v1/workers")).status_code == 401
        answer = await stranger.post("/v1/route", json={"tokens": PROMPT})
        assert answer.status_code == 401 and "http.token" in answer.json()["detail"]
    await router.route(PROMPT)


async def test_without_a_token_pages_of_other_sites_route_nothing(world: World) -> None:
    router = await two(world)
    body = json.dumps({"tokens": PROMPT})
    for headers in ({"Origin": "http://elsewhere.example"}, {"Host": "rebound.example"}):
        answer = await router.client.post("/v1/route", content=body, headers=headers)
        assert answer.status_code == 403
    assert router.at_rest()


async def test_it_is_ready_when_enough_workers_were_there(world: World) -> None:
    router = await world.router(min_workers=1)
    answer = await router.client.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["checks"]["workers"] == "0 of 1 workers were found"
    await world.engines.add(1)
    await router.see("1.0")
    for path in ("/ready", "/health"):
        assert (await router.client.get(path)).json()["status"] == "ready"
    await world.engines.remove(1)
    await router.see()
    assert (await router.client.get("/ready")).status_code == 200
    none = await router.post("/v1/route", tokens=PROMPT)
    assert (none.status_code, none.json()["kind"]) == (503, "no-worker")


async def test_the_schema_names_what_is_asked(world: World) -> None:
    router = await two(world)
    schema = (await router.client.get("/openapi.json")).json()
    asked = schema["paths"]["/v1/route"]["post"]["requestBody"]["content"]["application/json"]
    assert asked["schema"]["$ref"].endswith("/RouteAsk")
    assert "tokens" in schema["components"]["schemas"]["RouteAsk"]["properties"]
    index = (await router.client.get("/v1/index")).json()
    assert index["source"] == "events" and index["feed"]["nodes"] == []
    assert (await router.client.get("/v1/replicas")).json()["name"]


async def test_the_same_is_asked_over_the_request_plane(world: World) -> None:
    router = await two(world, requests__plane="tcp")
    router.store("2.0", PROMPT, 20)
    discovery = create_discovery(DiscoverySettings(discovery="memory"), {}, world.store)
    plane = create_request_plane(RequestPlaneSettings(), "frontend")
    async with Runtime(discovery, plane) as runtime:
        place = runtime.namespace("default").component("router")
        route, events, explain = (
            place.endpoint(name).client() for name in ("route", "events", "explain")
        )
        ask = json.dumps({"tokens": PROMPT, "request": "a"}).encode()
        told = [json.loads(item) async for item in explain.round_robin(ask)]
        [found] = [json.loads(item) async for item in route.round_robin(ask)]
        assert found["worker"] == told[0]["worker"] == "2.0"
        happened = {"events": [{"request": "a", "kind": "output"}, {"request": "a", "kind": "end"}]}
        instance = int(found["events_instance"], 16)
        answers = events.direct(json.dumps(happened).encode(), instance)
        assert [json.loads(item) async for item in answers] == [{"applied": 2, "unknown": []}]
        [refused] = [json.loads(item) async for item in route.round_robin(b'{"tokens": 1}')]
        assert refused["rejected"]["kind"] == "bad-request"
        [refused] = [
            json.loads(item) async for item in route.round_robin(b'{"tokens": [1], "worker": "9"}')
        ]
        assert refused["rejected"]["kind"] == "no-worker"
    text = router.assembly.metrics.render().decode()
    assert 'kvbm_router_plane_requests_total{outcome="done"} 5.0' in text
    assert router.at_rest()
