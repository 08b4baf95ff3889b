"""The bodies that the admin API answers with; keys are hex, times seconds since 1970."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from kvbm.announce.status import AnnouncerStatus
from kvbm.daemon.metrics import Metrics
from kvbm.daemon.rates import Rate
from kvbm.daemon.view import (
    ChunkStatus,
    DrainStatus,
    HandoverStatus,
    NodeStatus,
    PolicyStatus,
    QueueStatus,
    Residency,
    ScrubStatus,
    SessionStatus,
)
from kvbm.note import Note
from kvbm.peers.network import PeerStatus
from kvbm.quarantine import Quarantined
from storage_tiers.base import Key, RecoveryReport, TierUsage


class Version(BaseModel):
    name: str
    version: str
    node: str
    python: str


class Ready(BaseModel):
    ready: bool
    checks: dict[str, str]  # "ok" or the reason


class TierReport(BaseModel):
    """Counters run from the tier's opening; lookups from the daemon's start."""

    tier: str
    mover: str
    capacity_bytes: int
    used_bytes: int
    chunks: int
    hits: int
    misses: int
    stored_bytes: int
    loaded_bytes: int
    evictions: dict[str, int]
    corrupt: int
    errors: dict[str, int]
    requests: dict[str, int]  # paid ones, of S3
    rates: list[Rate]

    @classmethod
    def of(cls, usage: TierUsage, rates: Sequence[Rate], metrics: Metrics) -> TierReport:
        return cls(
            tier=usage.tier.value,
            mover=usage.mover,
            capacity_bytes=usage.capacity_bytes,
            used_bytes=usage.used_bytes,
            chunks=usage.chunks,
            hits=metrics.lookups(usage.tier, "hit"),
            misses=metrics.lookups(usage.tier, "miss"),
            stored_bytes=usage.stored_bytes_total,
            loaded_bytes=usage.loaded_bytes_total,
            evictions={str(reason): count for reason, count in usage.evictions_total.items()},
            corrupt=usage.corrupt_total,
            errors=usage.errors_total,
            requests=usage.requests_total,
            rates=list(rates),
        )


class Tiers(BaseModel):
    node: str
    tiers: list[TierReport]
    queues: list[QueueStatus]


class Recovery(BaseModel):
    reports: list[RecoveryReport]


class Sessions(BaseModel):
    sessions: list[SessionStatus]


class Node(BaseModel):
    name: str
    version: str
    node: str
    process: NodeStatus
    drain: DrainStatus
    handover: HandoverStatus


class ResidencyReport(BaseModel):
    """A chunk in one tier. S3 knows another node's chunk by key and length until it is loaded."""

    tier: str
    length: int
    position: int
    parent: str | None
    checksum: str
    sealed: bool
    claims: int | None

    @classmethod
    def of(cls, residency: Residency) -> ResidencyReport:
        chunk = residency.chunk
        return cls(
            tier=residency.tier.value,
            length=chunk.length,
            position=chunk.position,
            parent=None if chunk.parent is None else chunk.parent.hex(),
            checksum=f"{chunk.checksum:016x}",
            sealed=residency.sealed,
            claims=residency.claims,
        )


class NoteReport(BaseModel):
    """What routers are told of a chunk; hashes as 16 hexadecimal digits."""

    domain: str
    parent: str | None  # the block before its first, by sequence hash
    blocks: list[str]  # its own, by the hash of their tokens

    @classmethod
    def of(cls, note: Note) -> NoteReport:
        parent = None if note.parent is None else f"{note.parent:016x}"
        blocks = [f"{block:016x}" for block in note.tokens_hashes.tolist()]
        return cls(domain=f"{note.domain:016x}", parent=parent, blocks=blocks)


class ChunkReport(BaseModel):
    key: str
    residencies: list[ResidencyReport]
    onboarding: bool
    note: NoteReport | None

    @classmethod
    def of(cls, key: Key, status: ChunkStatus) -> ChunkReport:
        found = [ResidencyReport.of(residency) for residency in status.residencies]
        note = None if status.note is None else NoteReport.of(status.note)
        return cls(key=key.hex(), residencies=found, onboarding=status.is_coming, note=note)


class QuarantinedReport(BaseModel):
    tier: str
    key: str
    at: float
    why: str
    held_bytes: int

    @classmethod
    def of(cls, entry: Quarantined) -> QuarantinedReport:
        return cls(
            tier=entry.tier.value,
            key=entry.key.hex(),
            at=entry.at,
            why=entry.why,
            held_bytes=entry.held_bytes,
        )


class QuarantineReport(BaseModel):
    """The latest, oldest first; `total` counts all since the daemon's start.

    `held_bytes` are out of use until the quarantine is cleared; on the SSD that outlasts restarts.
    """

    total: int
    entries: list[QuarantinedReport]


class Stream(BaseModel):
    """The stream for routers; null where there is no event plane."""

    stream: AnnouncerStatus | None


class Peers(BaseModel):
    """Other nodes whose host memory may be read, and those that read this one's now."""

    peers: list[PeerStatus]
    readers: list[str]
    lent_bytes: int  # held against eviction for readers


class Policies(BaseModel):
    policies: list[PolicyStatus]


class Scrub(BaseModel):
    """The latest pass that was asked for; null if none was since the daemon's start."""

    latest: ScrubStatus | None
