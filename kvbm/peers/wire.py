"""What two daemons say to each other over TCP, and how each shows that it knows the token.

The reader of chunks connects to their owner. Frames are those of `kvbm.protocol`. Order:
Challenge -> Hello -> Welcome or Refused. A connection of the role "control" then carries what the
owner's host memory holds (Have, Gone: first everything, then every change) and the reader's claims
(Claim -> Claimed, Release). One of the role "data" carries Pull -> Pulled and after it the bytes of
a claim, for readers without NIXL. A peer that breaks order or bounds loses its connection.

Both prove the shared token by an HMAC over the other's nonce; it never travels. Bytes are neither
encrypted nor signed: what is on the network between the nodes must be trusted.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm.protocol import (
    POSITIONS_MAX,
    FrameError,
    FrameReader,
    Message,
    decode,
    encode,
    split_keys,
)
from storage_tiers.base import KEY_BYTES, NOTE_BYTES_MAX, Chunk, Key
from storage_tiers.ucx_process import RemoteArena

VERSION: Final = 1
FRAME_BYTES_MAX: Final = 1 << 20
GREETING_BYTES_MAX: Final = 1 << 16  # before the peer is known
KEYS_PER_CLAIM_MAX: Final = 1024
KEYS_PER_HAVE_MAX: Final = 8192
NOTE_BYTES_PER_CLAIM_MAX: Final = FRAME_BYTES_MAX // 2
CLAIM_S_MAX: Final = 60.0
NONCE_BYTES: Final = 16
CONTROL: Final = "control"
DATA: Final = "data"
_NO_PARENT: Final = bytes(KEY_BYTES)


class Challenge(Message, frozen=True):
    """The owner, as soon as it is connected to."""

    version: int
    identity: bytes  # of the daemon: its arena's epoch
    nonce: bytes


class Hello(Message, frozen=True):
    version: int
    role: str  # CONTROL or DATA
    node: str  # for people
    session: bytes  # DATA: the secret that the control connection's Welcome gave
    nonce: bytes
    proof: bytes


class Welcome(Message, frozen=True):
    node: str
    identity: bytes
    session: bytes
    capacity_bytes: int
    proof: bytes


class Refused(Message, frozen=True):
    reason: str


class Serves(Message, frozen=True):
    """The owner's arena can be read with NIXL from now on; or, with empty metadata, it cannot."""

    arena: RemoteArena


class Have(Message, frozen=True):
    """These chunks are in the owner's host memory; their lengths, 8 bytes each."""

    keys: bytes
    lengths: bytes


class Gone(Message, frozen=True):
    keys: bytes


class Claim(Message, frozen=True):
    """Hold these chunks for `hold_s`, or until the Release or the end of this connection."""

    number: int
    keys: bytes
    hold_s: float
    by_nixl: bool  # else a Pull follows


class Lent(msgspec.Struct, frozen=True, array_like=True):
    """One claimed chunk."""

    index: int  # in the claim's keys
    offset: int
    length: int
    checksum: int
    parent: bytes  # all zeros: none
    position: int
    note: bytes = b""  # its own or, in an answer that is too long, none; unknown to older nodes

    def is_sane(self, length_max: int) -> bool:
        """Whether these can be the figures of a chunk."""
        return (
            0 < self.length <= length_max
            and 0 <= self.offset < 1 << 48
            and 0 <= self.checksum < 1 << 64
            and 0 <= self.position < POSITIONS_MAX
            and len(self.parent) == KEY_BYTES
            and len(self.note) <= NOTE_BYTES_MAX
        )

    def chunk(self, key: Key) -> Chunk:
        parent = None if self.parent == _NO_PARENT else Key(self.parent)
        return Chunk(key, self.length, self.checksum, parent, self.position, self.note)

    @classmethod
    def of(cls, index: int, offset: int, chunk: Chunk) -> Lent:
        parent = chunk.parent or _NO_PARENT
        return cls(index, offset, chunk.length, chunk.checksum, parent, chunk.position, chunk.note)


class Claimed(Message, frozen=True):
    number: int
    lent: list[Lent]
    busy: list[int]  # here, but too much is lent already; what is in neither list is gone


class Release(Message, frozen=True):
    number: int


class Damaged(Message, frozen=True):
    """Bytes of this chunk did not match the checksum when they had arrived."""

    key: bytes


class Pull(Message, frozen=True):
    """Send the bytes of a claim, in the order of `Claimed.lent`."""

    number: int


class Pulled(Message, frozen=True):
    """How many bytes follow this frame; 0: the claim is over."""

    size: int


FromOwner = Challenge | Welcome | Refused | Serves | Have | Gone | Claimed | Pulled
FromReader = Hello | Claim | Release | Damaged | Pull

_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)
_from_reader: msgspec.msgpack.Decoder[FromReader] = msgspec.msgpack.Decoder(FromReader)


def decode_from_owner(body: bytes) -> FromOwner:
    """Raises FrameError."""
    return decode(_from_owner, body)


def decode_from_reader(body: bytes) -> FromReader:
    """Raises FrameError."""
    return decode(_from_reader, body)


def pack_have(chunks: Sequence[Chunk]) -> Have:
    lengths: npt.NDArray[np.uint64] = np.array([c.length for c in chunks], dtype="<u8")
    return Have(b"".join(chunk.key for chunk in chunks), lengths.tobytes())


def unpack_have(message: Have) -> list[tuple[Key, int]]:
    """Raises FrameError."""
    keys = split_keys(message.keys)
    if len(message.lengths) != 8 * len(keys):
        raise FrameError("a Have whose lists differ in length")
    lengths = np.frombuffer(message.lengths, dtype="<u8").tolist()
    if not all(0 < length < 1 << 48 for length in lengths):
        raise FrameError("a Have with a length out of range")
    return list(zip(keys, lengths, strict=True))


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(token: str, who: str, nonce: bytes) -> bytes:
    """That `who` ("reader" or "owner") knows the token, for whoever made the nonce."""
    return hmac.digest(token.encode(), who.encode() + b"\0" + nonce, "sha256")


def is_proof(given: bytes, token: str, who: str, nonce: bytes) -> bool:
    return len(nonce) == NONCE_BYTES and hmac.compare_digest(given, proof(token, who, nonce))


async def next_body(sock: socket.socket, frames: FrameReader, bodies: list[bytes]) -> bytes:
    """The next frame of a non-blocking socket. Raises ConnectionError at the end of the stream."""
    while not bodies:
        data = await asyncio.get_running_loop().sock_recv(sock, GREETING_BYTES_MAX)
        if not data:
            raise ConnectionError("the peer closed the connection")
        bodies.extend(frames.feed(data))
    return bodies.pop(0)


async def say(sock: socket.socket, message: Message) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, encode(message))


def tune(sock: socket.socket) -> None:
    """A peer that vanishes without a word is noticed in seconds, not in hours."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)
