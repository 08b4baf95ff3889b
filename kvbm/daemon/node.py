"""One node: the block manager with its tiers, engines and events, and what can be seen of it."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvbm.announce.status import AnnouncerStatus
from kvbm.daemon.handover import Handover, inherit
from kvbm.daemon.metrics import Metrics
from kvbm.daemon.operations import Operations
from kvbm.daemon.rates import Rate, Rates
from kvbm.daemon.settings import PROGRAM, DaemonSettings, SsdSettings
from kvbm.daemon.sizing import Sizing, make_curve
from kvbm.daemon.tiers import make_admission, make_lower_tiers, make_policy, make_tenants
from kvbm.daemon.view import (
    ChunkStatus,
    CurveStatus,
    DrainStatus,
    EventsStatus,
    GovernorStatus,
    HandoverStatus,
    LineStatus,
    NodeStatus,
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
)
from kvbm.manager import BlockEvents, BlockManager, Catalogue
from kvbm.note import NoNotes, Note, NoteBook
from kvbm.pace import TierPace
from kvbm.patrol import Patrol
from kvbm.peers.contents import Contents
from kvbm.peers.network import PeerNetwork, PeerStatus
from kvbm.protocol import Hello, Pace
from kvbm.scrub import Scrubber
from kvbm.session import Sessions
from runtime.component import Runtime
from runtime.discovery import create_discovery
from runtime.events import EventPlane, create_event_plane
from runtime.events.blocks import BlockPublisher
from runtime.requests import create_request_plane
from runtime.systemd import Notifier
from storage_tiers.arena import Arena
from storage_tiers.base import Key, RecoveryReport, SupportsScrub, Tier, TierName, TierUsage
from storage_tiers.dram import DramTier

if TYPE_CHECKING:
    from kvbm.announce.announcer import Announcer

AFTER_ANSWERS_S = 0.01
"""An engine that asks for several requests in a row gets its answers first."""
DRAIN_S = 1.0
_DRAINING = "draining: engines are lent no slots to store into, until `kvbm resume` or a restart"


def kernels_of(settings: DaemonSettings) -> tuple[str, ...]:
    """Modules whose import compiles what a node with these settings needs."""
    notes = settings.events.plane != "none" or settings.s3 is not None
    return ("runtime.ledger_kernels", "runtime.xxh3") if notes else ()


class Node:
    """Puts the parts together, nothing opened or started; implements `NodeView`."""

    def __init__(
        self,
        settings: DaemonSettings,
        version: str,
        notifier: Notifier,
        inherited: Mapping[str, int] | None = None,
    ) -> None:
        """Raises ArenaError if host memory cannot be had.

        `inherited`: descriptors that the daemon before left, by name; taken.
        """
        self.settings = settings
        self.metrics = Metrics(version, settings.node)
        self.plane: EventPlane = create_event_plane(settings.events, f"{PROGRAM} {settings.node}")
        self.blocks = self._make_publisher()
        self.announcer = self._make_announcer()
        self.notes, events = self._make_notes()
        contents = Contents(events)
        catalogue = Catalogue(contents, self.notes)
        inheritance = inherit(inherited or {}, notifier, settings.dram)
        self.arena = (
            Arena.create(settings.dram.capacity, huge_pages=settings.dram.huge_pages)
            if inheritance is None
            else inheritance.arena
        )
        tenants = make_tenants(settings)
        self.dram = DramTier(
            self.arena,
            catalogue,
            policy=make_policy(settings.dram.eviction),
            admission=make_admission(settings.dram.admission),
            quotas=tenants.quotas(TierName.DRAM),
        )
        self.scrubber = Scrubber(self.dram, self.metrics, settings.dram.scrub_interval)
        self.peers = self._make_peers(contents, catalogue)
        self.manager = BlockManager(
            self.dram,
            make_lower_tiers(
                settings, catalogue, tenants, None if self.peers is None else self.peers.tier
            ),
            contents,
            self.metrics,
            notes=self.notes,
            lease_bytes_max=int(settings.lease.fraction * self.arena.capacity_bytes),
            onboard_bytes_max=settings.onboard_bytes_max,
            quarantine=catalogue.quarantine,
            governor_mode=settings.governor.mode,
            curve=make_curve(settings, self.dram),
            later=_after_answers,
        )
        self.handover = Handover(
            notifier, settings.dram, self.manager, catalogue, self.metrics, inheritance
        )
        self.members = Sessions(
            self.manager,
            tenants,
            catalogue.removals,
            _nothing if self.announcer is None else self.announcer.engines_changed,
        )
        self.sizing = Sizing(settings, self.manager, self._engine_paces)
        self.patrols = self._make_patrols(settings.ssd, catalogue)
        self.operations = self._make_operations(catalogue)
        self.speeds = Rates(self.tiers)
        self._started = time.time()
        self.reports: dict[TierName, RecoveryReport] = {}
        self.problems = {tier.name.value: "not open yet" for tier in self.all_tiers}
        self.problems["socket"] = "not listening yet"

    @property
    def all_tiers(self) -> list[Tier]:
        return [self.dram, *self.manager.tiers]

    def _make_publisher(self) -> BlockPublisher:
        settings = self.settings
        return BlockPublisher(
            self.plane,
            namespace=settings.events.namespace,
            node=settings.node,
            epoch=time.time_ns() // 1000,
            linger_s=settings.events.linger,
            batch_events=settings.events.batch_events,
            ring_keys=settings.events.ring_keys,
        )

    def _make_announcer(self) -> Announcer | None:
        """None on a node alone: nobody listens."""
        settings = self.settings
        if settings.events.plane == "none":
            return None
        from kvbm.announce.announcer import Announcer  # compiles, which takes a while

        listens = settings.peers is not None  # to what they keep
        return Announcer(self.plane, settings.events, settings.node, self.blocks, listens=listens)

    def _make_notes(self) -> tuple[NoteBook, BlockEvents]:
        """What keeps notes, and is told of residencies for it."""
        if self.announcer is not None:
            return self.announcer.tiers, self.announcer.tiers
        if self.settings.s3 is None:
            return NoNotes(), self.blocks
        from kvbm.notebook import NoteKeeper  # compiles, too

        keeper = NoteKeeper(self.blocks)
        return keeper, keeper

    async def announce(self) -> None:
        """Run the announcer, until it is cancelled; there is one."""
        assert self.announcer is not None
        await self.announcer.run(self._make_runtime, lambda: self.members.connected, self._paces)

    def _make_runtime(self) -> Runtime:
        settings = self.settings
        return Runtime(
            create_discovery(settings.discovery, os.environ),
            create_request_plane(settings.requests, f"{PROGRAM} {settings.node}"),
            drain_timeout_s=DRAIN_S,
        )

    def _paces(self) -> dict[TierName, tuple[float, float] | None]:
        found = zip(self.manager.tiers, self.manager.onboarder.paces, strict=True)
        return {tier.name: pace.costs for tier, pace in found}

    def _make_peers(self, contents: Contents, catalogue: Catalogue) -> PeerNetwork | None:
        settings = self.settings
        if settings.peers is None:
            return None
        return PeerNetwork(
            settings.peers,
            self.dram,
            contents,
            self.notes,
            self.metrics,
            listener=catalogue,
            check=self.scrubber.check,
            plane=self.plane,
            namespace=settings.events.namespace,
            node=settings.node,
        )

    def _make_operations(self, catalogue: Catalogue) -> Operations:
        scrubbers = {patrol.tier: patrol for patrol in self.patrols}
        return Operations(
            self.members,
            self.manager.offloader,
            {self.dram.name: self.scrubber, **scrubbers},
            catalogue.quarantine,
            self.manager.tiers,
        )

    def _make_patrols(self, ssd: SsdSettings | None, catalogue: Catalogue) -> list[Patrol]:
        if ssd is None:
            return []
        return [
            Patrol(
                tier,
                self.metrics,
                catalogue.quarantine,
                pass_s=ssd.scrub_interval,
                bytes_per_s=ssd.scrub_bandwidth,
            )
            for tier in self.manager.tiers
            if isinstance(tier, SupportsScrub)
        ]

    # -- NodeView ------------------------------------------------------------------------

    def tiers(self) -> Sequence[TierUsage]:
        return [tier.usage() for tier in self.all_tiers]

    def readiness(self) -> Mapping[str, str | None]:
        names = [tier.name.value for tier in self.all_tiers]
        found = {name: self.problems.get(name) for name in (*names, "socket")}
        return found | {"stores": _DRAINING if self.members.draining else None}

    def recovery(self) -> Sequence[RecoveryReport]:
        return list(self.reports.values())

    def sessions(self) -> Sequence[SessionStatus]:
        return [
            _status(member.hello, member.since, session.claims, session.leased_bytes)
            for session in self.members.all
            for member in session.members
        ]

    def queues(self) -> Sequence[QueueStatus]:
        offloader, onboarder = self.manager.offloader, self.manager.onboarder
        down = offloader.limits
        up = onboarder.limits
        return [
            *(
                QueueStatus(stage if stage == "seal" else f"offload_{stage}", depth, down[stage])
                for stage, depth in offloader.depth.items()
            ),
            *(
                QueueStatus(f"onboard_{tier}", depth, up[tier])
                for tier, depth in onboarder.depth.items()
            ),
        ]

    def events(self) -> EventsStatus:
        if self.settings.events.plane == "none":
            return EventsStatus()
        blocks, plane = self.blocks.status(), self.plane.status()
        return EventsStatus(
            published_total=blocks.published_total,
            dropped_total=blocks.dropped_total,
            connected=plane.connected,
            messages_dropped_total=plane.dropped_total,
            messages_unconfirmed_total=plane.unconfirmed_total,
            plane_faults_total=plane.faults_total,
        )

    def stream(self) -> AnnouncerStatus | None:
        return None if self.announcer is None else self.announcer.status()

    def status(self) -> NodeStatus:
        settings, plane = self.settings, self.plane.status()
        events = settings.events
        return NodeStatus(
            pid=os.getpid(),
            uid=os.getuid(),
            started=self._started,
            socket=str(settings.socket),
            host_memory_bytes=self.arena.capacity_bytes,
            huge_pages=settings.dram.huge_pages,
            ssd_path=None if settings.ssd is None else str(settings.ssd.path),
            ssd_mover=None if settings.ssd is None else settings.ssd.mover,
            events_plane=events.plane,
            events_namespace=events.namespace,
            events_url=_without_credentials(events.nats_urls) if events.plane == "nats" else None,
            events_error=plane.error,
            draining=self.members.draining,
        )

    def rates(self) -> Mapping[TierName, Sequence[Rate]]:
        return self.speeds.now()

    def chunk(self, key: Key) -> ChunkStatus:
        residencies: list[Residency] = []
        dram = self.dram
        if (record := dram.claim(key)) is not None:
            claims = dram.claims_on(record) - 1  # ours is to look at it
            sealed = dram.is_sealed(record)
            residencies.append(Residency(dram.name, dram.chunk(record), sealed, claims))
            dram.unclaim(record)
        for tier in self.manager.tiers:
            (chunk,) = tier.find([key])
            if chunk is not None:
                residencies.append(Residency(tier.name, chunk, sealed=True, claims=None))
        note = self.notes.note_of(key)
        found = Note.decode(note) if note else None
        return ChunkStatus(residencies, key in self.manager.onboarder, found)

    def quarantine(self) -> QuarantineStatus:
        return self.operations.quarantine()

    def peer_list(self) -> Sequence[PeerStatus]:
        return [] if self.peers is None else self.peers.status()

    def peer_readers(self) -> tuple[Sequence[str], int]:
        if self.peers is None:
            return [], 0
        return self.peers.owner.readers, self.peers.owner.office.lent_bytes

    def policies(self) -> Sequence[PolicyStatus]:
        dram, ssd, s3 = self.settings.dram, self.settings.ssd, self.settings.s3
        found = [PolicyStatus(TierName.DRAM, dram.admission, dram.eviction)]
        if ssd is not None:
            budget = ssd.write_budget
            found.append(PolicyStatus(TierName.SSD, ssd.admission, ssd.eviction, budget, "bytes"))
        if s3 is not None:
            found.append(PolicyStatus(TierName.S3, s3.admission, "age", s3.put_budget, "requests"))
        return found

    def governor(self) -> GovernorStatus:
        onboarder = self.manager.onboarder
        lines = [
            _line_status(tier.name, pace, queued)
            for tier, pace, queued in zip(
                self.manager.tiers, onboarder.paces, onboarder.queued_bytes, strict=True
            )
        ]
        paces = [_pace_status(engine, pace) for engine, pace in self._engine_paces()]
        return GovernorStatus(self.manager.governor.mode, lines, paces)

    def _engine_paces(self) -> list[tuple[str, Pace]]:
        return [(session.engine, session.pace) for session in self.members.all if session.is_ready]

    def sample(self) -> SampleStatus | None:
        return self.sizing.sample()

    def curve(self) -> CurveStatus | None:
        return self.sizing.curve()

    async def what_if(self, tier: TierName, size_bytes: int | None, add_bytes: int) -> SizeAnswer:
        return await self.sizing.what_if(tier, size_bytes, add_bytes)

    def receipts(self, request: str | None = None, limit: int = 0) -> ReceiptsStatus:
        kept = self.members.receipts
        found = kept.latest(limit) if request is None else kept.find(request)
        return ReceiptsStatus(found, len(kept), kept.used_bytes)

    def drain_status(self) -> DrainStatus:
        return self.operations.drain_status()

    def handover_status(self) -> HandoverStatus:
        return self.handover.status()

    def scrub_status(self, tier: TierName) -> ScrubStatus | None:
        return self.operations.scrub_status(tier)


def _nothing() -> None:
    pass


def _after_answers(work: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(AFTER_ANSWERS_S, work)


def _without_credentials(urls: Sequence[str]) -> str:
    return ",".join(re.sub(r"//[^/]*@", "//", url) for url in urls)


def _status(hello: Hello, since: float, claims: int, leased_bytes: int) -> SessionStatus:
    """Claims and leases are the engine's: shown with its scheduler, which asks for them."""
    is_scheduler = hello.role == "scheduler"
    return SessionStatus(
        id=f"{hello.engine}/{hello.role}/{hello.rank}",
        role=hello.role,
        engine=hello.engine,
        rank=hello.rank,
        pid=hello.pid,
        connected_s=time.monotonic() - since,
        claims=claims if is_scheduler else 0,
        leased_bytes=leased_bytes if is_scheduler else 0,
        worker_id=None if hello.routing is None else f"{hello.routing.worker_id:x}",
        dp_rank=None if hello.routing is None else hello.routing.dp_rank,
    )


def _line_status(tier: TierName, pace: TierPace, queued_bytes: int) -> LineStatus:
    begin_s, byte_s = pace.costs or (None, None)
    return LineStatus(
        tier=tier,
        begin_s=begin_s,
        bytes_per_s=1 / byte_s if byte_s else None,
        samples=pace.samples,
        measured_s_ago=pace.idle_s if pace.samples else None,
        queued_bytes=queued_bytes,
    )


def _pace_status(engine: str, pace: Pace) -> PaceStatus:
    deep = 32_000
    shallow_s, deep_s = pace.prefill_s(0, 1000), pace.prefill_s(deep, deep + 1000)
    return PaceStatus(
        engine=engine,
        tokens_per_s=1000 / shallow_s if shallow_s else None,
        tokens_per_s_at_32k=1000 / deep_s if deep_s else None,
        load_begin_s=pace.copy_s if pace.copy_byte_s else None,
        load_bytes_per_s=1 / pace.copy_byte_s if pace.copy_byte_s else None,
    )
