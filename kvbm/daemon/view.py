"""What the admin API and the metrics read of a running node: snapshots, never its insides.

The daemon implements `NodeView`; calls come on its event loop, do no I/O, and cost what a scrape
may cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage_tiers.base import RecoveryReport, TierUsage


@dataclass(frozen=True, slots=True)
class QueueStatus:
    name: str  # as in the metric's label, for example "offload_G3"
    depth: int
    limit: int


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """One connection of an engine."""

    id: str
    role: str  # "scheduler" or "worker"
    engine: str
    rank: int
    pid: int
    connected_s: float
    claims: int
    leased_bytes: int


@dataclass(frozen=True, slots=True)
class EventsStatus:
    """Block events, counted one by one, and the plane that carries them in messages."""

    published_total: int = 0
    dropped_total: int = 0
    connected: bool = False
    messages_dropped_total: int = 0  # taken, and then lost because the plane was away


class NodeView(Protocol):
    def tiers(self) -> Sequence[TierUsage]:
        """Those that are configured, G2 first."""
        ...

    def readiness(self) -> Mapping[str, str | None]:
        """Each check by name: None if it passes, else the reason it does not."""
        ...

    def recovery(self) -> Sequence[RecoveryReport]:
        """What each tier found when it opened."""
        ...

    def sessions(self) -> Sequence[SessionStatus]: ...

    def queues(self) -> Sequence[QueueStatus]: ...

    def events(self) -> EventsStatus: ...
