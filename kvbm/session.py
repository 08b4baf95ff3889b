"""Engines as the daemon sees them: members, leases and tickets of each, and how they end.

A session is one engine: its scheduler's connection and one per worker. It is ready when all are
there. It ends when any of them leaves, for whatever reason: tickets are closed at once; leased
slots only when no worker can write to them any more, that is when each has answered a Fence or is
gone with its connection. The scheduler and the workers then connect anew, as a new session.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from kvbm.manager import Arrivals, BlockManager, Ticket, Wanted
from kvbm.note import domain_in, domain_of, is_note
from kvbm.protocol import (
    BLOCK_TOKENS_MAX,
    DP_RANKS_MAX,
    ENDPOINT_CHARS_MAX,
    GROUPS_MAX,
    KEYS_PER_MATCH_MAX,
    NAMESPACE_BYTES_MAX,
    POSITIONS_MAX,
    RANKS_MAX,
    REQUEST_CHARS_MAX,
    SLOT_RECORD,
    VERSION,
    WORKER_ID_MAX,
    Arrived,
    Commit,
    Fence,
    Fenced,
    FrameError,
    FromClient,
    FromDaemon,
    GiveBack,
    Hello,
    Lease,
    Leased,
    Loaded,
    Match,
    Matched,
    Outcome,
    Pace,
    Ready,
    Routing,
    Share,
    Unmatch,
    pack_slots,
    split_keys,
    unpack_slots,
)
from kvbm.receipts import Receipt, Receipts
from kvbm.removals import Removals
from kvbm.tenants import Tenant, Tenants, UnknownTenantError
from storage_tiers.arena import Slot
from storage_tiers.base import KEY_BYTES, Chunk, Key
from storage_tiers.chunk_index import CHUNK_BYTES_MAX

TICKETS_MAX = 65536
"""Open requests per engine; beyond it a match is answered with misses."""

_NO_PARENT = bytes(KEY_BYTES)

_log = structlog.get_logger("kvbm.session")


class Refusal(Exception):
    """The peer cannot be a member; the message tells its operator why."""


@dataclass(frozen=True, slots=True)
class Connected:
    """An engine that is ready, as routers are to know it."""

    routing: Routing
    domain: int  # of the KV it stores and reads: see `kvbm.note`
    pace: Pace
    token_bytes: float  # that loading one more token of a prefix moves; 0 before the first lookup


class Member(Protocol):
    """A connection, as a session uses it."""

    hello: Hello
    since: float  # when it joined, by the monotonic clock

    def send(self, message: FromDaemon) -> None: ...

    def close(self) -> None: ...


class Session:
    """One engine. All calls from the daemon's event loop."""

    def __init__(
        self,
        number: int,
        engine: str,
        world_size: int,
        manager: BlockManager,
        tenant: Tenant,
        receipts: Receipts,
    ) -> None:
        self.number = number
        self.engine = engine
        self.world_size = world_size
        self.tenant = tenant
        self.ending = False
        self.pace = Pace()  # as it last told it
        self._manager = manager
        self._receipts = receipts
        self._scheduler: Member | None = None
        self._workers: dict[int, Member] = {}
        self._leased: dict[int, Slot] = {}  # by offset
        self._tickets: dict[int, tuple[Ticket, Receipt]] = {}
        self._lengths: tuple[int, ...] = ()
        self._share_bytes = 0
        self._token_bytes = 0.0
        self._domain: int | None = None  # of the KV it stores and reads: see `kvbm.note`

    @property
    def members(self) -> list[Member]:
        return [m for m in (self._scheduler, *self._workers.values()) if m is not None]

    @property
    def is_ready(self) -> bool:
        return self._scheduler is not None and len(self._workers) == self.world_size

    @property
    def connected(self) -> Connected | None:
        """What routers are to be told of it; None unless it is ready and has said who it is."""
        routing = None if self._scheduler is None else self._scheduler.hello.routing
        if routing is None or not self.is_ready or self.ending:
            return None
        assert self._domain is not None
        return Connected(routing, self._domain, self.pace, self._token_bytes)

    @property
    def leased_bytes(self) -> int:
        return sum(slot.length for slot in self._leased.values())

    @property
    def claims(self) -> int:
        """Chunks in host memory that its tickets hold."""
        return sum(len(ticket.claims) for ticket, _ in self._tickets.values())

    def join(self, member: Member) -> None:
        """Add a member. Raises Refusal if it does not fit the engine it names."""
        hello = member.hello
        if hello.fingerprint.get("tenant", "") != self.tenant.name and self.tenant.name:
            raise Refusal(f"engine {self.engine} belongs to tenant {self.tenant.name!r}")
        if hello.world_size != self.world_size:
            raise Refusal(f"world size {hello.world_size} is not its engine's {self.world_size}")
        if hello.role == "scheduler":
            if self._scheduler is not None:
                raise Refusal(f"engine {self.engine} has a scheduler connected already")
            self._scheduler = member
            if (said := hello.routing) is not None:
                self._domain = domain_of(said.namespace, self.tenant.salt, self.tenant.tag)
        else:
            if not 0 <= hello.rank < self.world_size or hello.rank in self._workers:
                raise Refusal(f"rank {hello.rank} is out of range or connected already")
            if any(
                len(m.hello.group_bytes) != len(hello.group_bytes) for m in self._workers.values()
            ):
                raise Refusal("its cache groups differ in number from another worker's")
            self._workers[hello.rank] = member
        if self.is_ready:
            self._announce_ready()

    def set_share(self, share_bytes: int) -> None:
        """How much of host memory this engine may hold as leased slots."""
        if not self.is_ready or self.ending or share_bytes == self._share_bytes:
            return
        self._share_bytes = share_bytes
        if 0 < share_bytes < max(self._lengths):  # 0: the daemon is drained
            _log.warning(
                "lease_too_small",
                engine=self.engine,
                share_bytes=share_bytes,
                chunk_bytes=max(self._lengths),
                hint="nothing of this engine is kept: raise lease.fraction or dram.capacity",
            )
        assert self._scheduler is not None
        self._scheduler.send(Share(share_bytes))

    def leave(self, member: Member) -> None:
        """A member's connection is gone: end the session."""
        if self._scheduler is member:
            self._scheduler = None
        self._workers = {rank: m for rank, m in self._workers.items() if m is not member}
        self._end()

    def end(self) -> None:
        """Send the engine away: its workers once they write no more."""
        self._end()

    @property
    def leased(self) -> list[Slot]:
        """Slots that this engine may write to."""
        return list(self._leased.values())

    def handle(self, member: Member, message: FromClient) -> None:
        """One message of a member. Raises FrameError on one that its role may not send."""
        match message:
            case Fenced():
                member.close()  # its `leave` follows and frees the leases if it was the last
            case Loaded():
                self._loaded(message)
            case _ if member is not self._scheduler or self.ending:
                raise FrameError(f"{type(message).__name__} from a member that may not send it")
            case Match():
                self._match(message)
            case Unmatch():
                for number in message.tickets:
                    self._close(number)
            case Outcome():
                self._note_outcome(message)
            case Lease():
                self._lease(message)
            case Commit():
                self._commit(message)
            case GiveBack():
                self._manager.give_back(self._take_leased(message.slots))
            case Hello():
                raise FrameError("a second Hello")

    # -- below ---------------------------------------------------------------------------

    def _announce_ready(self) -> None:
        assert self._scheduler is not None
        ranks = [self._workers[rank].hello for rank in range(self.world_size)]
        rank_offsets: list[list[int]] = []
        lengths: list[int] = []
        for group in range(len(ranks[0].group_bytes)):
            sizes = [hello.group_bytes[group] for hello in ranks]
            if ranks[0].replicated:
                rank_offsets.append([0] * len(sizes))
                lengths.append(sizes[0])
            else:
                rank_offsets.append([sum(sizes[:rank]) for rank in range(len(sizes))])
                lengths.append(sum(sizes))
        self._lengths = tuple(lengths)
        always_load = self._manager.governor.mode == "always_load"
        self._scheduler.send(Ready(rank_offsets, lengths, always_load))

    def _match(self, message: Match) -> None:
        groups = [
            Wanted(
                group.tokens_per_chunk,
                group.window,
                split_keys(group.keys),
                self._lengths[index] if index < len(self._lengths) else 0,
            )
            for index, group in enumerate(message.groups)
        ]
        count = sum(len(group.keys) for group in groups)
        if not 0 < len(groups) <= GROUPS_MAX or count > KEYS_PER_MATCH_MAX:
            raise FrameError(f"a match of {len(groups)} groups and {count} keys")
        if not all(self.tenant.owns(group.keys) for group in message.groups):
            raise FrameError("a match of another tenant's keys")
        if any(group.tokens_per_chunk <= 0 or group.window < 0 for group in groups):
            raise FrameError("a match group without tokens per chunk")
        if len({key for group in groups for key in group.keys}) != count:
            raise FrameError("a match that names a key twice")
        number, request = message.ticket, message.request
        if not message.pace.is_sound or len(request) > REQUEST_CHARS_MAX:
            raise FrameError("a match with a pace that is no number, or a name too long")
        self.pace = message.pace
        whole = [group for group in groups if not group.window]
        self._token_bytes = sum(group.chunk_bytes / group.tokens_per_chunk for group in whole)
        if number in self._tickets:
            raise FrameError(f"ticket {number} is open already")
        assert self._scheduler is not None
        if len(self._tickets) >= TICKETS_MAX:
            self._scheduler.send(Matched(number, bytes(count), b""))
            self._receipts.refuse(request, self.engine, self.pace, "too many open requests")
            return
        began = time.perf_counter()
        ticket = self._manager.match(groups, self._notifier(number), self.pace)
        tokens = ticket.verdict.tokens
        self._scheduler.send(Matched(number, ticket.states, ticket.here, tokens))
        answered_s = time.perf_counter() - began
        receipt = self._receipts.open(request, self.engine, self.pace, groups, ticket)
        receipt.answered_s = answered_s
        self._tickets[number] = ticket, receipt
        self._manager.note_use(ticket, groups, self.pace)

    def _close(self, number: int) -> None:
        if (found := self._tickets.pop(number, None)) is not None:
            ticket, receipt = found
            self._receipts.close(receipt, late=len(ticket.coming))
            self._manager.close(ticket)

    def _note_outcome(self, outcome: Outcome) -> None:
        counts = (outcome.local_tokens, outcome.loaded_tokens, outcome.waited_s, outcome.load_s)
        if not all(0 <= count < math.inf for count in counts):
            raise FrameError("an outcome of less than nothing")
        if (found := self._tickets.get(outcome.ticket)) is not None:
            found[1].outcome = outcome

    def _notifier(self, number: int) -> Callable[[Arrivals], None]:
        def notify(arrivals: Arrivals) -> None:
            self._receipts.arrived(self._tickets[number][1], arrivals)
            if self._scheduler is not None:
                slots = pack_slots(arrivals.landed)
                self._scheduler.send(Arrived(number, slots, arrivals.failed))

        return notify

    def _lease(self, message: Lease) -> None:
        if message.length not in self._lengths or not 0 < message.count <= 1 << 20:
            raise FrameError(f"a lease of {message.count} slots of {message.length} bytes")
        room = max(0, self._share_bytes - self.leased_bytes) // message.length
        slots = self._manager.lease(message.length, min(message.count, room))
        self._leased.update({slot.offset: slot for slot in slots})
        assert self._scheduler is not None
        packed = pack_slots((index, 0, slot) for index, slot in enumerate(slots))
        self._scheduler.send(Leased(packed, message.count))

    def _commit(self, message: Commit) -> None:
        keys, parents = split_keys(message.keys), split_keys(message.parents)
        count = len(message.slots) // SLOT_RECORD.itemsize
        if not len(keys) == len(parents) == len(message.positions) == count:
            raise FrameError("a commit whose lists differ in length")
        if not self.tenant.owns(message.keys):
            raise FrameError("a commit of another tenant's keys")
        if not all(0 <= position < POSITIONS_MAX for position in message.positions):
            raise FrameError("a commit with a position out of range")
        notes = message.notes or [b""] * count
        if len(notes) != count or not all(is_note(note) for note in notes if note):
            raise FrameError("a commit with notes that are none, or not one for each chunk")
        if self.tenant.tag and any(domain_in(note) != self._domain for note in notes if note):
            raise FrameError("a note of another tenant's")
        slots = self._take_leased(message.slots)
        filled: list[tuple[Slot, Chunk]] = []
        for slot, key, parent, position, note in zip(
            slots, keys, parents, message.positions, notes, strict=True
        ):
            before = None if parent == _NO_PARENT else Key(parent)
            filled.append((slot, Chunk(key, slot.length, 0, before, position, note)))
        self._manager.commit(filled)

    def _loaded(self, message: Loaded) -> None:
        if message.bytes < 0 or message.failed < 0:
            raise FrameError("a load of less than nothing")
        self._manager.loaded(message.bytes, message.failed)

    def _take_leased(self, packed: bytes) -> list[Slot]:
        """Slots of this session's lease, out of it. Raises FrameError for any other slot."""
        slots = [slot for _, _, slot in unpack_slots(packed)]
        if len({slot.offset for slot in slots}) != len(slots) or any(
            self._leased.get(slot.offset) != slot for slot in slots
        ):
            raise FrameError("a slot that is not in this engine's lease")
        for slot in slots:
            del self._leased[slot.offset]
        return slots

    def _end(self) -> None:
        for number in list(self._tickets):
            self._close(number)
        if not self.ending:
            self.ending = True
            if self._scheduler is not None:
                self._scheduler.close()
            for worker in self._workers.values():
                worker.send(Fence())
        if not self._workers:
            self._manager.give_back(self._leased.values())
            self._leased.clear()


class Sessions:
    """All engines of the node."""

    def __init__(
        self,
        manager: BlockManager,
        tenants: Tenants | None = None,
        removals: Removals | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`changed` is called when `connected` may have changed."""
        self._changed = changed
        self._manager = manager
        self._tenants = Tenants() if tenants is None else tenants
        self.receipts = Receipts([tier.name for tier in manager.tiers], removals)
        self._numbers = itertools.count(1)
        self._forming: dict[str, Session] = {}  # engine -> its session that is not ending
        self._of: dict[int, Session] = {}  # id(member) -> session
        self.draining = False

    def end(self) -> None:
        """Send every engine away; each is out of `all` once none of its members is left."""
        for session in self.all:
            session.end()

    @property
    def connected(self) -> list[Connected]:
        """Engines that are ready and have said who they are to routers."""
        found = [session.connected for session in self._forming.values()]
        return [engine for engine in found if engine is not None]

    @property
    def all(self) -> list[Session]:
        return list({id(session): session for session in self._of.values()}.values())

    def join(self, member: Member) -> Session:
        """Admit a connection by its Hello. Raises Refusal with the reason."""
        hello = member.hello
        _check(hello, self._manager.dram.arena.capacity_bytes)
        session = self._forming.get(hello.engine)
        if session is None:
            try:
                tenant = self._tenants.named(hello.fingerprint.get("tenant", ""))
            except UnknownTenantError as error:
                raise Refusal(str(error)) from error
            session = Session(
                next(self._numbers),
                hello.engine,
                hello.world_size,
                self._manager,
                tenant,
                self.receipts,
            )
        session.join(member)
        self._forming[hello.engine] = session
        self._of[id(member)] = session
        self._share_out()
        self._changed()
        return session

    def drain(self) -> None:
        """Lend no slot to any engine from now on; each gives back what it does not use."""
        self.draining = True
        self._share_out()

    def resume(self) -> None:
        """End `drain`: every engine may lease its share again."""
        self.draining = False
        self._share_out()

    def leave(self, member: Member) -> None:
        session = self._of.pop(id(member), None)
        if session is None:
            return
        if self._forming.get(session.engine) is session:
            del self._forming[session.engine]
        session.leave(member)
        self._share_out()
        self._changed()

    def _share_out(self) -> None:
        """Every engine may lease the same part, so that none can keep another from storing."""
        ready = [session for session in self._forming.values() if session.is_ready]
        budget_bytes = 0 if self.draining else self._manager.lease_bytes_max
        for session in ready:
            session.set_share(budget_bytes // len(ready))


def _unsound(routing: Routing) -> str | None:
    texts = (routing.events, routing.replay, routing.topic)
    if not 0 < routing.worker_id <= WORKER_ID_MAX:
        return f"worker id {routing.worker_id}"
    if not 0 <= routing.dp_rank < DP_RANKS_MAX:
        return f"data-parallel rank {routing.dp_rank}"
    if not 0 < routing.block_tokens <= BLOCK_TOKENS_MAX:
        return f"{routing.block_tokens} tokens in a block"
    if not 0 <= routing.group < GROUPS_MAX or len(routing.namespace) > NAMESPACE_BYTES_MAX:
        return "the cache group or the namespace"
    if any(len(text) > ENDPOINT_CHARS_MAX for text in texts):
        return "where its events are heard"
    return None


def _check(hello: Hello, capacity_bytes: int) -> None:
    if hello.version != VERSION:
        raise Refusal(f"protocol {hello.version} is not the daemon's {VERSION}: upgrade both sides")
    if hello.role not in ("scheduler", "worker"):
        raise Refusal(f"unknown role {hello.role!r}")
    if not 0 < hello.world_size <= RANKS_MAX:
        raise Refusal(f"world size {hello.world_size} is out of range")
    if hello.routing is not None and (why := _unsound(hello.routing)) is not None:
        raise Refusal(f"what it says for routers is out of range: {why}")
    if hello.role == "worker":
        sizes = hello.group_bytes
        if not 0 < len(sizes) <= GROUPS_MAX or any(size <= 0 for size in sizes):
            raise Refusal("a worker must name the bytes per chunk of each cache group")
        if max(sizes) * (1 if hello.replicated else hello.world_size) > CHUNK_BYTES_MAX:
            raise Refusal(
                f"chunks of {max(sizes)} bytes on each rank exceed {CHUNK_BYTES_MAX} in all: "
                "lower the connector's blocks_per_chunk"
            )
        if max(sizes) > capacity_bytes:
            raise Refusal(
                f"its chunks of {max(sizes)} bytes do not fit {capacity_bytes} bytes of host "
                "memory: raise dram.capacity or lower the connector's blocks_per_chunk"
            )
