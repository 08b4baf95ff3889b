"""Actuators: numbered decisions, and a drain before fewer replicas."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from planner.actuate.base import ActuateError
from planner.actuate.dry_run import DryRun
from planner.actuate.kubernetes import DELETION_COST, Kubernetes
from planner.actuate.processes import Processes
from planner.actuate.virtual import Virtual, VirtualClient
from planner.decide import Decision, Reason, State
from planner.fleet import Member
from planner.observe import Counters, Phase
from planner.pages import EnginePage
from planner.settings import KubernetesSettings, ProcessSettings
from runtime.discovery import Discovery, DiscoverySettings, create_discovery
from runtime.discovery.kubernetes_api import Api
from runtime.discovery.memory import MemoryStore
from runtime.drain import drain_asked, drain_key
from runtime.engine_card import COMPONENT, ENDPOINT
from runtime.instances import InstanceRecord
from runtime.lifecycle import State as LifeState
from runtime.names import EndpointName, InstanceName
from runtime.server_process import free_ports
from tests.runtime.discovery.kube_server import KubeServer

ROLE = "aggregated"
SPACE = "inference"


class Now:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def decision(target: int, current: int) -> Decision:
    reason = Reason("aggregated", "load", target, "because")
    return Decision(0.0, {"aggregated": target}, {"aggregated": current}, (reason,), {}, State())


def member(number: int, pod: str, *, running: float = 0.0, phase: Phase = "serving") -> Member:
    name = InstanceName(EndpointName("default", COMPONENT, ENDPOINT), number)
    state = {"serving": LifeState.HEALTHY, "draining": LifeState.STOPPING}.get(
        phase, LifeState.REGISTERED
    )
    record = InstanceRecord(
        *("default", COMPONENT, ENDPOINT, f"{number:x}", "http://x", state, 0.0, pod, 1), {}
    )
    return Member(name, record, "aggregated", phase, EnginePage(Counters(), running, 0, 0, 0))


@asynccontextmanager
async def discovered() -> AsyncIterator[tuple[Discovery, Discovery]]:
    """Two programs of one place."""
    store, both = MemoryStore(), []
    for _ in range(2):
        one = create_discovery(DiscoverySettings(discovery="memory"), {}, store)
        await one.start()
        both.append(one)
    yield both[0], both[1]
    for one in both:
        await one.close()


async def test_a_dry_run_accepts_nothing() -> None:
    assert not (await DryRun().apply(decision(3, 1), [])).accepted


async def test_decisions_are_numbered_and_wait_for_their_completion() -> None:
    now = Now()
    async with discovered() as (planners, others):
        planner = Virtual(planners, "default", 1800.0, now)
        client = VirtualClient(others, "default")
        assert (await planner.apply(decision(1, 1), [])).text == "nothing to do"
        assert (await planner.apply(decision(3, 1), [])).accepted
        ask = await client.next(20)
        assert (ask.number, ask.targets, ask.reasons) == (1, {"aggregated": 3}, ["because"])
        held = await planner.apply(decision(5, 3), [])
        assert not held.accepted
        assert "decision 1 is not completed" in held.text
        await client.complete(1)
        assert (await planner.apply(decision(5, 3), [])).accepted
        assert (await client.next(20)).number == 2
        now.s = 1801.0  # nobody completes the second
        assert (await planner.apply(decision(4, 5), [])).accepted
        assert planner.timeouts_total == 1
        assert (await client.next(20)).targets == {"aggregated": 4}
        again = Virtual(planners, "default", 1800.0, now)  # after a restart of the planner
        assert (await again.apply(decision(6, 4), [])).text.startswith("decision 2 ")
        await others.put("v1/planner/default/completed", b"nonsense")
        with pytest.raises(ActuateError, match="no completion"):
            await again.apply(decision(7, 6), [])


async def test_engines_that_others_have_started_count_and_stay(tmp_path: Path) -> None:
    settings = ProcessSettings(command="/bin/sleep 600", log_directory=tmp_path)
    actuator = Processes(settings)
    await actuator.start()
    theirs = member(1, "another-host")
    assert "was started" in (await actuator.apply(decision(2, 1), [theirs])).text
    [process] = [one.process for one in actuator._engines]
    found = member(2, socket.gethostname())
    record = msgspec.structs.replace(found.record, pid=process.pid)
    ours = dataclasses.replace(found, record=record)
    assert (await actuator.apply(decision(2, 2), [theirs, ours])).text == "nothing to do"
    # It has most to do, and goes yet: the other is not the actuator's to end.
    busy = dataclasses.replace(ours, load=EnginePage(Counters(), 9, 0, 0, 0))
    asked = await actuator.apply(decision(1, 2), [theirs, busy])
    assert asked.text == f"process {process.pid} is asked to drain and end"
    assert (await actuator.apply(decision(0, 1), [theirs])).text == "nothing to do"
    # A record that is left of one that has ended is nobody else's engine.
    assert "was started" in (await actuator.apply(decision(2, 2), [theirs, ours])).text
    await actuator.close()
    assert process.poll() is not None


class Cluster:
    """An API server with one workload and its pods, and the actuator under test."""

    def __init__(self, kind: str, folder: Path, discovery: Discovery, others: Discovery) -> None:
        self.now = Now()
        self.kind = kind
        self.server = KubeServer(free_ports(1)[0], "token")
        self.others = others
        (folder / "token").write_text("token")
        (folder / "namespace").write_text(SPACE)
        where = DiscoverySettings(
            kubernetes_url=f"http://127.0.0.1:{self.server.port}", kubernetes_account=folder
        )
        settings = KubernetesSettings.model_validate(
            {"workloads": {ROLE: {"kind": kind, "name": "engine"}}, "drain_timeout": 600}
        )
        self.actuator = Kubernetes(Api(where, {}), discovery, settings, self.now)

    @property
    def replicas(self) -> int:
        found: int = self.server.objects[SPACE, f"{self.kind}s", "engine/scale"]["spec"]["replicas"]
        return found

    def put(self, replicas: int) -> None:
        key = (SPACE, f"{self.kind}s", "engine/scale")
        item: dict[str, Any] = {"metadata": {"name": "engine"}, "spec": {"replicas": replicas}}
        self.server._store("MODIFIED", key, item)

    def pod(self, name: str) -> None:
        self.server._store("ADDED", (SPACE, "pods", name), {"metadata": {"name": name}})

    async def asked_to_drain(self) -> set[str]:
        return set(await self.others.list("v1/drain/"))


@pytest.fixture(params=["deployment", "statefulset"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with discovered() as (planners, others):
        made = Cluster(request.param, tmp_path, planners, others)
        await made.server.start()
        for pod in ("engine-0", "engine-1", "engine-2"):
            made.pod(pod)
        made.put(3)
        yield made
        await made.actuator.close()
        await made.server.stop()


PODS = ("engine-0", "engine-1", "engine-2")


async def test_more_are_asked_for_at_once(cluster: Cluster) -> None:
    members = [member(n, pod) for n, pod in enumerate(PODS, 1)]
    applied = await cluster.actuator.apply(decision(5, 3), members)
    assert cluster.replicas == 5
    assert applied.text == "engine: 3 replicas to 5"
    assert await cluster.actuator.desired() == {"aggregated": 5}


async def test_fewer_come_only_when_one_is_drained(cluster: Cluster) -> None:
    """The least busy of a Deployment, and what Kubernetes would take of a StatefulSet: the last."""
    busy = [member(1, PODS[0], running=5), member(2, PODS[1], running=1)]
    last = member(3, PODS[2], running=9)
    victim = busy[1] if cluster.kind == "deployment" else last
    asked = asyncio.create_task(drain_asked(cluster.others, victim.name))
    await cluster.actuator.apply(decision(2, 3), [*busy, last])
    assert cluster.replicas == 3
    await asyncio.wait_for(asked, 60)
    assert await cluster.asked_to_drain() == {drain_key(victim.name)}
    # What is worked towards is no number that others have set.
    assert await cluster.actuator.desired() == {"aggregated": 2}

    def drained(running: float) -> list[Member]:
        stopping = member(victim.name.id, victim.record.host, running=running, phase="draining")
        return [stopping if m is victim else m for m in (*busy, last)]

    await cluster.actuator.apply(decision(2, 2), drained(1.0))
    assert cluster.replicas == 3
    await cluster.actuator.apply(decision(2, 2), drained(0.0))
    assert cluster.replicas == 2
    assert await cluster.actuator.desired() == {"aggregated": 2}
    pod = cluster.server.objects[SPACE, "pods", victim.record.host]["metadata"]
    if cluster.kind == "deployment":
        assert pod["annotations"][DELETION_COST].startswith("-")
    assert len(await cluster.asked_to_drain()) == 1


async def test_a_drain_that_does_not_end_is_cut_short(cluster: Cluster) -> None:
    members = [member(n, pod, running=3) for n, pod in enumerate(PODS, 1)]
    await cluster.actuator.apply(decision(2, 3), members)
    cluster.now.s = 601.0
    await cluster.actuator.apply(decision(2, 2), members)
    assert cluster.replicas == 2


async def test_where_as_many_are_wanted_again_the_drained_pod_is_replaced(
    cluster: Cluster,
) -> None:
    members = [member(n, pod, running=n) for n, pod in enumerate(PODS, 1)]
    await cluster.actuator.apply(decision(2, 3), members)
    [key] = await cluster.asked_to_drain()
    left = int(key.rpartition("/")[2], 16)
    members[left - 1] = member(left, PODS[left - 1], phase="draining")
    await cluster.actuator.apply(decision(3, 2), members)
    assert cluster.replicas == 3
    assert (SPACE, "pods", PODS[left - 1]) not in cluster.server.objects


async def test_pods_without_an_engine_go_without_a_drain(cluster: Cluster) -> None:
    """As one that finds no node with a free GPU."""
    members = [member(n, pod) for n, pod in enumerate(PODS[:2], 1)]
    await cluster.actuator.apply(decision(2, 3), members)
    assert cluster.replicas == 2
    assert not await cluster.asked_to_drain()


async def test_a_drain_goes_on_after_the_planner_was_started_anew(cluster: Cluster) -> None:
    members = [member(n, pod) for n, pod in enumerate(PODS[:2], 1)]
    members.append(member(3, PODS[2], phase="draining"))
    await cluster.actuator.apply(decision(2, 3), members)
    assert cluster.replicas == 2


async def test_what_others_set_is_seen(cluster: Cluster) -> None:
    members = [member(n, pod) for n, pod in enumerate(PODS, 1)]
    await cluster.actuator.apply(decision(3, 3), members)
    cluster.put(7)
    assert await cluster.actuator.desired() == {"aggregated": 7}


async def test_an_api_server_that_is_away_is_an_error_to_try_again(cluster: Cluster) -> None:
    await cluster.server.stop()
    with pytest.raises(ActuateError, match="Kubernetes API"):
        await cluster.actuator.desired()
