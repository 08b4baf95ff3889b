"""A router put together from its settings: models, workers, index, feeds and replicas.

    async with running(settings, os.environ, metrics) as assembly:
        placed = await assembly.models["m"].route(query, deadline_s=30.0)

A program that has its own runtime and event plane gives them to `Assembly` and runs `run` itself;
the frontend has its router that way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import structlog

from router.feed import FeedStatus, NodeFeeds
from router.fleet import Fleet, Refused
from router.index import Index, WorkerId
from router.limits import BusyLimits
from router.load import ActiveSequences
from router.metrics import RouterMetrics
from router.model import Engine, ModelRouter
from router.pool import PoolName, Surroundings
from router.recent import Recent
from router.replica import ReplicatedLoad
from router.reservations import SWEEP_S, Reservations
from router.router import Load
from router.settings import PROGRAM, RouterSettings
from router.snapshots import Snapshots
from router.speeds import Speeds
from router.workers import Worker, Workers
from runtime.component import Runtime
from runtime.discovery import create_discovery
from runtime.discovery.store import Store
from runtime.event_peers import joined
from runtime.events import EventPlane, create_event_plane
from runtime.requests import create_request_plane

MODELS_MAX: Final = 1024
LANES: Final = 4
"""In the index, for each worker: its own, and what feeds keep of owners and snapshots that come."""
RANKS_MAX: Final = 1 << 32
"""Above are ranks that feeds use for themselves."""

_log = structlog.get_logger("router")


@dataclass(slots=True)
class _Replicas:
    """Of one model: the loads that are told to other routers, and who tells them."""

    loads: dict[PoolName, ReplicatedLoad]
    tasks: list[asyncio.Task[None]]


class Assembly:
    """All methods are called from one event loop. `run` is called once."""

    def __init__(
        self,
        settings: RouterSettings,
        runtime: Runtime,
        plane: EventPlane,
        metrics: RouterMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.runtime = runtime
        self.plane = plane
        self.metrics = metrics
        self.recent = Recent(metrics)
        self.models: dict[str, ModelRouter] = {}
        self.index = Index(settings.index.capacity, LANES * settings.index.workers_max)
        self.reservations = Reservations(settings.reservations.limit, clock)
        self.namespace = settings.events.namespace
        self.fleet = Fleet(runtime.discovery, self.namespace, self._put, self._remove)
        self.speeds = Speeds(self)
        self.feed: NodeFeeds | None = None
        if settings.index.source == "events":
            self.feed = NodeFeeds(
                runtime, plane, self.index, self.namespace, settings.feed, speeds=self.speeds
            )
        self.snapshots: Snapshots | None = None
        if settings.snapshot is not None:
            self.snapshots = Snapshots(settings.snapshot.path, settings.snapshot.max_age)
        self._clock = clock
        self._around = Surroundings(settings, self.index, self._load_for, metrics.took, clock)
        self._epoch = time.time_ns()
        self._replicas: dict[str, _Replicas] = {}
        self._limits: dict[str, BusyLimits] = {}
        self._models_of: dict[int, str] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._started_at = clock()
        self._was_exact = self.feed is None
        self._had_workers = settings.min_workers == 0

    async def run(self) -> None:
        """Until cancelled: engines are found, events followed, other routers heard."""
        restored: frozenset[WorkerId] = frozenset()
        if self.snapshots is not None:
            self.metrics.snapshot(self.snapshots.read(self.index))
            restored = self._restored()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                if self.feed is not None:
                    tasks.create_task(self.feed.run(), name="feed")
                tasks.create_task(self._sweep(), name="reservations")
                if restored:
                    tasks.create_task(self._drop_strangers(restored), name="restored")
                if self.snapshots is not None:
                    tasks.create_task(self._keep(self.snapshots), name="snapshots")
                await self.fleet.start()
                try:
                    await asyncio.Event().wait()
                finally:
                    await self.fleet.close()
        finally:
            self.reservations.end_all()
            for replicas in self._replicas.values():
                for load in replicas.loads.values():
                    load.flush()
            if self.snapshots is not None:
                self.metrics.snapshot(self.snapshots.write(self.snapshots.pack(self.index)))

    # -- what is the case ------------------------------------------------------------------

    def readiness(self) -> dict[str, str | None]:
        """By check, why it does not pass."""
        plane = self.plane.status()
        workers = sum(len(model) for model in self.models.values())
        self._had_workers |= workers >= self.settings.min_workers
        least = self.settings.min_workers
        away = self.runtime.discovery.status().error
        unlisted = "engines were not listed yet" + (f": {away}" if away else "")
        return {
            "discovery": None if self.fleet.is_synced else unlisted,
            "events": None if plane.kind == "none" or plane.connected else str(plane.error),
            "index": None if self._is_warm() else "nodes have not told yet what they hold",
            "workers": None if self._had_workers else f"{workers} of {least} workers were found",
        }

    @property
    def feed_status(self) -> FeedStatus | None:
        return None if self.feed is None else self.feed.status

    def replicas_of(self, model: str) -> dict[PoolName, ReplicatedLoad]:
        """None where replicas are not told."""
        found = self._replicas.get(model)
        return {} if found is None else found.loads

    def limits_of(self, model: str) -> BusyLimits:
        return self._limits.get(model, self.settings.busy.limits)

    def set_limits(self, model: str, limits: BusyLimits) -> None:
        """From now on, for the engines that come later too."""
        self._limits[model] = limits
        for pool in self.models[model].pools.values():
            pool.selector.limits = limits

    # -- workers' speeds, for `Speeds` -----------------------------------------------------

    def get(self, worker: WorkerId) -> Worker | None:
        model = self.models.get(self._models_of.get(worker.instance, ""))
        pool = None if model is None else model.pool_of(worker)
        return None if pool is None else pool.workers.get(worker)

    def change(self, worker: Worker) -> None:
        """Its node has measured it."""
        model = self.models[self._models_of[worker.id.instance]]
        model.refresh(worker.id)

    # -- engines ---------------------------------------------------------------------------

    def _put(self, engine: Engine) -> None:
        """Raises Refused."""
        card, settings = engine.card, self.settings
        before = self._models_of.get(engine.instance)
        if settings.models and card.model not in settings.models:
            raise Refused("model", f"the model {card.model} is not routed here")
        if before is not None and before != card.model:
            self._remove(engine.instance)
            before = None
        model = self.models.get(card.model)
        wanted = settings.block_tokens
        if wanted is None and model is not None and model.engines.keys() - {engine.instance}:
            wanted = model.block_tokens
        if wanted is not None and card.block_tokens != wanted:
            raise Refused(
                "block_tokens",
                f"blocks of {card.block_tokens} tokens; others of {card.model} have {wanted}",
            )
        workers = sum(len(one) for one in self.models.values())
        if before is None and workers + card.dp_size > settings.index.workers_max:
            raise Refused("workers", f"index.workers_max is {settings.index.workers_max}")
        if model is not None and model.block_tokens != card.block_tokens:
            self._end(card.model)
            model = None
        if model is None:
            model = self._begin(card.model, card.block_tokens)
        model.put(engine)
        self._models_of[engine.instance] = card.model
        if before is None and self.feed is not None:
            for worker in engine.workers:
                self.feed.worker_added(worker)

    def _remove(self, instance: int) -> None:
        name = self._models_of.pop(instance, None)
        if name is not None:
            self.models[name].remove(instance)

    def _begin(self, name: str, block_tokens: int) -> ModelRouter:
        if len(self.models) >= MODELS_MAX:
            empty = next((one for one, model in self.models.items() if not len(model)), None)
            if empty is None:
                raise Refused("model", f"{MODELS_MAX} models have engines already")
            self._end(empty)
        self._replicas[name] = _Replicas({}, [])
        model = ModelRouter(
            name,
            block_tokens,
            self._around,
            measured=self.speeds,
            meter=self.recent,
            on_lost=self.reservations.lost,
        )
        self.models[name] = model
        self.set_limits(name, self.limits_of(name))
        return model

    def _end(self, name: str) -> None:
        model = self.models.pop(name)
        for instance in list(model.engines):
            model.remove(instance)
            self._models_of.pop(instance, None)
        for task in self._replicas.pop(name).tasks:
            task.cancel()

    def _load_for(
        self, model: str, pool: PoolName, workers: Workers, active: ActiveSequences
    ) -> Load:
        settings = self.settings
        if not settings.replicas.sync or settings.events.plane == "none":
            return active
        assert self._tasks is not None, "engines are found while it runs"
        load = ReplicatedLoad(
            workers,
            active,
            self.plane,
            namespace=self.namespace,
            model=f"{model}/{pool}",
            name=settings.name,
            epoch=self._epoch,
            silence_s=settings.replicas.silence,
            clock=self._clock,
        )
        replicas = self._replicas[model]
        replicas.loads[pool] = load
        task = self._tasks.create_task(load.run(), name=f"replica {model} {pool}")
        replicas.tasks.append(task)
        return load

    # -- tasks -----------------------------------------------------------------------------

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            ended = self.reservations.expire()
            if ended:
                _log.warning("requests_expired", requests=ended)

    async def _keep(self, snapshots: Snapshots) -> None:
        assert self.settings.snapshot is not None
        while True:
            await asyncio.sleep(self.settings.snapshot.interval)
            packed = snapshots.pack(self.index)
            self.metrics.snapshot(await asyncio.to_thread(snapshots.write, packed))

    def _restored(self) -> frozenset[WorkerId]:
        """Workers in the index that was read. What feeds had put there for themselves goes."""
        workers = {worker for worker in self.index.workers if worker is not None}
        for worker in workers:
            if worker.dp_rank >= RANKS_MAX:
                self.index.remove_worker(worker)
        return frozenset(worker for worker in workers if worker.dp_rank < RANKS_MAX)

    async def _drop_strangers(self, restored: frozenset[WorkerId]) -> None:
        """Workers of the snapshot that are not there when all are."""
        await self.fleet.wait_synced()
        await asyncio.sleep(self.settings.index.warm_up)
        for worker in restored:
            if self.get(worker) is None:
                self.index.remove_worker(worker)
                await asyncio.sleep(0)

    def _is_warm(self) -> bool:
        if not self._was_exact and self.feed is not None:
            late = self._clock() - self._started_at >= self.settings.index.warm_up
            self._was_exact = late or (self.fleet.is_synced and self.feed.status.is_exact)
        return self._was_exact


@contextlib.asynccontextmanager
async def running(
    settings: RouterSettings,
    environ: Mapping[str, str],
    metrics: RouterMetrics,
    memory: Store | None = None,
) -> AsyncIterator[Assembly]:
    """An assembly with planes of its own, for as long as the context lasts."""
    plane = create_event_plane(settings.events, PROGRAM)
    await plane.start()
    try:
        discovery = create_discovery(settings.discovery, environ, memory)
        requests = create_request_plane(settings.requests, PROGRAM)
        async with (
            Runtime(discovery, requests) as runtime,
            joined(runtime.discovery, plane, settings.events, publishes=True, listens=True),
        ):
            assembly = Assembly(settings, runtime, plane, metrics)
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(assembly.run(), name="router")
                yield assembly
                task.cancel()
    finally:
        await plane.close()


def changed_limits(limits: BusyLimits, changes: Mapping[str, float | int | None]) -> BusyLimits:
    """Raises ValueError."""
    return replace(limits, **changes)  # type: ignore[arg-type]
