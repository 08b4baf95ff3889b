"""One server and one client of each kind of request plane, ready to be used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from runtime.embedded import EmbeddedNats
from runtime.requests import (
    RequestClient,
    RequestPlane,
    RequestPlaneSettings,
    RequestServer,
    create_request_plane,
)
from tests.runtime.requests.handlers import Handlers

KINDS = ("memory", "tcp", "nats", "http")
# Small, so that every limit is met.
LIMITS = {"window": 65536, "frame_max": 1 << 20, "in_flight_max": 256}


@dataclass
class Stage:
    plane: RequestPlane
    settings: RequestPlaneSettings
    server: RequestServer
    client: RequestClient
    address: str
    handlers: Handlers


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest) -> RequestPlaneSettings:
    other: dict[str, object] = {}
    if request.param == "nats":
        server: EmbeddedNats = request.getfixturevalue("nats")
        other = nats_options(server)
    return RequestPlaneSettings(plane=request.param, **LIMITS, **other)  # type: ignore[arg-type]


def nats_options(server: EmbeddedNats) -> dict[str, object]:
    return {
        "nats_url": server.url,
        "nats_user": server.user,
        "nats_password": SecretStr(server.password),
    }


@pytest.fixture
async def stage(settings: RequestPlaneSettings, tmp_path: Path) -> AsyncIterator[Stage]:
    plane = create_request_plane(settings, "test")
    server, client, handlers = plane.server(), plane.client(), Handlers()
    handlers.serve(server)
    address = await server.start()
    yield Stage(plane, settings, server, client, address, handlers)
    await client.close()
    await server.close()
    assert server.status().in_flight == 0
    assert server.status().connections == 0
