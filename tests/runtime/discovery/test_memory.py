"""Discovery within one process: everything that every kind does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from runtime.discovery import Discovery, DiscoverySettings, create_discovery
from runtime.discovery.memory import MemoryStore
from tests.runtime.discovery.conformance import Conformance
from tests.runtime.discovery.world import Members


class MemoryWorld(Members):
    def __init__(self) -> None:
        super().__init__(DiscoverySettings(discovery="memory", ttl=2.0))
        self.store = MemoryStore()

    def create(self) -> Discovery:
        return create_discovery(self.settings, self.environ, self.store)

    async def end_lease(self, member: Discovery) -> None:
        lease = member.status().lease
        assert lease is not None
        self.store.expire(lease)


@pytest.fixture
async def world() -> AsyncIterator[MemoryWorld]:
    world = MemoryWorld()
    yield world
    await world.close()


class TestMemory(Conformance):
    pass


async def test_a_lease_that_nobody_renews_runs_out() -> None:
    store = MemoryStore()
    lease = await store.grant(0.05)
    await store.put(lease, "v1/a", b"")
    changes = store.watch("v1/")
    assert await anext(changes) is not None
    await anext(changes)
    assert await store.list("") == {}
    await changes.aclose()
