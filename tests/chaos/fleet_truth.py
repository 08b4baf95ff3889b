"""What engines hold, asked of their nodes, and whether routers believe just that."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.component import Runtime
from runtime.discovery import create_discovery
from runtime.events.node_stream import (
    COMPONENT,
    ENDPOINT,
    CatchUp,
    decode_begins,
    decode_rows,
    encode_catch_up,
)
from runtime.hashing import block_hashes, sequence_hashes
from runtime.instances import Instances
from runtime.names import EndpointName
from runtime.requests import RequestError, RequestPlaneSettings, create_request_plane
from tests.chaos.fleet import BLOCK_TOKENS, Fleet

ASK_S = 10.0
EVENTS = EndpointName("default", COMPONENT, ENDPOINT)
OWN_RANKS = 1 << 32  # above are those that feeds use for themselves
ASKED_EVERY = 4
Held = dict[str, set[int]]
"""By worker, names of the blocks in its own memory."""


async def held(fleet: Fleet) -> Held:
    """By every engine whose node answers; a lease may outlive its owner for a while."""
    requests = create_request_plane(RequestPlaneSettings(), "truth")
    found: Held = {}
    async with Runtime(create_discovery(fleet.discovery, {}), requests) as runtime:
        instances = Instances(runtime.discovery, EVENTS.instances_prefix)
        await instances.start()
        await instances.synced.wait()
        for record in instances.known.values():
            try:
                async with runtime.client.stream(
                    record.transport, str(EVENTS), encode_catch_up(CatchUp()), deadline_s=ASK_S
                ) as answer:
                    items = [item async for item in answer]
            except RequestError:
                continue
            decode_begins(items[0])
            for item in items[1:]:
                rows = decode_rows(item)
                if rows.residency_domain == "worker":
                    tokens = np.frombuffer(rows.tokens, "<u8")
                    parents = np.frombuffer(rows.parents, "<u8")
                    names = found.setdefault(f"{rows.worker_id:x}.{rows.dp_rank}", set())
                    names.update(_names(parents, tokens))
        await instances.close()
    return found


def _names(parents: Any, tokens: Any) -> list[int]:
    """A chain of two blocks ends with the second one's name."""
    return [
        int(sequence_hashes(np.array([parent, one] if parent else [one], np.uint64))[-1])
        for parent, one in zip(parents, tokens, strict=True)
    ]


async def differences(fleet: Fleet, prompts: dict[str, list[list[int]]]) -> str:
    """Between what engines hold and what the frontend and the router say of it; empty: none."""
    true = await held(fleet)
    for url in (fleet.operators_url, fleet.router_url):
        index = await fleet.get(f"{url}/v1/index")
        if not index["feed"]["is_exact"]:
            return f"{url}: {[node for node in index['feed']['nodes'] if node['state'] != 'live']}"
        wanted = {worker: len(names) for worker, names in true.items() if names}
        believed = {
            worker: tiers["g1"]
            for worker, tiers in index["workers"].items()
            if int(worker.partition(".")[2]) < OWN_RANKS and any(tiers.values())
        }
        if believed != wanted:
            return f"{url} has blocks {believed}, the engines {wanted}"
        for model, of_model in prompts.items():
            for prompt in of_model[::ASKED_EVERY]:
                said = await found(fleet, url, model, prompt)
                names = sequence_hashes(block_hashes(prompt, BLOCK_TOKENS)).tolist()
                for worker, blocks in said.items():
                    have = true.get(worker, set())
                    leading = next(
                        (i for i, one in enumerate(names) if one not in have), len(names)
                    )
                    if blocks != leading:
                        return f"{url}: {worker} has {leading} leading blocks, not {blocks}"
    return ""


async def unfinished(fleet: Fleet) -> str:
    """What is still counted somewhere though nobody asks for anything; empty: nothing."""
    for url in (fleet.operators_url, fleet.router_url):
        for model in (await fleet.get(f"{url}/v1/workers"))["models"]:
            for worker in model["workers"]:
                if any(worker["load"].values()):
                    return f"{url}: {worker['worker']} has {worker['load']}"
            if any(model["waiting"].values()):
                return f"{url}: {model['model']} has {model['waiting']} waiting"
    for url, name in (
        (fleet.router_url, "kvbm_router_requests_running "),
        (fleet.frontend_url, "kvbm_frontend_inflight_requests{"),
        *((engine_url, "vllm:num_requests_") for engine_url in await _engines(fleet)),
    ):
        for line in (await fleet.http.get(f"{url}/metrics")).text.splitlines():
            if line.startswith(name) and float(line.rpartition(" ")[2]):
                return f"{url}: {line}"
    sessions = (await fleet.get(f"{fleet.daemon_url}/v1/sessions"))["sessions"]
    claims = sum(session["claims"] for session in sessions)
    schedulers = sum(session["role"] == "scheduler" for session in sessions)
    if claims or schedulers != len(fleet.engines):
        return f"{schedulers} engines at the daemon, with {claims} claims"
    return ""


async def _engines(fleet: Fleet) -> list[str]:
    told = await fleet.get(f"{fleet.operators_url}/v1/workers")
    return [worker["url"] for model in told["models"] for worker in model["workers"]]


async def found(fleet: Fleet, url: str, model: str, prompt: list[int]) -> dict[str, int]:
    """Leading blocks of the prompt by worker."""
    asked = {"model": model, "tokens": prompt}
    told = (await fleet.http.post(f"{url}/v1/route/explain", json=asked)).json()
    return {one["worker"]: one["blocks_found"]["g1"] for one in told["decode"]["candidates"]}
