"""The life of an instance: which steps may be taken, and that others see them in discovery."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.discovery import Discovery, DiscoverySettings, Written, create_discovery
from runtime.discovery.memory import MemoryStore
from runtime.instances import (
    InstanceRecord,
    Instances,
    RecordRefused,
    Registration,
    new_instance_id,
)
from runtime.lifecycle import NEXT, Lifecycle, State
from runtime.names import EndpointName, InstanceName, component_prefix
from tests.runtime.discovery.world import until

NAME = EndpointName("production", "Processor", "chat/completions")
WAY = (State.REGISTERED, State.RUNNING, State.HEALTHY, State.STOPPING, State.DEREGISTERED)


def test_a_life_goes_its_way_and_says_when() -> None:
    clock = itertools.count(100.0)
    life = Lifecycle(lambda: next(clock))
    steps: list[tuple[State, State]] = []
    end = life.listen(lambda before, after: steps.append((before, after)))
    assert life.since_s == 100.0
    for at_s, state in enumerate(WAY, 101):
        life.to(state)
        assert (life.state, life.since_s) == (state, at_s)
    assert steps == list(itertools.pairwise((State.CREATED, *WAY)))
    end()
    end()


@given(st.lists(st.sampled_from(State), max_size=12))
def test_only_the_steps_of_the_table_can_be_taken(wanted: list[State]) -> None:
    life = Lifecycle(lambda: 0.0)
    told: list[State] = []
    life.listen(lambda _, after: told.append(after))
    taken: list[State] = []
    for state in wanted:
        before = life.state
        assert life.may(state) == (state in NEXT[before])
        if life.may(state):
            life.to(state)
            taken.append(state)
        else:
            with pytest.raises(AssertionError, match=f"{before} may not become {state}"):
                life.to(state)
            assert life.state is before
    assert told == taken


@pytest.fixture
async def discoveries() -> AsyncIterator[list[Discovery]]:
    store = MemoryStore()
    settings = DiscoverySettings(discovery="memory")
    both = [create_discovery(settings, {}, store) for _ in range(2)]
    for discovery in both:
        await discovery.start()
    yield both
    for discovery in both:
        await discovery.close()


async def test_clients_see_an_instance_through_its_life(discoveries: list[Discovery]) -> None:
    server, client = discoveries
    seen: list[State | None] = []
    instances = Instances(
        client,
        NAME.instances_prefix,
        lambda _, record: seen.append(record.state if record is not None else None),
    )
    await instances.start()
    await asyncio.wait_for(instances.synced.wait(), 60)
    name = InstanceName(NAME, new_instance_id())
    registration = Registration(server, name, Lifecycle(), "tcp://127.0.0.1:1", {"model": "m"})
    assert await registration.register() == Written()
    await until(lambda: name in instances.known)
    assert instances.serving == []
    for state in (State.RUNNING, State.HEALTHY, State.RUNNING, State.HEALTHY):
        await registration.move(state)
        await until(lambda wanted=state: instances.known[name].state is wanted)  # type: ignore[misc]
    (record,) = await instances.wait_for(1, 60)
    assert record == registration.record
    assert record.name == name
    assert (record.transport, record.labels) == ("tcp://127.0.0.1:1", {"model": "m"})
    assert await registration.deregister() == Written()
    assert registration.lifecycle.state is State.DEREGISTERED
    await until(lambda: not instances.known)
    assert seen == [
        *(State.REGISTERED, State.RUNNING, State.HEALTHY, State.RUNNING, State.HEALTHY),
        None,
    ]
    with pytest.raises(TimeoutError):
        await instances.wait_for(1, 0.05)
    await instances.close()
    await instances.close()


async def test_a_namespace_sees_its_own_only(discoveries: list[Discovery]) -> None:
    server, client = discoveries
    views = {name: Instances(client, component_prefix(name)) for name in ("prod", "test")}
    for view in views.values():
        await view.start()
    name = InstanceName(EndpointName("prod", "Backend", "generate"), 1)
    registration = Registration(server, name, Lifecycle(), "tcp://127.0.0.1:1")
    await registration.register()
    await until(lambda: set(views["prod"].known) == {name})
    await asyncio.wait_for(views["test"].synced.wait(), 60)
    assert views["test"].known == {}
    for view in views.values():
        await view.close()


async def test_records_that_cannot_be_read_are_counted_and_left_out(
    discoveries: list[Discovery],
) -> None:
    server, client = discoveries
    instances = Instances(client, NAME.instances_prefix)
    await instances.start()
    name = InstanceName(NAME, 5)
    registration = Registration(server, name, Lifecycle(), "tcp://127.0.0.1:1")
    await registration.register()
    await until(lambda: name in instances.known)
    await server.put(InstanceName(NAME, 6).key, registration.record.encode())
    await server.put(f"{NAME.instances_prefix}no-id", registration.record.encode())
    await until(lambda: instances.refused_total == 2)
    assert set(instances.known) == {name}
    await server.put(name.key, b"\xff")
    await until(lambda: not instances.known)
    assert instances.refused_total == 3
    await instances.close()


@pytest.mark.parametrize("value", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"id":"zz"}'])
def test_no_value_of_others_makes_a_record(value: bytes) -> None:
    with pytest.raises(RecordRefused):
        InstanceRecord.decode(InstanceName(NAME, 5).key, value)
