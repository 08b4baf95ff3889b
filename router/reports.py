"""What is the case in a router, as values that JSON has and as samples of metrics."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any, Final

from router.assembly import Assembly
from router.feed import FeedStatus
from router.index import Tier, WorkerId
from router.model import ModelRouter
from router.node_feed import NodeState
from router.pool import Pool
from router.workers import Speed
from runtime.metrics import Samples

_Found = defaultdict[str, dict[tuple[str, ...], float]]
_LOWER: Final = ("g2", "g3", "g4")
_NOTHING: Final = Speed(0.0, 0.0, 0.0, 0.0, 0.0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def workers_report(assembly: Assembly) -> dict[str, Any]:
    """All workers of all models, with what each is, does, holds and how fast it is."""
    return {
        "models": [
            {
                "model": model.name,
                "block_tokens": model.block_tokens,
                "workers": [
                    _worker_report(assembly, model, pool, worker.id)
                    for pool in model.pools.values()
                    for worker in sorted(pool.workers, key=lambda one: one.id)
                ],
                "waiting": {name: pool.router.waiting for name, pool in model.pools.items()},
            }
            for model in assembly.models.values()
        ],
        "refused_total": assembly.fleet.refused_total,
        "refused": [asdict(refusal) for refusal in assembly.fleet.latest_refusals],
    }


def speed_of(assembly: Assembly, model: ModelRouter, worker: WorkerId) -> dict[str, Any]:
    """Seconds, and where they come from."""
    pool = model.pool_of(worker)
    found = None if pool is None else pool.workers.get(worker)
    if found is None:
        return {}
    prefill, step = model.sources(worker)
    loads = any(assembly.speeds.of(worker, _NOTHING).load_s_per_block)
    return {
        "prefill_s_per_token": found.speed.prefill_s_per_token,
        "prefill_from": prefill,
        "step_s": found.speed.step_s,
        "step_from": step,
        "load_s_per_block": dict(zip(_LOWER, found.speed.load_s_per_block, strict=True)),
        "load_from": "node" if loads else "assumed",
    }


def index_report(assembly: Assembly) -> dict[str, Any]:
    """How full the index is, what came of its changes, and how the feeds are."""
    index, feed = assembly.index, assembly.feed_status
    snapshots = assembly.snapshots
    return {
        "source": assembly.settings.index.source,
        "blocks": len(index),
        "capacity": assembly.settings.index.capacity,
        "bytes": index.allocated_bytes,
        "workers": {
            str(worker): _by_tier(index.held_blocks(worker))
            for worker in index.workers
            if worker is not None
        },
        "outcomes_total": {o.value: count for o, count in index.outcomes_total.items()},
        "stored_blocks_total": index.stored_blocks_total,
        "removed_blocks_total": index.removed_blocks_total,
        "feed": None if feed is None else {"is_exact": feed.is_exact, **asdict(feed)},
        "snapshot": None if snapshots is None else asdict(snapshots.status),
    }


def replicas_report(assembly: Assembly) -> dict[str, Any]:
    """The other routers of each model, by pool, as this one knows them."""
    return {
        "name": assembly.settings.name,
        "models": [
            {
                "model": name,
                "pools": {
                    pool: {
                        "peers": [asdict(peer) for peer in load.peers()],
                        "counts": asdict(load.counts),
                    }
                    for pool, load in assembly.replicas_of(name).items()
                },
            }
            for name in assembly.models
        ],
    }


def samples(assembly: Assembly) -> Samples:
    """Of all metrics that are read and not counted."""
    found: _Found = defaultdict(dict)
    metrics, held, index = assembly.metrics, assembly.reservations, assembly.index
    plane, snapshots = assembly.plane.status(), assembly.snapshots
    found["build_info"][metrics.version, metrics.router] = 1
    for check, why in assembly.readiness().items():
        found["ready"][check,] = float(why is None)
    found["requests_running"][()] = len(held)
    found["requests_running_limit"][()] = assembly.settings.reservations.limit
    for reason, count in assembly.fleet.refused_total.items():
        found["records_refused_total"][reason,] = count
    found["index_blocks"][()] = len(index)
    found["index_capacity_blocks"][()] = assembly.settings.index.capacity
    found["index_bytes"][()] = index.allocated_bytes
    found["index_workers"][()] = sum(worker is not None for worker in index.workers)
    found["index_stored_blocks_total"][()] = index.stored_blocks_total
    found["index_removed_blocks_total"][()] = index.removed_blocks_total
    for outcome, count in index.outcomes_total.items():
        found["kv_cache_events_applied_total"][outcome.value,] = count
    found["event_plane_connected"][()] = float(plane.connected)
    found["event_plane_dropped_total"][()] = plane.dropped_total
    found["event_plane_faults_total"][()] = plane.faults_total
    for ending, count in assembly.runtime.outcomes_total().items():
        found["plane_requests_total"][ending,] = count
    found["snapshot_bytes"][()] = 0 if snapshots is None else snapshots.status.bytes
    _of_feed(found, assembly.feed_status)
    for model in assembly.models.values():
        for pool in model.pools.values():
            _of_pool(found, assembly, model.name, pool)
        for name, load in assembly.replicas_of(model.name).items():
            found["replicas"][model.name, name] = len(load.peers())
            for kind, count in asdict(load.counts).items():
                found["replica_events_total"][model.name, name, kind] = count
    return {f"kvbm_router_{name}": values for name, values in found.items()}


def _of_feed(found: _Found, feed: FeedStatus | None) -> None:
    for state in NodeState:
        nodes = () if feed is None else feed.nodes
        found["feed_nodes"][state.value,] = sum(node.state is state for node in nodes)
    if feed is None:
        return
    found["feed_behind_events"][()] = sum(node.behind for node in feed.nodes)
    found["feed_events_total"][()] = feed.events_total
    found["feed_blocks_total"][()] = feed.blocks_total
    faults = found["feed_faults_total"]
    faults["malformed",] = feed.malformed_total
    faults["unknown",] = feed.unknown_total
    faults["dropped",] = feed.dropped_total
    faults["refused",] = feed.refused_total
    for node in feed.nodes:
        if node.delay_s is not None:
            found["feed_delay_seconds"][node.node,] = node.delay_s


def _of_pool(
    found: _Found,
    assembly: Assembly,
    model: str,
    pool: Pool,
) -> None:
    label = (model, pool.name)
    found["queue_pending_requests"][label] = pool.router.waiting
    found["queue_limit"][label] = pool.router.waiting_max
    serving = int(pool.workers.accepting[: pool.workers.rows].sum())
    found["workers"][*label, "serving"] = serving
    found["workers"][*label, "draining"] = len(pool.workers) - serving
    if pool.memory is not None:
        found["route_memory_blocks"][label] = len(pool.memory)
        found["route_memory_pruned_blocks_total"][label] = pool.memory.pruned_total
    for worker in pool.workers:
        name = (model, str(worker.id))
        load = pool.router.load_of(worker.id)
        found["worker_requests"][name] = load["requests"]
        found["worker_active_blocks"][name] = load["blocks"]
        found["worker_active_prefill_tokens"][name] = load["prefill_tokens"]
        if worker.capacity.kv_blocks is not None:
            found["worker_blocks_limit"][name] = worker.capacity.kv_blocks
        found["worker_prefill_token_seconds"][name] = worker.speed.prefill_s_per_token
        found["worker_step_seconds"][name] = worker.speed.step_s
        for tier, blocks in _by_tier(assembly.index.held_blocks(worker.id)).items():
            found["worker_held_blocks"][*name, tier] = blocks


def _worker_report(
    assembly: Assembly, model: ModelRouter, pool: Pool, worker: WorkerId
) -> dict[str, Any]:
    known = pool.workers.at(pool.workers.row(worker))
    engine = model.engines[worker.instance]
    return {
        "worker": str(worker),
        "role": engine.card.role,
        "pool": pool.name,
        "state": "serving" if known.accepting else "draining",
        "healthy": known.healthy,
        "busy": pool.selector.limits.why_busy(pool.workers, pool.workers.row(worker)),
        "url": engine.card.url,
        "taints": sorted(known.taints),
        "load": pool.router.load_of(worker),
        "capacity": {
            "kv_blocks": known.capacity.kv_blocks,
            "batch_tokens_max": known.capacity.batch_tokens_max,
        },
        "held_blocks": _by_tier(assembly.index.held_blocks(worker)),
        "speed": speed_of(assembly, model, worker),
    }


def _by_tier(blocks: tuple[int, ...]) -> dict[str, int]:
    return {tier.name.lower(): count for tier, count in zip(Tier, blocks, strict=True)}
