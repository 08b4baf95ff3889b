"""The event plane: one seam, one file per kind, chosen by settings; block events travel on it."""

from __future__ import annotations

from typing import assert_never

from runtime.events.base import (
    EventPlane,
    HistoryUnavailable,
    Message,
    PlaneStatus,
    Subscription,
    SupportsHistory,
    SupportsPeers,
)
from runtime.events.settings import EventPlaneSettings

__all__ = [
    "EventPlane",
    "EventPlaneSettings",
    "HistoryUnavailable",
    "Message",
    "PlaneStatus",
    "Subscription",
    "SupportsHistory",
    "SupportsPeers",
    "create_event_plane",
]


def create_event_plane(settings: EventPlaneSettings, name: str) -> EventPlane:
    """The plane the settings name, not started; only its own library is imported."""
    match settings.plane:
        case "nats":
            from runtime.events.nats import NatsPlane

            return NatsPlane(settings, name)
        case "zmq":
            from runtime.events.zmq import ZmqPlane

            return ZmqPlane(settings, name)
        case "memory":
            from runtime.events.memory import MemoryPlane

            return MemoryPlane()
        case "none":
            from runtime.events.memory import NullPlane

            return NullPlane()
        case _:
            assert_never(settings.plane)
