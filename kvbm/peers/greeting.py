"""A reader's first words to an owner: connect, prove the token, have the owner prove it too."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvbm.peers import wire
from kvbm.protocol import FrameError, FrameReader

TIMEOUT_S: Final = 5.0


class KnownError(Exception):
    """The address leads to a node that is connected already, or to this one."""


@dataclass(frozen=True, slots=True)
class Greeted:
    """A connection that both sides take for the other's, and what has been read of it already."""

    sock: socket.socket
    welcome: wire.Welcome
    frames: FrameReader
    bodies: list[bytes]


class Greeter:
    """This node, as it presents itself to others."""

    def __init__(self, node: str, identity: bytes, token: str) -> None:
        self._node = node
        self._identity = identity
        self._token = token

    async def greet(
        self,
        address: tuple[str, int],
        role: str,
        *,
        session: bytes = b"",
        is_known: Callable[[bytes], bool] = lambda _: False,
    ) -> Greeted:
        """Raises OSError, TimeoutError or FrameError; KnownError if `is_known` says so."""
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                sock = await connect(*address)
                return await self._greet(sock, role, session, is_known)
        except BaseException:
            if sock is not None:
                sock.close()
            raise

    async def _greet(
        self, sock: socket.socket, role: str, session: bytes, is_known: Callable[[bytes], bool]
    ) -> Greeted:
        frames, bodies = FrameReader(wire.FRAME_BYTES_MAX), list[bytes]()
        challenge = wire.decode_from_owner(await wire.next_body(sock, frames, bodies))
        if not isinstance(challenge, wire.Challenge) or challenge.version != wire.VERSION:
            raise FrameError("it is no kvbm-daemon of this version: upgrade both sides")
        if challenge.identity == self._identity or is_known(challenge.identity):
            raise KnownError
        nonce = wire.new_nonce()
        hello = wire.Hello(
            version=wire.VERSION,
            role=role,
            node=self._node,
            session=session,
            nonce=nonce,
            proof=wire.proof(self._token, "reader", challenge.nonce),
        )
        await wire.say(sock, hello)
        welcome = wire.decode_from_owner(await wire.next_body(sock, frames, bodies))
        if isinstance(welcome, wire.Refused):
            raise FrameError(f"it refused: {welcome.reason}")
        if not isinstance(welcome, wire.Welcome):
            raise FrameError(f"expected a welcome, got {type(welcome).__name__}")
        if not wire.is_proof(welcome.proof, self._token, "owner", nonce):
            raise FrameError("its peers.token is not this node's")
        return Greeted(sock, welcome, frames, bodies)


async def connect(host: str, port: int) -> socket.socket:
    """A non-blocking connection. Raises OSError of the last address that was tried."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as error:  # no name at all: a label too long, a zero byte
        raise OSError(f"{host!r} is no host: {error}") from error
    trouble = OSError(f"{host} has no address")
    for family, kind, number, _, address in found:
        sock = socket.socket(family, kind, number)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            trouble = error
        except BaseException:
            sock.close()
            raise
        else:
            wire.tune(sock)
            return sock
    raise trouble
