"""A `NodeView` of plain values, for the tests of what is served from one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvbm.announce.status import AnnouncerStatus, EngineStatus, StreamStatus, TiersStatus
from kvbm.curve import Estimate
from kvbm.daemon.rates import Rate
from kvbm.daemon.view import (
    BusyError,
    ChunkStatus,
    ClearStatus,
    CurvePoint,
    CurveStatus,
    CurveTier,
    DrainStatus,
    EventsStatus,
    FlushStatus,
    GovernorStatus,
    HandoverStatus,
    LineStatus,
    NodeStatus,
    NoScrubError,
    PaceStatus,
    PolicyStatus,
    QuarantineStatus,
    QueueStatus,
    ReceiptsStatus,
    Residency,
    SampleStatus,
    ScrubStatus,
    SessionStatus,
    SizeAnswer,
    UnanswerableError,
)
from kvbm.note import Note
from kvbm.peers.network import PeerStatus
from kvbm.protocol import Pace
from kvbm.quarantine import Quarantined
from kvbm.receipts import Receipts
from kvbm.what_if import Flow, WhatIf
from storage_tiers.base import Chunk, Key, RecoveryReport, TierName, TierUsage
from storage_tiers.testing import make_key

KEY = make_key("here")
PARENT = make_key("parent")


@dataclass
class Node:
    """A `NodeView` of values that notes the actions it was asked for."""

    checks: dict[str, str | None] = field(default_factory=lambda: {"G3": None})
    broken: bool = False
    asked: list[object] = field(default_factory=list)

    def tiers(self) -> list[TierUsage]:
        if self.broken:
            raise RuntimeError("a bug")
        return [
            TierUsage(TierName.DRAM, "memcpy", 1 << 30, 1 << 20, 16),
            TierUsage(
                TierName.SSD,
                "nixl-posix",
                1 << 40,
                1 << 30,
                1000,
                stored_bytes_total=5,
                loaded_bytes_total=6,
                evictions_total={"capacity": 7, "age": 8},
                corrupt_total=9,
                errors_total={"load": 10},
            ),
        ]

    def readiness(self) -> dict[str, str | None]:
        return self.checks

    def recovery(self) -> list[RecoveryReport]:
        return [RecoveryReport(TierName.SSD, 1000, 1 << 30, {"checksum": 2}, 0.5)]

    def sessions(self) -> list[SessionStatus]:
        return [
            SessionStatus("s1", "scheduler", "engine-a", 0, 42, 1.5, claims=3, leased_bytes=4096),
            SessionStatus("s2", "worker", "engine-a", 0, 43, 1.5, claims=0, leased_bytes=0),
            SessionStatus("s3", "worker", "engine-a", 1, 44, 1.5, claims=0, leased_bytes=0),
        ]

    def queues(self) -> list[QueueStatus]:
        return [QueueStatus("offload_ssd", 11, 4096)]

    def stream(self) -> AnnouncerStatus | None:
        stream = StreamStatus("1f", 40, 3, 1, 20, 4096, 8192)
        tiers = TiersStatus({"G2": 10, "G3": 20, "G4": 30}, 4, 5, 6, 7000)
        engines = [
            EngineStatus("5.0", "tcp://127.0.0.1:5557", True, None, 8, 100, 2, 1, 0, 0, 9),
            EngineStatus("5.1", "tcp://127.0.0.1:5558", False, "disconnected", 0, 0, 0, 0, 0, 0, 0),
        ]
        return AnnouncerStatus("default.kvbm.kv-events-1", None, stream, tiers, engines, 11, 12)

    def events(self) -> EventsStatus:
        return EventsStatus(published_total=12, dropped_total=13)

    def status(self) -> NodeStatus:
        return NodeStatus(
            pid=42,
            uid=1000,
            started=1.5e9,
            socket="/run/kvbm/kvbm.sock",
            host_memory_bytes=1 << 30,
            huge_pages=False,
            ssd_path="/var/cache/kvbm",
            ssd_mover="auto",
            events_plane="none",
            events_namespace="default",
            events_url=None,
            events_error=None,
            draining=False,
        )

    def rates(self) -> dict[TierName, list[Rate]]:
        return {TierName.SSD: [Rate(10, 5.0, 6.0), Rate(60, 1.0, 2.0)]}

    def chunk(self, key: Key) -> ChunkStatus:
        if key != KEY:
            return ChunkStatus([], is_coming=False)
        chunk = Chunk(KEY, 4096, 0xABC, PARENT, 3)
        return ChunkStatus(
            [
                Residency(TierName.DRAM, chunk, sealed=True, claims=2),
                Residency(TierName.SSD, chunk, sealed=True, claims=None),
            ],
            is_coming=False,
            note=Note(0xD0, 0xAB, np.array([1, 2], dtype=np.uint64)),
        )

    def quarantine(self) -> QuarantineStatus:
        why = "the bytes do not match the checksum"
        return QuarantineStatus(7, [Quarantined(TierName.SSD, KEY, 1.5e9, why, held_bytes=4096)])

    def peer_list(self) -> list[PeerStatus]:
        return [
            PeerStatus("10.0.0.7:9471", "node-7", "events", True, "", False, "nixl-ucx", 12, 3),
            PeerStatus("10.0.0.8:9471", "", "settings", False, "refused", False, None, 0, 0),
        ]

    def peer_readers(self) -> tuple[list[str], int]:
        return ["node-7"], 4096

    def policies(self) -> list[PolicyStatus]:
        return [PolicyStatus(TierName.SSD, "value", "value", 7 << 30, "bytes")]

    def governor(self) -> GovernorStatus:
        line = LineStatus(TierName.SSD, 0.01, 1e9, 4, 1.5, 4096)
        return GovernorStatus("auto", [line], [PaceStatus("engine-a", 9e3, 8e3, None, None)])

    def sample(self) -> SampleStatus | None:
        return SampleStatus(900, 1024, 0.25, 4000, 1000, 3600.0, 60.0, 1 << 42)

    def curve(self) -> CurveStatus | None:
        sample = self.sample()
        if self.broken or sample is None:
            return None
        point = CurvePoint(1 << 30, Estimate(0.5, 0.01))
        return CurveStatus(sample, [CurveTier(TierName.DRAM, point, 0.4)], [point])

    async def what_if(self, tier: TierName, size_bytes: int | None, add_bytes: int) -> SizeAnswer:
        self.asked.append((tier, size_bytes, add_bytes))
        if tier is TierName.S3:
            raise UnanswerableError("this node has no tier G4 of its own; it has G2, G3")
        if size_bytes == 1:
            raise BusyError("another such question is being answered")
        some = Estimate(0.5, 0.01)
        flow = Flow("computed", "G2", some, some, some, None)
        answer = WhatIf(tier, 1 << 30, 2 << 30, some, some, some, {}, [flow], 10.0, 60.0, 1000)
        sample = self.sample()
        assert sample is not None
        return SizeAnswer(answer, 0.4, some, some, sample)

    def receipts(self, request: str | None = None, limit: int = 0) -> ReceiptsStatus:
        kept = Receipts([TierName.SSD])
        for name in ("cmpl-one", "cmpl-two", "chat/three"):
            kept.refuse(name, "engine-a", Pace(), "too many open requests")
        found = kept.latest(limit) if request is None else kept.find(request)
        return ReceiptsStatus(found, len(kept), kept.used_bytes)

    def drain_status(self) -> DrainStatus:
        return DrainStatus(draining=False, since=None, done=False, left_chunks=3, leased_bytes=4096)

    def handover_status(self) -> HandoverStatus:
        return HandoverStatus(
            available=False,
            reason="dram.handover is false",
            adopted_chunks=5,
            adopted_bytes=5 << 20,
            waiting_chunks=2,
            dropped={"corrupt": 1},
            aside_bytes=4096,
            seconds=0.0,
        )

    def scrub_status(self, tier: TierName) -> ScrubStatus | None:
        if tier is TierName.S3:
            raise NoScrubError("G4 cannot be scrubbed on this node: G2, G3")
        return None

    def drain(self) -> DrainStatus:
        self.asked.append("drain")
        return DrainStatus(draining=True, since=1.5e9, done=False, left_chunks=3, leased_bytes=0)

    def resume(self) -> DrainStatus:
        self.asked.append("resume")
        return self.drain_status()

    async def flush(self, deadline_s: float) -> FlushStatus:
        self.asked.append(("flush", deadline_s))
        return FlushStatus(done=False, left_chunks=3, seconds=deadline_s)

    async def scrub(self, tier: TierName, deadline_s: float) -> ScrubStatus:
        self.scrub_status(tier)
        self.asked.append(("scrub", tier.value, deadline_s))
        return ScrubStatus(
            tier.value,
            done=True,
            total_chunks=5,
            checked_chunks=5,
            damaged_chunks=1,
            unreadable_chunks=0,
            seconds=0.5,
        )

    async def clear_quarantine(self, key: Key | None) -> ClearStatus:
        self.asked.append(("clear", key))
        return ClearStatus(1, 4096)
