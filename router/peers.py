"""What routers of one model tell of their requests, followed by whoever wants to know.

Each router numbers its changes within its epoch and publishes them in batches, an empty one as a
sign of life. Whoever notices a gap, or a router it does not know, asks for that router's state and
ignores its batches until the state has come: so loss, duplicates, reordering and restarts heal. A
router that is silent for long is taken for gone and what it had sent is not counted any more; there
is no other expiry, however long a request runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec
import xxhash

SIGN_OF_LIFE_S: Final = 1.0
SILENCE_S: Final = 10.0
ASK_AGAIN_S: Final = 0.5


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
    timed: bool = True  # no: its answer came whole, and its first token some time before


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


def subjects_of(namespace: str) -> str:
    """Of all models."""
    return f"kvbm.{namespace}.router.*.sequences"


def encode(message: Changes | Ask | State) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes) -> Changes | Ask | State | None:
    """None for what is no message of a router."""
    try:
        message: Changes | Ask | State = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return message


class Listener(Protocol):
    """To whom `Peers` tells what routers say."""

    def happened(self, router: str, change: Change) -> None:
        """Each change once, in order."""
        ...

    def runs(self, router: str, begun: Begun) -> None:
        """By the router's state this request is under way; what it was before was forgotten."""
        ...

    def forget(self, router: str, request: str) -> None:
        """It counts no more, unless `runs` says so: its router is gone, or has to tell it anew."""
        ...

    def ask(self, router: str) -> None:
        """Publish `Ask`."""
        ...


@dataclass(slots=True)
class _Peer:
    epoch: int
    next: int | None = None  # None: its state is awaited
    heard_at: float = 0.0
    asked_at: float = float("-inf")
    parts: dict[int, State] = field(default_factory=dict)
    requests: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """Another router, as this program knows it."""

    name: str
    epoch: int
    heard_s_ago: float
    requests: int
    up_to_date: bool  # no: its state was asked for and has not come


@dataclass(slots=True)
class ReplicaCounts:
    gaps: int = 0
    states_sent: int = 0
    states_taken: int = 0
    malformed: int = 0
    silent: int = 0  # routers taken for gone
    unpublished: int = 0  # batches the plane did not take
    refused: int = 0  # sequences there was no room for


class Peers:
    """Other routers of one model. All methods are called from one event loop."""

    def __init__(
        self,
        listener: Listener,
        counts: ReplicaCounts,
        silence_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._counts = counts
        self._listener = listener
        self._silence_s = silence_s
        self._clock = clock
        self._peers: dict[str, _Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def status(self) -> list[PeerStatus]:
        now = self._clock()
        return [
            PeerStatus(
                name, peer.epoch, now - peer.heard_at, len(peer.requests), peer.next is not None
            )
            for name, peer in sorted(self._peers.items())
        ]

    def follow(self, batch: Changes) -> None:
        peer = self._peers.get(batch.router)
        if peer is None or batch.epoch > peer.epoch:
            if peer is not None:
                self._forget(batch.router, peer)
            # A run that began under our eyes has nothing to ask for.
            begins = batch.first == 0
            peer = _Peer(batch.epoch, next=0 if begins else None)
            self._peers[batch.router] = peer
        if batch.epoch < peer.epoch:
            return
        peer.heard_at = self._clock()
        if peer.next is not None and batch.first > peer.next:
            self._counts.gaps += 1
            peer.next = None
        if peer.next is None:
            self._ask(batch.router, peer)
            return
        for change in batch.changes[peer.next - batch.first :] if batch.first <= peer.next else ():
            if isinstance(change, Begun):
                peer.requests.add(change.request)
            elif isinstance(change, Ended):
                peer.requests.discard(change.request)
            self._listener.happened(batch.router, change)
        peer.next = max(peer.next, batch.first + len(batch.changes))

    def take(self, state: State) -> None:
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
        self._counts.states_taken += 1
        self._forget(state.router, peer)
        for part in sorted(peer.parts):
            for begun in peer.parts[part].sequences:
                peer.requests.add(begun.request)
                self._listener.runs(state.router, begun)
        peer.parts.clear()
        peer.next = state.next

    def tick(self) -> None:
        """At least every `ASK_AGAIN_S`: ask again, forget the silent."""
        now = self._clock()
        for name, peer in list(self._peers.items()):
            if now - peer.heard_at > self._silence_s:
                self._counts.silent += 1
                self._forget(name, peer)
                del self._peers[name]
            elif peer.next is None:
                self._ask(name, peer)

    def _ask(self, name: str, peer: _Peer) -> None:
        now = self._clock()
        if now - peer.asked_at >= ASK_AGAIN_S:
            peer.asked_at = now
            peer.parts.clear()
            self._listener.ask(name)

    def _forget(self, name: str, peer: _Peer) -> None:
        for request in peer.requests:
            self._listener.forget(name, request)
        peer.requests.clear()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Changes | Ask | State)
