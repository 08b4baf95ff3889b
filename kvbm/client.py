"""An engine's scheduler as the daemon's client: tickets, answers and a pool of leased slots.

All methods return at once. What the daemon says is queued by the link's thread and applied when
the owner calls `pump`, so that state changes only between the owner's own steps; but slots that
another engine needs go back at once, because an idle engine takes no steps. While the daemon is
away every lookup is a miss and every store is skipped; nothing waits for it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm.link import Link
from kvbm.protocol import (
    COMING,
    HERE,
    KEYS_PER_MATCH_MAX,
    MISS,
    REQUEST_CHARS_MAX,
    Arrived,
    Commit,
    FromClient,
    FromDaemon,
    GiveBack,
    Hello,
    Lease,
    Leased,
    Loaded,
    Match,
    Matched,
    MatchGroup,
    Outcome,
    Pace,
    Ready,
    Share,
    SlotRow,
    Unmatch,
    Welcome,
    pack_slots,
    unpack_rows,
    unpack_slots,
)
from storage_tiers.arena import Slot
from storage_tiers.base import KEY_BYTES, Key

CHUNKS_PER_COMMIT_MAX: Final = 256  # with the longest notes, half a frame
LEASE_RETRY_S: Final = 0.05
LEASE_UNANSWERED_S: Final = 1.0
UNANSWERED_MAX: Final = 3
SILENT_S: Final = 0.5
"""The link is renewed after so many lookups in a row that ran into their deadline, if there was
no answer for so long."""

UNMEASURED: Final = Pace()

_logger = logging.getLogger("kvbm.client")


@dataclass(slots=True)
class Lookup:
    """One request's keys and what is known of them. `answered` once the daemon replied."""

    ticket: int
    keys: list[Key]
    states: bytearray
    asked_at: float
    answered: bool = False
    tokens: int = 0  # of the prefix that is worth loading, once answered
    rows: dict[int, SlotRow] = field(default_factory=dict)  # by index, of what is HERE

    def slot(self, index: int) -> tuple[Slot, int] | None:
        """Where a chunk is and the tier it came from; None if it is not HERE."""
        row = self.rows.get(index)
        return None if row is None else (Slot(*row[2:]), row[1])


@dataclass(slots=True)
class _Pool:
    """Leased slots of one length, and what is asked for."""

    target: int
    slots: deque[Slot] = field(default_factory=deque)
    asked: bool = False
    asked_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Filled:
    """A slot that holds a chunk now."""

    key: Key
    parent: Key | None
    position: int
    slot: Slot
    note: bytes = b""


class _Inbox:
    """The link's handler: keeps events in order until the owner's next `pump`."""

    def __init__(self, share: Callable[[int], None]) -> None:
        self._share = share
        self.events: deque[tuple[int, FromDaemon | None]] = deque()  # None: disconnected
        self._connection = 0

    def connected(self, connection: int, welcome: Welcome, arena_fd: int | None) -> None:
        self._connection = connection
        self.events.append((connection, welcome))

    def received(self, message: FromDaemon) -> None:
        if isinstance(message, Share):
            self._share(message.bytes)
        else:
            self.events.append((self._connection, message))

    def disconnected(self) -> None:
        self.events.append((self._connection, None))


class SchedulerClient:
    """Single-threaded but for the link it owns."""

    def __init__(
        self,
        path: str,
        hello: Callable[[], Hello],
        lease_targets: Sequence[int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inbox = _Inbox(self._set_share)
        self._link = Link(path, hello, self._inbox)
        self._clock = clock
        self._lease_targets = lease_targets  # by cache group
        self._lease_lock = threading.Lock()  # for the pools and the share
        self._pools: dict[int, _Pool] = {}  # by slot length
        self._share_bytes = 0
        self._lookups: dict[int, Lookup] = {}
        self._next_ticket = 0
        self._unanswered = 0
        self._silent_since = math.inf
        self.connection = 0  # what was leased or asked on another one means nothing any more
        self._renounced = 0  # events of connections up to this one come too late
        self.epoch = b""
        self.session = 0
        self.salt = b""
        self.tag = 0
        self.layout: Ready | None = None  # set while the engine's members are all connected

    @property
    def ready(self) -> bool:
        """Whether chunks can be looked up and stored now."""
        return self.layout is not None

    def start(self) -> None:
        self._link.start()

    def close(self) -> None:
        self._link.close()

    def renew(self) -> None:
        """Start over with a new connection: the daemon takes back everything safely."""
        self._forget()
        self._renounced = self._link.reconnect()

    def pump(self) -> None:
        """Apply what the daemon has said. O(1) when it said nothing."""
        events = self._inbox.events
        while events:
            connection, event = events.popleft()
            if connection <= self._renounced:
                continue
            match event:
                case None:
                    self._forget()
                case Welcome():
                    self.connection = connection
                    self.epoch, self.session = event.epoch, event.session
                    self.salt, self.tag = event.salt, event.tag
                case Ready():
                    self._become_ready(event)
                case Matched():
                    self._matched(event)
                case Arrived():
                    self._arrived(event)
                case Leased():
                    self._leased(event)
                case _:
                    _logger.warning("unexpected %s from the daemon", type(event).__name__)

    # -- lookups -------------------------------------------------------------------------

    def look_up(
        self,
        groups: Sequence[MatchGroup],
        keys: list[Key],
        request: str = "",
        pace: Pace = UNMEASURED,
    ) -> Lookup | None:
        """Ask for these keys (`groups` in order hold exactly `keys`). None: no daemon.

        Nor is it asked for more keys than it answers in one message. `request` is the name that
        the receipt will have; at its `pace` the engine would compute what is found.
        """
        if not self.ready or not 0 < len(keys) <= KEYS_PER_MATCH_MAX:
            return None
        self._next_ticket += 1
        lookup = Lookup(self._next_ticket, keys, bytearray(len(keys)), self._clock())
        name = request[:REQUEST_CHARS_MAX]
        if not self._send(Match(lookup.ticket, list(groups), name, pace)):
            return None
        self._lookups[lookup.ticket] = lookup
        return lookup

    def holds(self, lookup: Lookup | None) -> bool:
        """Whether the ticket is open: what it says is here stays here."""
        return lookup is not None and lookup.ticket in self._lookups

    def forget(self, lookup: Lookup, outcome: Outcome | None = None) -> None:
        """Close a ticket. Idempotent, also after the connection it belonged to."""
        if self._lookups.pop(lookup.ticket, None) is not None:
            if outcome is not None:
                self._send(outcome)
            self._send(Unmatch([lookup.ticket]))

    def note_unanswered(self, asked_at: float) -> None:
        """A lookup ran into its deadline without any answer: the daemon may hang.

        A deadline may be a few milliseconds; so short a silence says nothing yet.
        """
        self._unanswered += 1
        self._silent_since = min(self._silent_since, asked_at)
        is_silent = self._clock() - self._silent_since >= SILENT_S
        if self._unanswered >= UNANSWERED_MAX and is_silent:
            _logger.warning("kvbm-daemon does not answer; serving without it until it does")
            self._heard()
            self.renew()

    # -- slots ---------------------------------------------------------------------------

    def take_slots(self, group: int, count: int) -> list[Slot]:
        """Up to `count` leased slots for chunks of a cache group."""
        if self.layout is None:
            return []
        with self._lease_lock:
            pool = self._pools[self.layout.lengths[group]]
            taken = [pool.slots.popleft() for _ in range(min(count, len(pool.slots)))]
        self._refill()
        return taken

    def commit(self, filled: Sequence[Filled]) -> None:
        """These leased slots hold chunks now."""
        for first in range(0, len(filled), CHUNKS_PER_COMMIT_MAX):
            self._send(_commit_of(filled[first : first + CHUNKS_PER_COMMIT_MAX]))
        self._refill()

    def give_back(self, slots: Sequence[Slot]) -> None:
        """These leased slots are not needed, or what was written to them is no chunk."""
        if slots:
            self._send(GiveBack(pack_slots((i, 0, slot) for i, slot in enumerate(slots))))
            self._refill()

    def report_loaded(self, size: int, failed: int) -> None:
        self._send(Loaded(size, failed))

    # -- below ---------------------------------------------------------------------------

    def _send(self, message: FromClient) -> bool:
        return self._link.send(self.connection, message)

    def _forget(self) -> None:
        self.layout = None
        with self._lease_lock:
            self._pools.clear()
        for lookup in self._lookups.values():
            lookup.answered = True
            lookup.states = bytearray(len(lookup.keys))
            lookup.rows.clear()
        self._lookups.clear()

    def _become_ready(self, message: Ready) -> None:
        self.layout = message
        self._heard()
        with self._lease_lock:
            for length, target in zip(message.lengths, self._lease_targets, strict=True):
                self._pools.setdefault(length, _Pool(0)).target += target
        self._refill()

    def _heard(self) -> None:
        self._unanswered = 0
        self._silent_since = math.inf

    def _matched(self, message: Matched) -> None:
        self._heard()
        lookup = self._lookups.get(message.ticket)
        if lookup is None or len(message.states) != len(lookup.keys):
            return
        lookup.answered = True
        lookup.states[:] = message.states
        lookup.tokens = message.tokens
        lookup.rows = {row[0]: row for row in unpack_rows(message.slots)}

    def _arrived(self, message: Arrived) -> None:
        lookup = self._lookups.get(message.ticket)
        if lookup is None:
            return
        for row in unpack_rows(message.slots):
            lookup.states[row[0]] = HERE
            lookup.rows[row[0]] = row
        for index in message.failed:
            if lookup.states[index] == COMING:
                lookup.states[index] = MISS

    def _leased(self, message: Leased) -> None:
        slots = [slot for _, _, slot in unpack_slots(message.slots)]
        with self._lease_lock:
            for pool in self._pools.values():
                pool.asked = pool.asked and bool(slots)
            for slot in slots:
                pool = self._pools[slot.length]
                pool.slots.append(slot)
                pool.asked = False
        self._give_back_surplus()  # the share may have shrunk while these were on their way

    def _refill(self) -> None:
        """Ask for what is missing to the targets; not again until answered."""
        now = self._clock()
        with self._lease_lock:
            wanted = [
                (length, pool, self._target(length, pool) - len(pool.slots))
                for length, pool in self._pools.items()
            ]
        for length, pool, missing in wanted:
            pause_s = LEASE_UNANSWERED_S if pool.asked else LEASE_RETRY_S
            if 8 * missing < pool.target or missing <= 0 or now - pool.asked_at < pause_s:
                continue
            if self._send(Lease(length, missing)):
                pool.asked, pool.asked_at = True, now

    def _target(self, length: int, pool: _Pool) -> int:
        """The pool's target, or its part of the share where the share is smaller."""
        everything = sum(size * each.target for size, each in self._pools.items())
        if everything <= self._share_bytes:
            return pool.target
        return pool.target * self._share_bytes // everything

    def _set_share(self, share_bytes: int) -> None:
        """On the link's thread."""
        with self._lease_lock:
            self._share_bytes = share_bytes
        self._give_back_surplus()

    def _give_back_surplus(self) -> None:
        """What is pooled beyond the share; on either thread."""
        with self._lease_lock:
            surplus = [
                pool.slots.pop()
                for length, pool in self._pools.items()
                for _ in range(len(pool.slots) - self._target(length, pool))
            ]
        if surplus:
            self._send(GiveBack(pack_slots((i, 0, slot) for i, slot in enumerate(surplus))))


def _commit_of(filled: Sequence[Filled]) -> Commit:
    none = bytes(KEY_BYTES)
    return Commit(
        b"".join(item.key for item in filled),
        b"".join(item.parent or none for item in filled),
        [item.position for item in filled],
        pack_slots((i, 0, item.slot) for i, item in enumerate(filled)),
        [item.note for item in filled] if any(item.note for item in filled) else [],
    )
