"""Workers of one model that one router chooses from, made as the settings say.

A model has two: `decode`, which gives out tokens (and computes prompts, where engines do both), and
`prefill`, which computes prompts for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from router.approximate import RouteMemory
from router.cost import BlocksCost, SecondsCost
from router.index import Index
from router.load import ActiveSequences
from router.queue import WaitingLine
from router.router import Load, Router, Step, Waiting
from router.selector import Selector
from router.settings import RouterSettings
from router.workers import Workers

PoolName = Literal["decode", "prefill"]
POOLS: tuple[PoolName, ...] = ("decode", "prefill")


LoadFor = Callable[[str, PoolName, Workers, ActiveSequences], Load]
"""Of a model's pool: where its load is counted, here alone or with all routers of the model."""


def load_here(_model: str, _pool: PoolName, _workers: Workers, active: ActiveSequences) -> Load:
    return active


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What pools of all models share."""

    settings: RouterSettings
    index: Index
    load_for: LoadFor = load_here
    timed: Callable[[Step, float], None] | None = None
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Pool:
    name: PoolName
    workers: Workers
    active: ActiveSequences
    load: Load
    selector: Selector
    router: Router
    memory: RouteMemory | None

    @property
    def is_serving(self) -> bool:
        """Whether any of its workers takes requests."""
        workers = self.workers
        return len(workers) > 0 and bool(workers.accepting[: workers.rows].any())


def create_pool(around: Surroundings, model: str, name: PoolName, block_tokens: int) -> Pool:
    settings, workers = around.settings, Workers(around.clock)
    active = ActiveSequences(workers)
    load = around.load_for(model, name, workers, active)
    of_prefill = settings.prefill_policy if name == "prefill" else None
    blocks = settings.blocks
    selector = Selector(
        workers,
        of_prefill or settings.policy,
        seconds=SecondsCost(settings.seconds.decode_weight),
        blocks=BlocksCost(
            blocks.overlap_credit,
            blocks.overlap_decay,
            blocks.host_credit,
            blocks.disk_credit,
            blocks.prefill_scale,
            blocks.request_weight,
        ),
        limits=settings.busy.limits,
        temperature=settings.temperature,
        sessions=settings.sessions,
    )
    memory = _memory(around)
    line: WaitingLine[Waiting] = WaitingLine(settings.queue.order, settings.queue.limit)
    router = Router(
        workers,
        around.index,
        load,
        selector,
        block_tokens=block_tokens,
        memory=memory,
        line=line,
        hold_above=settings.queue.hold_above,
        tracks_blocks=name == "decode",
        timed=around.timed,
        clock=around.clock,
    )
    return Pool(name, workers, active, load, selector, router, memory)


def _memory(around: Surroundings) -> RouteMemory | None:
    index = around.settings.index
    ttl_s = index.routes_ttl if index.source == "routes" else index.predicted_ttl
    if not ttl_s:
        return None
    # A block is one residency a worker, so that as many distinct ones are the most there can be.
    routes = Index(index.routes_capacity, index.workers_max)
    return RouteMemory(routes, ttl_s=ttl_s, blocks_max=index.routes_capacity, clock=around.clock)
