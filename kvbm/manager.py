"""The block manager: which chunk is in which tier, for whom it is held, and what moves when.

Called by the engine sessions on the daemon's event loop; never blocks it. Host memory is the only
gateway: engines read and write G2 slots, lower tiers are filled behind (`offload`) and emptied
ahead (`onboard`) of them. What the manager promises: a chunk reported HERE stays until its ticket
is closed; a chunk reported COMING is followed by one arrival or failure; nothing waits for ever,
because a tier's failure, a full queue and a lack of room are all answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvbm.curve import Curve
from kvbm.governor import NOTHING, Governor, Mode, Verdict
from kvbm.meter import Meter
from kvbm.note import NoteBook
from kvbm.offload import LaneSettings, Offloader
from kvbm.onboard import BYTES_IN_FLIGHT, NO_ROOM, Onboarder
from kvbm.protocol import COMING, HERE, MISS, PRESENT, SLOT_RECORD, SOURCES, Pace
from kvbm.quarantine import Quarantine
from kvbm.removals import Removals
from storage_tiers.arena import Slot
from storage_tiers.base import Chunk, Key, Known, RemovalReason, Tier, TierName
from storage_tiers.dram import DramTier
from storage_tiers.leaves import NONE

UNMEASURED = Pace()
_IN_DRAM = 1  # places: 0 is nowhere, from 2 on the lower tiers in their order


class BlockEvents(Protocol):
    """Where residencies gained and lost are announced."""

    def stored(self, tier: TierName, keys: Sequence[Key]) -> None: ...

    def removed(self, tier: TierName, keys: Sequence[Key]) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """One cache group's chunks of a request, in sequence order."""

    tokens_per_chunk: int
    window: int  # 0: all of them; else only the last `window` before the hit's end
    keys: Sequence[Key]
    chunk_bytes: int = 0


@dataclass(slots=True)
class Arrivals:
    """Chunks of one ticket whose onboarding ended: (index, source, slot), and failed indexes."""

    landed: list[tuple[int, int, Slot]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    crowded: int = 0  # of the failed ones, those that host memory had no room for


@dataclass(slots=True)
class Ticket:
    """What one request holds. Made by `match`, ended by `close`."""

    notify: Callable[[Arrivals], None]
    states: bytes = b""
    here: bytes = b""  # packed records (`SLOT_RECORD`) of what is HERE
    used: list[Sequence[Key]] = field(default_factory=list)  # until the tiers are told
    claims: list[int] = field(default_factory=list)  # records in host memory
    coming: dict[Key, int] = field(default_factory=dict)  # key -> index in the request
    closed: bool = False
    places: list[NDArray[np.uint8]] = field(default_factory=list)  # by group: see `_IN_DRAM`
    verdict: Verdict = field(default=NOTHING)


@dataclass(slots=True)
class _Found:
    """Where one cache group's chunks are."""

    records: NDArray[np.int64]  # in host memory
    places: NDArray[np.uint8]
    below: dict[int, Chunk]  # index -> chunk, of those in a lower tier


class Catalogue:
    """Residencies of the tiers as told by them; the listener that every tier is built with."""

    def __init__(self, events: BlockEvents, notes: NoteBook) -> None:
        self._events = events
        self._notes = notes
        self.quarantine = Quarantine()
        self.removals = Removals()

    def appeared(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes] = ()) -> None:
        if notes:
            self._notes.learn(keys, notes)
        self._events.stored(tier, keys)

    def noted(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        self._notes.learn(keys, notes)

    def removed(self, tier: TierName, keys: Sequence[Key], reason: RemovalReason) -> None:
        if tier is not TierName.PEER:  # what another node keeps is for it to announce
            self._events.removed(tier, keys)
        self.removals.add(tier, keys, reason)
        if reason is RemovalReason.CORRUPT:
            self.quarantine.add(tier, keys)


class BlockManager:
    """Not thread-safe: one event loop calls it."""

    def __init__(
        self,
        dram: DramTier,
        lower: Sequence[tuple[Tier, LaneSettings | None]],
        events: BlockEvents,
        meter: Meter,
        *,
        notes: NoteBook,
        lease_bytes_max: int,
        onboard_bytes_max: int = BYTES_IN_FLIGHT,
        quarantine: Quarantine | None = None,
        governor_mode: Mode = "auto",
        curve: Curve | None = None,
        later: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        """`lower`: fastest first; without lane settings a tier is only read from.

        `later` has work done a little later that must not hold up what engines wait for.
        """
        self.dram = dram
        self.tiers: list[Tier] = [tier for tier, _ in lower]
        self._events = events
        self.notes = notes
        self._meter = meter
        self.lease_bytes_max = lease_bytes_max
        self.quarantine = Quarantine() if quarantine is None else quarantine
        written = [(tier, lane) for tier, lane in lower if lane is not None]
        self.offloader = Offloader(dram, written, self._offloaded, meter, self.quarantine, notes)
        self.onboarder = Onboarder(
            dram,
            self.tiers,
            self._landed,
            meter,
            notes,
            quarantine=self.quarantine,
            bytes_in_flight=onboard_bytes_max,
        )
        self.governor = Governor(self.tiers, self.onboarder, meter, governor_mode)
        self.curve = curve
        self._waiting: dict[Key, list[Ticket]] = {}
        self._later = later
        self.lent_bytes = 0  # leased to engines; what is being onboarded has its own bound

    # -- lookups -------------------------------------------------------------------------

    def match(
        self,
        groups: Sequence[Wanted],
        notify: Callable[[Arrivals], None],
        pace: Pace = UNMEASURED,
    ) -> Ticket:
        """Claim what is in host memory of the longest usable hit, and start bringing up the rest.

        Of that hit, only as much as the engine, at its `pace`, does not compute sooner.
        `notify` is called later, never from within this call, for the chunks that are COMING.
        """
        ticket = Ticket(notify)
        found = [self._find(group.keys) for group in groups]
        reach = _usable_tokens(groups, found)
        ticket.places = [each.places for each in found]
        ticket.verdict = verdict = self.governor.judge(groups, ticket.places, reach, pace)
        states: list[bytes] = []
        here: list[bytes] = []
        base = 0
        for group, each in zip(groups, found, strict=True):
            end = -(-verdict.tokens // group.tokens_per_chunk)
            # A window's chunks are looked for from the end of the hit backwards; one more than
            # the window covers an end that is not on a chunk boundary. Only these are brought up.
            start = max(0, end - group.window - 1) if group.window else 0
            state = np.where(each.places, np.uint8(PRESENT), np.uint8(MISS))
            here.append(self._claim_here(ticket, base, each, state[:end]))
            self._bring_up(ticket, base, each, state, range(start, end))
            states.append(state.tobytes())
            ticket.used.append(group.keys[: -(-reach // group.tokens_per_chunk)])
            base += len(group.keys)
        ticket.states, ticket.here = b"".join(states), b"".join(here)
        if verdict.skipped_tokens:
            self.governor.probe(groups, ticket.places, verdict)
        return ticket

    def note_use(self, ticket: Ticket, groups: Sequence[Wanted], pace: Pace = UNMEASURED) -> None:
        """Tell the tiers and the curve what a request uses; `groups` and `pace` as matched.

        Once, after it was answered, for it takes a while.
        """
        used, ticket.used = ticket.used, []
        places, ticket.places = ticket.places, []
        self._later(lambda: self._tell_uses(used))
        if (curve := self.curve) is not None:
            self._later(lambda: curve.asked(groups, places, pace))

    def _tell_uses(self, used: Sequence[Sequence[Key]]) -> None:
        for keys in used:
            deepest_first = keys[::-1]
            self.dram.touch(deepest_first)
            for tier in self.tiers:
                absent = tier.touch(deepest_first)
                if absent:
                    self.offloader.offer_again(tier, absent[::-1])

    def close(self, ticket: Ticket) -> None:
        """End a ticket: its claims and what is still coming for it alone. Idempotent."""
        ticket.closed = True
        self.dram.unclaim_all(np.array(ticket.claims, dtype=np.int64))
        ticket.claims.clear()
        for key in ticket.coming:
            waiting = self._waiting[key]
            waiting.remove(ticket)
            if not waiting:
                del self._waiting[key]
                self.onboarder.withdraw(key)
        ticket.coming.clear()

    # -- slots ---------------------------------------------------------------------------

    def lease(self, length: int, count: int) -> list[Slot]:
        """Up to `count` free slots for an engine to fill; fewer when room or the budget ends."""
        slots: list[Slot] = []
        taken = self.dram.slot_bytes(length)
        while len(slots) < count and self.lent_bytes + taken <= self.lease_bytes_max:
            slot = self.dram.reserve(length)
            if slot is None:
                self._meter.dropped("lease", "no_room", count - len(slots))
                break
            self.lent_bytes += taken
            slots.append(slot)
        return slots

    def give_back(self, slots: Iterable[Slot]) -> None:
        """Leased slots that nobody writes to any more."""
        for slot in slots:
            self.dram.release(slot)
            self.lent_bytes -= self.dram.slot_bytes(slot.length)

    def commit(self, filled: Sequence[tuple[Slot, Chunk]]) -> None:
        """Leased slots that now hold chunks (checksum not known yet) become residencies."""
        kept: list[Chunk] = []
        added: list[Key] = []
        known: list[Key] = []
        for slot, chunk in filled:
            self.lent_bytes -= self.dram.slot_bytes(slot.length)
            if (reason := self.dram.refusal(chunk)) is not None:
                self.dram.release(slot)
                self._meter.dropped("store", reason, 1)
                continue
            outcome = self.dram.commit(slot, chunk)
            kept.append(chunk)
            if isinstance(outcome, Known):
                known.append(chunk.key)
                continue
            added.append(chunk.key)
            self.offloader.offer(chunk)
        self.dram.touch(known[::-1])
        self._meter.transfer(TierName.HBM.value, TierName.DRAM.value, _total(filled), 0.0)
        self._learn(kept)
        if added:
            self._events.stored(TierName.DRAM, added)
        if (curve := self.curve) is not None:
            self._later(lambda: curve.stored(kept))

    def loaded(self, size: int, failed: int) -> None:
        """An engine has loaded so many bytes out of slots; so many of its loads failed."""
        self.dram.count_loaded(size)
        self._meter.transfer(TierName.DRAM.value, TierName.HBM.value, size, 0.0)
        if failed:
            self._meter.error("load_G2", "failed", failed)

    # -- below ---------------------------------------------------------------------------

    def _find(self, keys: Sequence[Key]) -> _Found:
        records = self.dram.records(keys)
        places = (records != NONE).astype(np.uint8) * np.uint8(_IN_DRAM)
        missing = np.flatnonzero(places == 0).tolist()
        self._meter.lookup(TierName.DRAM, "hit", len(keys) - len(missing))
        self._meter.lookup(TierName.DRAM, "miss", len(missing))
        below: dict[int, Chunk] = {}
        for number, tier in enumerate(self.tiers, start=_IN_DRAM + 1):
            if not missing:
                break
            chunks = tier.find([keys[index] for index in missing])
            hits = {i: c for i, c in zip(missing, chunks, strict=True) if c is not None}
            places[list(hits)] = number
            below.update(hits)
            self._meter.lookup(tier.name, "hit", len(hits))
            self._meter.lookup(tier.name, "miss", len(missing) - len(hits))
            missing = [index for index in missing if index not in hits]
        return _Found(records, places, below)

    def _claim_here(
        self, ticket: Ticket, base: int, found: _Found, states: NDArray[np.uint8]
    ) -> bytes:
        """Claim of the first chunks, as many as there are states, those in host memory."""
        indexes = np.flatnonzero(found.places[: len(states)] == _IN_DRAM)
        records = found.records[indexes]
        self.dram.claim_all(records)
        ticket.claims.extend(records.tolist())
        states[indexes] = HERE
        packed = np.empty(len(indexes), dtype=SLOT_RECORD)
        packed["index"] = indexes + base
        packed["source"] = SOURCES[TierName.DRAM]
        packed["offset"], packed["length"], packed["generation"] = self.dram.rows(records)
        return packed.tobytes()

    def _bring_up(
        self, ticket: Ticket, base: int, found: _Found, states: NDArray[np.uint8], wanted: range
    ) -> None:
        for index, chunk in found.below.items():
            tier = int(found.places[index]) - _IN_DRAM - 1
            if index in wanted and self.onboarder.request(chunk, tier):
                ticket.coming[chunk.key] = base + index
                self._waiting.setdefault(chunk.key, []).append(ticket)
                states[index] = COMING

    def _claim(self, ticket: Ticket, key: Key) -> Slot:
        record = self.dram.claim(key)
        assert record is not None, "claimed between two looks on one event loop"
        ticket.claims.append(record)
        return self.dram.slot(record)

    def _landed(self, ended: Sequence[tuple[Key, int]]) -> None:
        arrivals: dict[int, tuple[Ticket, Arrivals]] = {}
        keys = [key for key, tier in ended if tier >= 0]
        peers = {k for k, tier in ended if tier >= 0 and self.tiers[tier].name is TierName.PEER}
        for key, tier in ended:
            for ticket in self._waiting.pop(key, ()):
                index = ticket.coming.pop(key)
                _, arrival = arrivals.setdefault(id(ticket), (ticket, Arrivals()))
                if tier >= 0 and key in self.dram:
                    source = SOURCES[self.tiers[tier].name]
                    arrival.landed.append((index, source, self._claim(ticket, key)))
                else:
                    arrival.failed.append(index)
                    arrival.crowded += tier == NO_ROOM
        if keys:
            self._events.stored(TierName.DRAM, keys)
            for chunk in self.dram.find(keys):
                if chunk is not None:
                    self.offloader.offer_sealed(chunk, from_peer=chunk.key in peers)
        for ticket, arrival in arrivals.values():
            ticket.notify(arrival)

    def _offloaded(self, tier: Tier, chunks: Sequence[Chunk]) -> None:
        # By now the tier may have evicted some of them for others of the same batch.
        found = zip(chunks, tier.find([chunk.key for chunk in chunks]), strict=True)
        if kept := [chunk for chunk, there in found if there is not None]:
            self._learn(kept)  # known, unless the chunk was in no tier for a moment
            self._events.stored(tier.name, [chunk.key for chunk in kept])

    def _learn(self, chunks: Sequence[Chunk]) -> None:
        noted = [chunk for chunk in chunks if chunk.note]
        if noted:
            self.notes.learn([chunk.key for chunk in noted], [chunk.note for chunk in noted])

    def check_integrity(self) -> None:
        """Assert that claims, tickets and waiters agree. Cost: linear in tickets and residents."""
        self.dram.check_integrity()
        for key, tickets in self._waiting.items():
            assert tickets and all(key in t.coming and not t.closed for t in tickets)
            assert key in self.onboarder


def _usable_tokens(groups: Sequence[Wanted], found: Sequence[_Found]) -> int:
    """How far the groups that need every chunk reach; without such groups, the whole request."""
    reach = min((len(g.keys) * g.tokens_per_chunk for g in groups), default=0)
    for group, each in zip(groups, found, strict=True):
        gaps = np.flatnonzero(each.places == 0)
        if len(gaps) and not group.window:
            reach = min(reach, int(gaps[0]) * group.tokens_per_chunk)
    return reach


def _total(filled: Sequence[tuple[Slot, Chunk]]) -> int:
    return sum(chunk.length for _, chunk in filled)
