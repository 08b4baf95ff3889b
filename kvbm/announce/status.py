"""What can be seen of the stream, without what it is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamStatus:
    publisher: str  # hexadecimal; new with each run of the daemon
    next_sequence: int  # the number of the next event
    dropped_total: int  # by the plane, because its queue was full
    skipped_total: int  # changes too large to tell: routers were left to ask for everything
    ring_events: int
    ring_bytes: int
    ring_bytes_max: int


@dataclass(frozen=True, slots=True)
class TiersStatus:
    blocks: dict[str, int]  # announced, by tier
    waiting_chunks: int  # whose changes are not told yet
    unannounced_chunks: int  # kept without a note: routers do not hear of them
    refused_total: int  # notes that were none
    used_bytes: int  # by the notebook


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One data-parallel rank of an engine whose own events are heard."""

    worker: str  # instance, hexadecimal, and rank
    endpoint: str
    connected: bool
    error: str | None
    blocks: int  # it holds, as far as that is known
    batches_total: int
    lost_total: int  # batches that could not be had
    restarts_total: int
    skipped_total: int  # events of other cache groups or tiers
    refused_total: int  # events that contradict themselves
    orphaned_total: int  # blocks whose place is not known, because that of the one before is not


@dataclass(frozen=True, slots=True)
class AnnouncerStatus:
    endpoint: str | None  # the instance that answers routers; None: not there yet
    error: str | None  # why not
    stream: StreamStatus
    tiers: TiersStatus
    engines: list[EngineStatus]
    replays_total: int
    snapshots_total: int
