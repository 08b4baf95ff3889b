"""Routers of one model tell each other what they sent where, so that all count the same load.

Each numbers its changes within its epoch and publishes them in batches, outputs included, and when
nothing changes an empty batch as a sign of life. Whoever notices a gap, or a router it does not
know, asks for that router's state and ignores its batches until the state has come: so loss,
duplicates, reordering and restarts heal. A router that is silent for long is taken for gone and
what it had sent is not counted any more; there is no other expiry, however long a request runs.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import xxhash

from router.index import WorkerId
from router.load import Active, ActiveSequences
from router.workers import Workers
from runtime.events.base import EventPlane, Message

LINGER_S: Final = 0.001
BATCH_CHANGES: Final = 256
STATE_SEQUENCES: Final = 128  # in one message; a prompt of 8 k tokens is 5 KB
SIGN_OF_LIFE_S: Final = 1.0
SILENCE_S: Final = 10.0
ASK_AGAIN_S: Final = 0.5
PARKED_MAX: Final = 4096


class Begun(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
    request: str
    instance: int
    dp_rank: int
    prompt: list[int]
    blocks: int
    prefill_tokens: float
    prefill_s: float


class Prefilled(msgspec.Struct, frozen=True, array_like=True, tag="prefilled"):
    request: str


class Grew(msgspec.Struct, frozen=True, array_like=True, tag="grew"):
    request: str
    blocks: int


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    request: str


Change = Begun | Prefilled | Grew | Ended


class Changes(msgspec.Struct, frozen=True, array_like=True, tag="changes"):
    """The n-th has the number `first + n`; none at all is a sign of life."""

    router: str
    epoch: int
    first: int
    changes: list[Change]


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """Of the router `router`: its state."""

    router: str


class State(msgspec.Struct, frozen=True, array_like=True, tag="state"):
    """All sequences of a router after the change before `next`, in `parts` messages."""

    router: str
    epoch: int
    next: int
    part: int
    parts: int
    sequences: list[Begun]


def subject_of(namespace: str, model: str) -> str:
    """One token of the subject is the model, whatever characters its name has."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", model)
    if plain != model:
        plain = f"{plain}-{xxhash.xxh3_64_hexdigest(model.encode())}"
    return f"kvbm.{namespace}.router.{plain}.sequences"


@dataclass(slots=True)
class _Peer:
    """What is known of another router."""

    epoch: int
    next: int | None = None  # None: its state is awaited
    heard_at: float = 0.0
    asked_at: float = float("-inf")
    parts: dict[int, State] = field(default_factory=dict)
    requests: set[str] = field(default_factory=set)


@dataclass(slots=True)
class ReplicaCounts:
    gaps: int = 0
    states_sent: int = 0
    states_taken: int = 0
    malformed: int = 0
    silent: int = 0  # routers taken for gone
    unpublished: int = 0  # batches the plane did not take
    refused: int = 0  # sequences there was no room for


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """Another router, as this one knows it."""

    name: str
    epoch: int
    heard_s_ago: float
    requests: int
    up_to_date: bool  # no: its state was asked for and has not come


class ReplicatedLoad:
    """The load of all routers' requests. Same calls as `ActiveSequences`, for this router's own.

    All methods are called from one event loop. `name` is this router's, unique among them; `epoch`
    grows with each run of it.
    """

    def __init__(
        self,
        workers: Workers,
        active: ActiveSequences,
        plane: EventPlane,
        *,
        namespace: str,
        model: str,
        name: str,
        epoch: int,
        silence_s: float = SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = ReplicaCounts()
        self._workers = workers
        self._active = active
        self._plane = plane
        self._subject = subject_of(namespace, model)
        self._name = name
        self._epoch = epoch
        self._silence_s = silence_s
        self._clock = clock
        self._next = 0
        self._batch: list[Change] = []
        self._timer: asyncio.TimerHandle | None = None
        self._own: dict[str, Begun] = {}
        self._peers: dict[str, _Peer] = {}
        self._parked: dict[str, Begun] = {}  # others' sequences on workers not registered here

    async def run(self) -> None:
        """Until cancelled: hear the others, and be heard."""
        async with self._plane.subscribe(self._subject) as messages, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            async for message in messages:
                self.hear(message)

    async def _watch(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(min(SIGN_OF_LIFE_S, ASK_AGAIN_S))

    # -- this router's requests ----------------------------------------------------------

    def begin(self, request: str, sequence: Active) -> bool:
        if not self._active.begin(self._key(self._name, request), sequence):
            return False
        worker = self._workers.at(sequence.row).id
        begun = Begun(
            request,
            worker.instance,
            worker.dp_rank,
            list(sequence.prompt),
            sequence.blocks,
            sequence.prefill_tokens,
            sequence.prefill_s,
        )
        self._own[request] = begun
        self._tell(begun)
        return True

    def prefilled(self, request: str) -> bool:
        return self._change(request, Prefilled(request))

    def grow(self, request: str, blocks: int = 1) -> bool:
        return self._change(request, Grew(request, blocks))

    def end(self, request: str) -> bool:
        return self._change(request, Ended(request))

    # -- workers -------------------------------------------------------------------------

    def worker_added(self, worker: WorkerId) -> None:
        """Others' sequences that were waiting for it count from now on."""
        for key, begun in list(self._parked.items()):
            if (begun.instance, begun.dp_rank) == (worker.instance, worker.dp_rank):
                del self._parked[key]
                self._take(key, begun)

    def worker_removed(self, row: int) -> list[str]:
        """This router's requests that were on it. Each router notices for itself."""
        mine = self._key(self._name, "")
        ended = [
            key.removeprefix(mine)
            for key in self._active.worker_removed(row)
            if key.startswith(mine)
        ]
        for request in ended:
            self._own.pop(request, None)
            self._tell(Ended(request))
        return ended

    def peers(self) -> list[PeerStatus]:
        now = self._clock()
        return [
            PeerStatus(
                name, peer.epoch, now - peer.heard_at, len(peer.requests), peer.next is not None
            )
            for name, peer in sorted(self._peers.items())
        ]

    # -- the plane -----------------------------------------------------------------------

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        changes, self._batch = self._batch, []
        self._publish(Changes(self._name, self._epoch, self._next - len(changes), changes))

    def hear(self, message: Message) -> None:
        """Take one message of another router; malformed ones are counted."""
        try:
            heard = _decoder.decode(message.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.counts.malformed += 1
            return
        match heard:
            case Ask(router):
                if router == self._name:
                    self._send_state()
            case Changes() if heard.router != self._name:
                self._follow(heard)
            case State() if heard.router != self._name:
                self._take_state(heard)

    def tick(self) -> None:
        """At least every `SIGN_OF_LIFE_S`: be heard, ask again, forget the silent."""
        self.flush()
        now = self._clock()
        for name, peer in list(self._peers.items()):
            if now - peer.heard_at > self._silence_s:
                self.counts.silent += 1
                self._forget(peer)
                del self._peers[name]
            elif peer.next is None:
                self._ask(name, peer)

    # -- inside --------------------------------------------------------------------------

    @staticmethod
    def _key(router: str, request: str) -> str:
        return f"{router}\0{request}"

    def _change(self, request: str, change: Change) -> bool:
        known = self._apply(self._key(self._name, request), change)
        if known:
            self._own[request] = _changed(self._own[request], change)
            if isinstance(change, Ended):
                del self._own[request]
            self._tell(change)
        return known

    def _tell(self, change: Change) -> None:
        self._next += 1
        self._batch.append(change)
        if len(self._batch) >= BATCH_CHANGES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self.flush)

    def _publish(self, message: Changes | Ask | State) -> None:
        if not self._plane.publish(self._subject, _encoder.encode(message)):
            self.counts.unpublished += 1

    def _apply(self, key: str, change: Change) -> bool:
        match change:
            case Begun():
                return self._take(key, change)
            case Prefilled():
                return self._active.prefilled(key)
            case Grew(_, blocks):
                return self._active.grow(key, blocks)
            case Ended():
                return self._active.end(key)

    def _take(self, key: str, begun: Begun) -> bool:
        worker = WorkerId(begun.instance, begun.dp_rank)
        if worker not in self._workers:
            if len(self._parked) < PARKED_MAX:
                self._parked[key] = begun
            else:
                self.counts.refused += 1
            return False
        sequence = Active(
            self._workers.row(worker),
            begun.prompt,
            begun.blocks,
            begun.prefill_tokens,
            begun.prefill_s,
        )
        taken = self._active.begin(key, sequence)
        self.counts.refused += not taken
        return taken

    def _follow(self, batch: Changes) -> None:
        now = self._clock()
        peer = self._peers.get(batch.router)
        if peer is None or batch.epoch > peer.epoch:
            if peer is not None:
                self._forget(peer)
            # A run that began under our eyes has nothing to ask for.
            begins = batch.first == 0
            peer = _Peer(batch.epoch, next=0 if begins else None)
            self._peers[batch.router] = peer
        if batch.epoch < peer.epoch:
            return
        peer.heard_at = now
        if peer.next is not None and batch.first > peer.next:
            self.counts.gaps += 1
            peer.next = None
        if peer.next is None:
            self._ask(batch.router, peer)
            return
        for change in batch.changes[peer.next - batch.first :] if batch.first <= peer.next else ():
            self._apply_theirs(batch.router, peer, change)
        peer.next = max(peer.next, batch.first + len(batch.changes))

    def _apply_theirs(self, router: str, peer: _Peer, change: Change) -> None:
        key = self._key(router, change.request)
        if isinstance(change, Begun):
            peer.requests.add(key)
        elif key in self._parked:
            self._parked[key] = _changed(self._parked[key], change)
        if isinstance(change, Ended):
            peer.requests.discard(key)
            self._parked.pop(key, None)
        self._apply(key, change)

    def _ask(self, router: str, peer: _Peer) -> None:
        now = self._clock()
        if now - peer.asked_at >= ASK_AGAIN_S:
            peer.asked_at = now
            peer.parts.clear()
            self._publish(Ask(router))

    def _send_state(self) -> None:
        self.flush()  # so that the state is what came after it
        self.counts.states_sent += 1
        sequences = list(self._own.values())
        parts = max(-(-len(sequences) // STATE_SEQUENCES), 1)
        for part in range(parts):
            some = sequences[part * STATE_SEQUENCES : (part + 1) * STATE_SEQUENCES]
            self._publish(State(self._name, self._epoch, self._next, part, parts, some))

    def _take_state(self, state: State) -> None:
        peer = self._peers.get(state.router)
        if peer is None:
            peer = self._peers[state.router] = _Peer(state.epoch)
        if state.epoch != peer.epoch or peer.next is not None:
            return  # of another run, or asked for by someone else
        peer.heard_at = self._clock()
        if peer.parts and next(iter(peer.parts.values())).next != state.next:
            peer.parts.clear()
        peer.parts[state.part] = state
        if len(peer.parts) < state.parts:
            return
        self.counts.states_taken += 1
        self._forget(peer)
        for part in sorted(peer.parts):
            for begun in peer.parts[part].sequences:
                key = self._key(state.router, begun.request)
                peer.requests.add(key)
                self._take(key, begun)
        peer.parts.clear()
        peer.next = state.next

    def _forget(self, peer: _Peer) -> None:
        for key in peer.requests:
            self._parked.pop(key, None)
            self._active.end(key)
        peer.requests.clear()


def _changed(begun: Begun, change: Change) -> Begun:
    """The sequence as it would begin now."""
    match change:
        case Prefilled():
            return msgspec.structs.replace(begun, prefill_tokens=0.0, prefill_s=0.0)
        case Grew(_, blocks):
            return msgspec.structs.replace(begun, blocks=begun.blocks + blocks)
        case _:
            return begun


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Changes | Ask | State)
