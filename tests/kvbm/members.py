"""Members of engines without sockets: what a session's tests say and hear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvbm.protocol import (
    VERSION,
    Commit,
    FromClient,
    FromDaemon,
    Hello,
    Lease,
    Leased,
    Match,
    Matched,
    MatchGroup,
    Message,
    Routing,
    encode,
    pack_slots,
    unpack_slots,
)
from kvbm.session import Session, Sessions
from storage_tiers.arena import Slot
from storage_tiers.base import KEY_BYTES, StoreItem
from tests.kvbm.builders import CHUNK_BYTES, keys_of

M = TypeVar("M", bound=Message)


def make_hello(
    role: str = "worker",
    *,
    engine: str = "engine",
    rank: int = 0,
    world_size: int = 1,
    group_bytes: Sequence[int] = (CHUNK_BYTES,),
    replicated: bool = False,
    version: int = VERSION,
    tenant: str = "",
    routing: Mapping[str, Any] | None = None,
) -> Hello:
    fingerprint = {"test": "yes", "tenant": tenant}
    sizes = list(group_bytes) if role == "worker" else []
    said = Routing(**routing) if routing is not None else None
    return Hello(version, role, engine, rank, world_size, fingerprint, sizes, replicated, 1, said)


class Peer:
    """A member of a session without a socket: what it was told, and whether it was closed."""

    def __init__(self, hello: Hello) -> None:
        self.hello = hello
        self.since = 0.0
        self.told: list[FromDaemon] = []
        self.closed = False

    def send(self, message: FromDaemon) -> None:
        encode(message)  # a real member could not be told anything else
        self.told.append(message)

    def close(self) -> None:
        self.closed = True


def said(peer: Peer, kind: type[M]) -> list[M]:
    """What of this kind the peer was told."""
    return [message for message in peer.told if isinstance(message, kind)]


@dataclass
class Engine:
    """The members of one engine, joined."""

    sessions: Sessions
    scheduler: Peer
    workers: list[Peer]
    session: Session

    def say(self, message: FromClient) -> None:
        self.session.handle(self.scheduler, message)

    def lease(self, count: int) -> list[Slot]:
        self.say(Lease(CHUNK_BYTES, count))
        return [slot for _, _, slot in unpack_slots(said(self.scheduler, Leased)[-1].slots)]

    def match(self, ticket: int, items: Sequence[StoreItem]) -> list[int]:
        self.say(Match(ticket, [MatchGroup(16, 0, b"".join(keys_of(items)))]))
        answer = said(self.scheduler, Matched)[-1]
        assert answer.ticket == ticket
        return list(answer.states)

    def commit(self, slots: Sequence[Slot], items: Sequence[StoreItem]) -> None:
        self.say(commit_of(slots, items))


def commit_of(slots: Sequence[Slot], items: Sequence[StoreItem]) -> Commit:
    chunks = [item.chunk for item in items]
    return Commit(
        b"".join(chunk.key for chunk in chunks),
        b"".join(chunk.parent or bytes(KEY_BYTES) for chunk in chunks),
        [chunk.position for chunk in chunks],
        pack(slots),
    )


def pack(slots: Sequence[Slot]) -> bytes:
    return pack_slots((index, 0, slot) for index, slot in enumerate(slots))


def join_engine(
    sessions: Sessions, name: str = "engine", world_size: int = 1, tenant: str = ""
) -> Engine:
    scheduler = Peer(make_hello("scheduler", engine=name, world_size=world_size, tenant=tenant))
    stripe = [CHUNK_BYTES // world_size]
    workers = [
        Peer(
            make_hello(
                engine=name, rank=rank, world_size=world_size, group_bytes=stripe, tenant=tenant
            )
        )
        for rank in range(world_size)
    ]
    session = sessions.join(scheduler)
    for worker in workers:
        assert sessions.join(worker) is session
    return Engine(sessions, scheduler, workers, session)
