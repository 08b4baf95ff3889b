"""The request plane: one seam, one file per kind, chosen by settings."""

from __future__ import annotations

from typing import assert_never

from runtime.requests.base import (
    Canary,
    RequestClient,
    RequestContext,
    RequestPlane,
    RequestServer,
)
from runtime.requests.errors import RequestError
from runtime.requests.settings import RequestPlaneSettings
from runtime.requests.stream import ResponseStream

__all__ = [
    "Canary",
    "RequestClient",
    "RequestContext",
    "RequestError",
    "RequestPlane",
    "RequestPlaneSettings",
    "RequestServer",
    "ResponseStream",
    "create_request_plane",
]


def create_request_plane(settings: RequestPlaneSettings, name: str) -> RequestPlane:
    """The plane the settings name; `name` is how its connections show at the other side."""
    match settings.plane:
        case "tcp":
            from runtime.requests.tcp import TcpPlane

            return TcpPlane(settings, name)
        case "nats":
            from runtime.requests.nats import NatsPlane

            return NatsPlane(settings, name)
        case "http":
            from runtime.requests.http import HttpPlane

            return HttpPlane(settings, name)
        case "memory":
            from runtime.requests.memory import MemoryPlane

            return MemoryPlane(settings, name)
        case _:
            assert_never(settings.plane)
