"""Deployments and StatefulSets: more at once, fewer only after a drain.

Replicas are set through the `scale` subresource. To do with fewer, engines are asked through
discovery to drain (`runtime/drain.py`): routers send them nothing more, they finish what they
have, and their KV stays with the node's daemon. Only when they have nothing to do, or their time
is up, do the replicas go down. Of a StatefulSet the last pods go; of a Deployment those whose
deletion is made cheapest by annotation. Which pod an engine is, its record's host says.
https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/deployment-v1/
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from planner.actuate.base import ActuateError, Applied, surplus
from planner.decide import Decision
from planner.fleet import Member
from planner.settings import KubernetesSettings, Workload
from runtime.discovery import Discovery, DiscoveryUnavailable
from runtime.discovery.kubernetes_api import Api, NotFound, Object, Resource
from runtime.drain import drain_key
from runtime.engine_card import Role

PODS: Final = Resource("api/v1", "pods")
DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
CHEAP: Final = "-1000"

_log = structlog.get_logger("planner")


@dataclass(slots=True)
class _Pool:
    """`goal` is what was asked of us, `put` the replicas that we last set or saw for it."""

    workload: Workload
    goal: int | None = None
    put: int | None = None
    draining: dict[str, float] = field(default_factory=dict)  # pod -> until when it may take


class Kubernetes:
    kind = "kubernetes"
    acts = True

    def __init__(
        self,
        api: Api,
        discovery: Discovery,
        settings: KubernetesSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._discovery = discovery
        self._drain_timeout_s = settings.drain_timeout
        self._clock = clock
        self._pools = {role: _Pool(workload) for role, workload in settings.workloads.items()}

    async def start(self) -> None: ...

    async def close(self) -> None:
        await self._api.close()

    async def desired(self) -> Mapping[Role, int]:
        """What replicas say, but where a drain of ours is under way what we work towards."""
        found: dict[Role, int] = {}
        for role, pool in self._pools.items():
            replicas = await self._replicas(pool.workload)
            if pool.goal is not None and replicas == pool.put:
                found[role] = pool.goal
            else:
                found[role] = replicas
        return found

    async def apply(self, decision: Decision, members: Sequence[Member]) -> Applied:
        done: list[str] = []
        for role, target in decision.targets.items():
            pool = self._pools.get(role)
            if pool is None:
                raise ActuateError(f"no workload is set for {role} engines")
            pool.goal = target
            done += await self._reconcile(role, pool, target, members)
        return Applied(accepted=True, text="; ".join(done) or "nothing to do")

    async def _reconcile(
        self, role: Role, pool: _Pool, goal: int, members: Sequence[Member]
    ) -> list[str]:
        replicas = pool.put = await self._replicas(pool.workload)
        ours = [m for m in members if m.role == role and self._is_of(pool.workload, m)]
        self._take_up(pool, ours)
        if goal > replicas:
            await self._scale(pool, goal)
            return [f"{pool.workload.name}: {replicas} replicas to {goal}"]
        done: list[str] = []
        for member in self._victims(pool, role, ours, replicas - goal):
            await self._drain(pool, member)
            done.append(f"{member.record.host} is asked to drain")
        ready = [pod for pod in pool.draining if self._is_drained(pool, pod, ours)]
        going = self._going(pool, ours, ready, replicas)[: replicas - goal]
        if going:
            await self._scale(pool, replicas - len(going))
            done.append(f"{pool.workload.name}: {replicas} replicas to {replicas - len(going)}")
        elif replicas == goal:
            # As many are wanted again as when it was asked to drain: a new pod takes its place.
            for pod in ready:
                await self._ask(self._api.delete(PODS, pod))
                done.append(f"{pod} is replaced")
            going = ready
        for pod in going:
            pool.draining.pop(pod, None)
        return done

    def _take_up(self, pool: _Pool, ours: Sequence[Member]) -> None:
        """Drains that another planner, or this one before its restart, has begun."""
        for member in ours:
            if member.phase == "draining":
                until_s = self._clock() + self._drain_timeout_s
                pool.draining.setdefault(member.record.host, until_s)

    def _victims(self, pool: _Pool, role: Role, ours: Sequence[Member], fewer: int) -> list[Member]:
        """Engines that are to drain now. Pods without one, as those that find no node, go first."""
        asked = pool.draining
        if pool.workload.kind == "statefulset":
            last = _last(pool, fewer)
            return [m for m in ours if m.record.host in last and m.record.host not in asked]
        empty = max((pool.put or 0) - len({m.record.host for m in ours}), 0)
        others = [m for m in ours if m.record.host not in asked]
        return surplus(others, role, fewer - len(asked) - empty)

    def _going(
        self, pool: _Pool, ours: Sequence[Member], ready: Sequence[str], replicas: int
    ) -> list[str]:
        """Pods that may go now, in the order in which Kubernetes takes them."""
        hosts = {m.record.host for m in ours}
        if pool.workload.kind == "deployment":
            return ["" for _ in range(replicas - len(hosts))] + list(ready)
        found = []
        for pod in reversed(_last(pool, replicas)):
            if pod in hosts and pod not in ready:
                break
            found.append(pod)
        return found

    async def _drain(self, pool: _Pool, member: Member) -> None:
        if pool.workload.kind == "deployment":
            change = {"metadata": {"annotations": {DELETION_COST: CHEAP}}}
            await self._ask(self._api.patch(PODS, member.record.host, change))
        await self._discovery.put(drain_key(member.name), b"1")
        pool.draining[member.record.host] = self._clock() + self._drain_timeout_s
        _log.info("engine_drain_asked", instance=str(member.name), pod=member.record.host)

    def _is_drained(self, pool: _Pool, pod: str, ours: Sequence[Member]) -> bool:
        engines = [m for m in ours if m.record.host == pod]
        if all(m.phase == "draining" and m.is_idle for m in engines):
            return True  # also if none is left
        if self._clock() < pool.draining[pod]:
            return False
        _log.warning("engine_drain_late", pod=pod, requests=sum(m.requests for m in engines))
        return True

    async def _replicas(self, workload: Workload) -> int:
        found = await self._ask(self._api.get(_resource(workload), f"{workload.name}/scale"))
        replicas = (found or {}).get("spec", {}).get("replicas", 0)  # none is written as nothing
        if not isinstance(replicas, int):
            raise ActuateError(f"{workload.kind} {workload.name} has {replicas!r} replicas")
        return replicas

    async def _scale(self, pool: _Pool, replicas: int) -> None:
        where = _resource(pool.workload), f"{pool.workload.name}/scale"
        await self._ask(self._api.patch(*where, {"spec": {"replicas": replicas}}))
        pool.put = replicas
        _log.info("replicas_set", workload=pool.workload.name, replicas=replicas)

    async def _ask(self, asked: Awaitable[Object | None]) -> Object | None:
        try:
            return await asked
        except NotFound as error:
            raise ActuateError(f"there is no such object: {error}") from error
        except DiscoveryUnavailable as error:
            raise ActuateError(str(error)) from error

    @staticmethod
    def _is_of(workload: Workload, member: Member) -> bool:
        return member.record.host.startswith(f"{workload.name}-")


def _resource(workload: Workload) -> Resource:
    return Resource("apis/apps/v1", f"{workload.kind}s")


def _last(pool: _Pool, count: int) -> list[str]:
    """Names of a StatefulSet's last pods, which are the first that Kubernetes takes."""
    assert pool.put is not None
    return [f"{pool.workload.name}-{number}" for number in range(pool.put)[-count:] if count > 0]
