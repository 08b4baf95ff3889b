"""A world for each test, and a NATS server for those of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from runtime.embedded import EmbeddedNats
from tests.router.service.world import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World.begin() as world:
        yield world


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(tmp_path_factory.mktemp("nats")) as server:
        yield server
