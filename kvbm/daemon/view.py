"""What the admin API and the metrics read of a running node, and what an operator may have it do.

Snapshots, never its insides. The daemon implements `NodeView` and `NodeActions`; calls come on its
event loop, do no I/O, and cost what a scrape may cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbm.announce.status import AnnouncerStatus
from kvbm.curve import Estimate
from kvbm.daemon.rates import Rate
from kvbm.note import Note
from kvbm.peers.network import PeerStatus
from kvbm.quarantine import Quarantined
from kvbm.receipts import Receipt
from kvbm.what_if import WhatIf
from storage_tiers.base import Chunk, Key, RecoveryReport, TierName, TierUsage


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
    worker_id: str | None = None  # of a scheduler: its instance in discovery, hexadecimal
    dp_rank: int | None = None


@dataclass(frozen=True, slots=True)
class EventsStatus:
    """Block events, counted one by one, and the plane that carries them in messages."""

    published_total: int = 0
    dropped_total: int = 0
    connected: bool = False
    messages_dropped_total: int = 0  # taken, and then lost because the plane was away
    messages_unconfirmed_total: int = 0  # sent, but not known to be kept (`nats_durable`)
    plane_faults_total: int = 0  # after which the plane began anew


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The process and where it meets the rest of the machine."""

    pid: int
    uid: int
    started: float  # seconds since 1970
    socket: str
    host_memory_bytes: int
    huge_pages: bool
    ssd_path: str | None
    ssd_mover: str | None  # what was asked for; the tier tells what runs
    events_plane: str
    events_namespace: str
    events_url: str | None  # without credentials
    events_error: str | None  # why the plane is not connected
    draining: bool


@dataclass(frozen=True, slots=True)
class Residency:
    """A chunk in one tier."""

    tier: TierName
    chunk: Chunk
    sealed: bool  # its checksum is known
    claims: int | None  # who holds it against eviction; only host memory counts them


@dataclass(frozen=True, slots=True)
class ChunkStatus:
    residencies: Sequence[Residency]
    is_coming: bool  # on its way up into host memory
    note: Note | None = None


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    """What a tier takes in, and what it gives up first."""

    tier: TierName
    admission: str
    eviction: str
    budget_per_day: int | None = None  # for what it writes
    budget_unit: str | None = None


@dataclass(frozen=True, slots=True)
class DrainStatus:
    draining: bool
    since: float | None  # seconds since 1970
    done: bool  # nothing waits to be written and engines hold no slots
    left_chunks: int
    leased_bytes: int


@dataclass(frozen=True, slots=True)
class HandoverStatus:
    """Host memory over a restart: whether it will be left, and what was taken over."""

    available: bool
    reason: str | None  # why it will not be left
    adopted_chunks: int
    adopted_bytes: int
    waiting_chunks: int  # inherited, their bytes not checked yet
    dropped: Mapping[str, int]  # reason -> chunks that were inherited and not taken over
    aside_bytes: int  # of slots that an engine perhaps still writes to
    seconds: float  # that checking took; 0 until it is done


@dataclass(frozen=True, slots=True)
class FlushStatus:
    done: bool
    left_chunks: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ScrubStatus:
    """A pass over one tier that was asked for."""

    tier: str
    done: bool
    total_chunks: int
    checked_chunks: int
    damaged_chunks: int
    unreadable_chunks: int
    seconds: float


@dataclass(frozen=True, slots=True)
class QuarantineStatus:
    """How many there were since the start, and the latest of them, oldest first."""

    total: int
    entries: Sequence[Quarantined]


@dataclass(frozen=True, slots=True)
class ClearStatus:
    """What was taken off the list, and the space that is in use again."""

    cleared: int
    freed_bytes: int


class NoScrubError(Exception):
    """The node cannot scrub that tier; the message says which it can."""


@dataclass(frozen=True, slots=True)
class LineStatus:
    """What bringing chunks up from a lower tier was measured to take; None before the first."""

    tier: TierName
    begin_s: float | None  # before bytes come
    bytes_per_s: float | None
    samples: int
    measured_s_ago: float | None
    queued_bytes: int


@dataclass(frozen=True, slots=True)
class PaceStatus:
    """What an engine measured of itself; None where it has not."""

    engine: str
    tokens_per_s: float | None  # prefill, of the first thousand tokens
    tokens_per_s_at_32k: float | None  # of a thousand behind so many others
    load_begin_s: float | None  # loading from host memory
    load_bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class GovernorStatus:
    mode: str
    tiers: Sequence[LineStatus]
    engines: Sequence[PaceStatus]


@dataclass(frozen=True, slots=True)
class ReceiptsStatus:
    """Some of the receipts, newest first, and what all that are kept take."""

    receipts: Sequence[Receipt]
    kept: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class SampleStatus:
    """The lookups that the curve is made from."""

    keys: int
    keys_max: int
    rate: float  # part of all keys that is sampled
    asked_chunks_total: int
    sampled_chunks_total: int
    window_s: float
    seconds: float  # since it began
    reach_bytes: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What an LRU cache of a size would find of the chunks asked for, as a part of them."""

    size_bytes: int
    hit_rate: Estimate


@dataclass(frozen=True, slots=True)
class CurveTier:
    """A tier's own point, and what was really found there and in no faster tier."""

    tier: TierName
    at: CurvePoint
    found: float


@dataclass(frozen=True, slots=True)
class CurveStatus:
    sample: SampleStatus
    tiers: Sequence[CurveTier]
    points: Sequence[CurvePoint]


@dataclass(frozen=True, slots=True)
class SizeAnswer:
    """`answer` goes by the tiers' own policies; the LRU curve and what was found stand beside."""

    answer: WhatIf
    found: float  # part of the chunks asked for that any tier had
    lru_now: Estimate
    lru_then: Estimate
    sample: SampleStatus


class UnanswerableError(Exception):
    """That size cannot be told about; the message says why."""


class BusyError(Exception):
    """Such a question is being answered; the message says so."""


class NodeView(Protocol):
    def status(self) -> NodeStatus: ...

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

    def stream(self) -> AnnouncerStatus | None:
        """The stream for routers; None where there is no event plane."""
        ...

    def rates(self) -> Mapping[TierName, Sequence[Rate]]: ...

    def chunk(self, key: Key) -> ChunkStatus: ...

    def quarantine(self) -> QuarantineStatus: ...

    def peer_list(self) -> Sequence[PeerStatus]:
        """The other nodes whose host memory may be read."""
        ...

    def peer_readers(self) -> tuple[Sequence[str], int]:
        """Nodes connected to read this one's host memory, and the bytes held for them now."""
        ...

    def policies(self) -> Sequence[PolicyStatus]: ...

    def governor(self) -> GovernorStatus: ...

    def sample(self) -> SampleStatus | None:
        """None where lookups are not watched (`what_if.enabled`); so is `curve`."""
        ...

    def curve(self) -> CurveStatus | None: ...

    async def what_if(self, tier: TierName, size_bytes: int | None, add_bytes: int) -> SizeAnswer:
        """A tier of this size, or of so much more than now; takes seconds, on another thread.

        Raises UnanswerableError and BusyError.
        """
        ...

    def receipts(self, request: str | None = None, limit: int = 0) -> ReceiptsStatus:
        """The latest, or those of requests that `request` names."""
        ...

    def drain_status(self) -> DrainStatus: ...

    def handover_status(self) -> HandoverStatus: ...

    def scrub_status(self, tier: TierName) -> ScrubStatus | None:
        """The latest pass that was asked for, if any was. Raises NoScrubError."""
        ...


class NodeActions(Protocol):
    """Each may be asked again: it joins what is under way."""

    def drain(self) -> DrainStatus: ...

    def resume(self) -> DrainStatus: ...

    async def flush(self, deadline_s: float) -> FlushStatus: ...

    async def scrub(self, tier: TierName, deadline_s: float) -> ScrubStatus:
        """Raises NoScrubError."""
        ...

    async def clear_quarantine(self, key: Key | None) -> ClearStatus: ...
