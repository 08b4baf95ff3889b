"""A world for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.router.service.world import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World.begin() as world:
        yield world
