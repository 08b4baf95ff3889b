"""The owner's side: a TCP listener through which other nodes read this node's host memory.

Same discipline as the control socket: bounded frames, deadlines on the handshake and on every
answer that is not read, and nothing a peer sends does more than cost it its connection, counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog

from kvbm.meter import Meter
from kvbm.note import NoteBook
from kvbm.peers import wire
from kvbm.peers.contents import Contents, Following
from kvbm.peers.loans import Borrower, LoanOffice
from kvbm.protocol import FrameError, FrameReader, Message, encode, split_keys
from storage_tiers.base import Key
from storage_tiers.dram import DramTier
from storage_tiers.settle import settled
from storage_tiers.stream import send_all
from storage_tiers.ucx_process import RemoteArena

CONNECTIONS_MAX: Final = 1024
GREET_TIMEOUT_S: Final = 5.0
UNREAD_TIMEOUT_S: Final = 20.0
ACCEPT_RETRY_S: Final = 0.2
SENDERS: Final = 8
NODE_LENGTH_MAX: Final = 48
NO_ARENA: Final = RemoteArena(b"", 0)

_log = structlog.get_logger("kvbm.peers")


class PeerSocketError(Exception):
    """The listener cannot be made; the message says where and why."""


class _Refusal(Exception):
    """This peer may not read here; the message tells its operator why."""


@dataclass(slots=True)
class _Reader:
    """A control connection."""

    hello: wire.Hello
    borrower: Borrower
    writer: asyncio.StreamWriter

    async def say(self, message: Message) -> None:
        """Raises TimeoutError if it does not read."""
        self.writer.write(encode(message))
        async with asyncio.timeout(UNREAD_TIMEOUT_S):
            await self.writer.drain()


class Owner:
    """Listens while `serve` runs. All calls from the event loop that owns `dram`."""

    def __init__(
        self,
        node: str,
        token: str,
        dram: DramTier,
        contents: Contents,
        notes: NoteBook,
        meter: Meter,
        *,
        check: Callable[[Key], Coroutine[Any, Any, bool]],
        serve: Callable[[float], None],
    ) -> None:
        """`check` looks whether a chunk is sound; `serve` as `LoanOffice` says."""
        self._node = node
        self._token = token
        self._dram = dram
        self._contents = contents
        self._meter = meter
        self._check = check
        self.office = LoanOffice(dram, notes, meter, serve)
        self._arena = NO_ARENA
        self._readers: dict[bytes, _Reader] = {}  # by session
        self._tasks: set[asyncio.Task[None]] = set()
        self._senders = ThreadPoolExecutor(SENDERS, thread_name_prefix="peer-send")
        self._listener: socket.socket | None = None

    @property
    def readers(self) -> list[str]:
        """Nodes that are connected to read here."""
        return sorted(reader.hello.node for reader in self._readers.values())

    @property
    def port(self) -> int:
        assert self._listener is not None, "bind first"
        return int(self._listener.getsockname()[1])

    def bind(self, host: str, port: int) -> None:
        """Raises PeerSocketError."""
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise PeerSocketError(
                f"cannot listen for peers on {host} port {port}: {error}; change peers.host or "
                "peers.port"
            ) from error
        self._listener.setblocking(False)

    def announce(self, arena: RemoteArena | None) -> None:
        """How NIXL readers read from now on; None: they cannot."""
        self._arena = NO_ARENA if arena is None else arena
        for reader in self._readers.values():
            if not reader.writer.is_closing():
                reader.writer.write(encode(wire.Serves(self._arena)))

    async def serve(self) -> None:
        """Accept until cancelled, then close every connection."""
        assert self._listener is not None, "bind first"
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # out of file descriptors, most likely
                    self._meter.error("peer_accept", "os")
                    _log.error("cannot_accept_peer", reason=str(error))
                    await asyncio.sleep(ACCEPT_RETRY_S)
                    continue
                if len(self._tasks) >= CONNECTIONS_MAX:
                    self._meter.error("peer_accept", "too_many_connections")
                    sock.close()
                    continue
                task = loop.create_task(self._connection(sock))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                # Not at its end within: a task that is cancelled before it began has none.
                task.add_done_callback(partial(_close, sock))
        finally:
            self._listener.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._senders.shutdown()

    # -- below ---------------------------------------------------------------------------

    async def _connection(self, sock: socket.socket) -> None:
        """One connection's life, whatever it ends of."""
        kind = "handshake"
        try:
            sock.setblocking(False)
            wire.tune(sock)
            async with asyncio.timeout(GREET_TIMEOUT_S):
                hello = await self._greet(sock)
            kind = "protocol"
            if hello.role == wire.CONTROL:
                await self._control(sock, hello)
            else:
                await self._data(sock, hello)
        except _Refusal as refusal:
            self._meter.error("peer_connection", "refused")
            _log.warning("peer_refused", reason=str(refusal))
            with contextlib.suppress(OSError):
                sock.send(encode(wire.Refused(str(refusal))))
        except FrameError as error:
            self._meter.error("peer_connection", kind)
            _log.warning("peer_connection_broken", reason=str(error))
        except (OSError, TimeoutError) as error:
            self._meter.error("peer_connection", "lost")
            _log.info("peer_connection_lost", reason=str(error) or type(error).__name__)

    async def _greet(self, sock: socket.socket) -> wire.Hello:
        nonce, bodies = wire.new_nonce(), list[bytes]()
        await wire.say(sock, wire.Challenge(wire.VERSION, self._dram.arena.epoch, nonce))
        body = await wire.next_body(sock, FrameReader(wire.GREETING_BYTES_MAX), bodies)
        hello = wire.decode_from_reader(body)
        if not isinstance(hello, wire.Hello) or bodies or len(hello.node) > NODE_LENGTH_MAX:
            raise FrameError(f"expected one hello, got {type(hello).__name__}")
        if hello.version != wire.VERSION:
            raise _Refusal(f"protocol {hello.version} is not {wire.VERSION}: upgrade both sides")
        if not wire.is_proof(hello.proof, self._token, "reader", nonce):
            raise _Refusal("its peers.token is not this node's")
        if hello.role not in {wire.CONTROL, wire.DATA}:
            raise _Refusal(f"unknown role {hello.role!r}")
        if hello.role == wire.DATA and hello.session not in self._readers:
            raise _Refusal("its control connection is gone")
        return hello

    def _welcome(self, hello: wire.Hello, session: bytes) -> wire.Welcome:
        arena = self._dram.arena
        proof = wire.proof(self._token, "owner", hello.nonce)
        return wire.Welcome(self._node, arena.epoch, session, arena.capacity_bytes, proof)

    async def _control(self, sock: socket.socket, hello: wire.Hello) -> None:
        stream, writer = await asyncio.open_connection(sock=sock)
        session = secrets.token_bytes(16)
        reader = _Reader(hello, Borrower(self.office), writer)
        self._readers[session] = reader
        following = self._contents.follow(self._dram)
        telling: asyncio.Task[None] | None = None
        _log.info("peer_joined", node=hello.node)
        try:
            await reader.say(self._welcome(hello, session))
            await reader.say(wire.Serves(self._arena))
            telling = asyncio.create_task(self._tell(reader, following))
            frames = FrameReader(wire.FRAME_BYTES_MAX)
            while data := await stream.read(wire.GREETING_BYTES_MAX):
                for body in frames.feed(data):
                    await self._handle(reader, wire.decode_from_reader(body))
        finally:
            del self._readers[session]
            self._contents.leave(following)
            reader.borrower.leave()
            if telling is not None:
                telling.cancel()
            writer.transport.abort()
            _log.info("peer_left", node=hello.node)

    async def _tell(self, reader: _Reader, following: Following) -> None:
        """Until the connection ends; if it cannot be told, it ends here."""
        try:
            while not following.is_lost:
                for message in await following.next():
                    await reader.say(message)
                await asyncio.sleep(0)  # others' turn, in the middle of a long list
            self._meter.error("peer_connection", "too_slow")
        except (OSError, TimeoutError):
            self._meter.error("peer_connection", "unread")
        finally:
            reader.writer.transport.abort()

    async def _handle(self, reader: _Reader, message: wire.FromReader) -> None:
        match message:
            case wire.Claim():
                await reader.say(await reader.borrower.claim(message))
            case wire.Release():
                reader.borrower.release(message.number)
            case wire.Damaged():
                self._meter.error("peer_loan", "damaged")
                for key in split_keys(message.key)[:1]:
                    _log.warning("peer_says_damaged", node=reader.hello.node, key=key.hex())
                    await self._check(key)
                    self._contents.again([key])  # the reader has forgotten it
            case wire.Hello() | wire.Pull():
                raise FrameError(f"{type(message).__name__} on a control connection")

    async def _data(self, sock: socket.socket, hello: wire.Hello) -> None:
        await wire.say(sock, self._welcome(hello, hello.session))
        frames, bodies = FrameReader(wire.FRAME_BYTES_MAX), list[bytes]()
        while True:
            try:
                body = await wire.next_body(sock, frames, bodies)
            except ConnectionError:
                return  # it hung up
            message = wire.decode_from_reader(body)
            if not isinstance(message, wire.Pull):
                raise FrameError(f"{type(message).__name__} on a data connection")
            reader = self._readers.get(hello.session)
            used = None if reader is None else reader.borrower.use(message.number)
            if reader is None or used is None:
                await wire.say(sock, wire.Pulled(0))
                continue
            loan, views = used
            try:
                frame = memoryview(encode(wire.Pulled(sum(len(view) for view in views))))
                deadline = time.monotonic() + UNREAD_TIMEOUT_S
                loop = asyncio.get_running_loop()
                sending = loop.run_in_executor(
                    self._senders, send_all, sock, [frame, *views], deadline
                )
                await _ended(sending, sock)
            finally:
                reader.borrower.put_down(loan)
            sock.setblocking(False)


def _close(sock: socket.socket, _: asyncio.Task[None]) -> None:
    sock.close()


async def _ended(sending: asyncio.Future[None], sock: socket.socket) -> None:
    """Until nothing reads the views any more; a cancelled caller breaks the connection first."""

    async def wait() -> None:
        await sending

    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            await settled(wait())
        raise
