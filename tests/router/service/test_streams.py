"""From what a node says to where a request goes: blocks, shared tiers, speeds, a new router."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from runtime.component import Runtime
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.events.node_stream import NodeSpeeds, WorkerSpeed
from runtime.events.router_event import StorageTier
from runtime.hashing import block_hashes
from runtime.requests import RequestPlaneSettings, create_request_plane
from tests.router.feed.node import FakeNode
from tests.router.service.world import BLOCK, Routing, World
from tests.runtime.planes import nats_settings

PROMPT = list(range(100, 420))
TOKENS = [int(h) for h in block_hashes(np.array(PROMPT, dtype=np.uint32), BLOCK)]
OWNER = 77


async def until_found(router: Routing, worker: str, blocks: dict[str, int]) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            told = (await router.post("/v1/route/explain", tokens=PROMPT)).json()
            found = {one["worker"]: one for one in told["decode"]["candidates"]}
            if found[worker]["blocks_found"] == blocks:
                return dict(found)
            await asyncio.sleep(0.05)


async def test_what_a_node_says_decides_where_a_request_goes(world: World, nats: Any) -> None:
    plane = nats_settings(nats)
    events = {
        "events__plane": "nats",
        "events__nats_url": plane.nats_url,
        "events__nats_user": nats.user,
        "events__nats_password": nats.password,
        "requests__plane": "tcp",
    }
    router = await world.router(**events)
    for instance in (1, 2, 3):
        await world.engines.add(instance)
    await router.see("1.0", "2.0", "3.0")
    discovery = create_discovery(DiscoverySettings(discovery="memory"), {}, world.store)
    requests = create_request_plane(RequestPlaneSettings(), "node")
    async with Runtime(discovery, requests) as runtime:
        node = FakeNode(runtime, router.assembly.plane, "default", "node-1")
        node.readers = {(1, 0): OWNER, (2, 0): OWNER}
        await node.serve()
        node.stored(("worker", 1, 0, StorageTier.DEVICE), None, TOKENS[:4])
        node.stored(("cache_owner", OWNER, 0, StorageTier.HOST_PINNED), None, TOKENS[:15])
        reach = {"g1": 4, "g2": 11, "g3": 0, "g4": 0}
        found = await until_found(router, "1.0", reach)
        assert found["2.0"]["blocks_found"] == {"g1": 0, "g2": 15, "g3": 0, "g4": 0}
        assert set(found["3.0"]["blocks_found"].values()) == {0}
        assert (await router.route(PROMPT))["worker"] in {"1.0", "2.0"}
        slow = WorkerSpeed(1, 0, prefill_s_per_token=0.5, load_s_per_block=(2.0, 0.0, 0.0))
        node.speeds(NodeSpeeds(node.publisher, "node-1", [slow]))
        async with asyncio.timeout(30):
            while True:
                told = (await router.post("/v1/route/explain", tokens=PROMPT)).json()
                speeds = {o["worker"]: o["speed"] for o in told["decode"]["candidates"]}
                if speeds["1.0"]["prefill_from"] == "node":
                    break
                await asyncio.sleep(0.05)
        assert speeds["1.0"]["prefill_s_per_token"] == 0.5
        assert speeds["1.0"]["load_s_per_block"] == {"g2": 2.0, "g3": 0.001, "g4": 0.002}
        for other in ("2.0", "3.0"):
            assert speeds[other]["prefill_from"] == "others"
            assert speeds[other]["prefill_s_per_token"] == 0.5
        assert (await router.route(PROMPT))["worker"] == "2.0"
        # A router that comes later asks for all, and an engine that comes again is told of anew.
        later = await world.router(**events)
        await later.see("1.0", "2.0", "3.0")
        await until_found(later, "1.0", reach)
        async with asyncio.timeout(30):
            while (await later.client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.05)
        await world.engines.remove(1)
        await later.see("2.0", "3.0")
        await world.engines.add(1)
        await later.see("1.0", "2.0", "3.0")
        await until_found(later, "1.0", reach)
        index = (await later.client.get("/v1/index")).json()
        assert index["feed"]["is_exact"] and index["feed"]["nodes"][0]["node"] == "node-1"
        assert index["workers"]["1.0"]["g1"] == 4
