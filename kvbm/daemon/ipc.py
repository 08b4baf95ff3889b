"""The daemon's control socket: accepts engines of the same user, speaks `kvbm.protocol`.

A peer that breaks the protocol, floods its bounds or does not read loses
its connection, with a counter and a log line; nothing it sends can do more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from pathlib import Path
from typing import Final

import structlog

from kvbm.address import peer_of
from kvbm.meter import Meter
from kvbm.protocol import (
    VERSION,
    FrameError,
    FrameReader,
    FromDaemon,
    Hello,
    Refused,
    Welcome,
    decode_from_client,
    encode,
)
from kvbm.session import Refusal, Session, Sessions
from storage_tiers.arena import Arena, Slot

CONNECTIONS_MAX: Final = 4096
HELLO_TIMEOUT_S: Final = 5.0
ACCEPT_RETRY_S: Final = 0.2
LEAVING_POLL_S: Final = 0.01
HELLO_BYTES_MAX: Final = 1 << 16
UNREAD_BYTES_MAX: Final = 64 << 20

_log = structlog.get_logger("kvbm.ipc")


class SocketError(Exception):
    """The control socket cannot be made; the message says where and why."""


class _Connection(asyncio.Protocol):
    """One admitted peer: a member of a session, and the protocol of its transport."""

    def __init__(self, hello: Hello, sessions: Sessions, meter: Meter) -> None:
        self.hello = hello
        self.since = time.monotonic()
        self._sessions = sessions
        self._meter = meter
        self._frames = FrameReader()
        self._session: Session | None = None
        self._transport: asyncio.Transport | None = None
        self._early: list[FromDaemon] = []  # said to the peer before its welcome was sent
        self._is_closed = False
        self._is_violator = False  # nothing it says counts any more

    def join(self) -> Session:
        """Become a member. Raises Refusal."""
        self._session = self._sessions.join(self)
        return self._session

    def send(self, message: FromDaemon) -> None:
        transport = self._transport
        if transport is None:
            self._early.append(message)
        elif transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            self._violation("peer does not read its answers")
        elif not transport.is_closing():
            transport.write(encode(message))

    def close(self) -> None:
        self._is_closed = True
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        for message in self._early:
            self.send(message)
        self._early.clear()
        if self._is_closed:  # its engine ended while it was welcomed
            transport.close()

    def data_received(self, data: bytes) -> None:
        assert self._session is not None
        if self._is_violator:
            return
        try:
            for body in self._frames.feed(data):
                self._session.handle(self, decode_from_client(body))
        except FrameError as error:
            self._violation(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        _log.info("member_left", engine=self.hello.engine, role=self.hello.role)
        self._sessions.leave(self)

    def _violation(self, reason: str) -> None:
        self._meter.error("connection", "protocol")
        _log.warning("protocol_violation", engine=self.hello.engine, reason=reason)
        if self._transport is None:
            return
        if self.hello.role == "worker":
            # It may be writing to leased slots: they are free once it has hung up, which it
            # does when it sees the end of our side and its copy has ended.
            self._is_violator = True
            self._transport.write_eof()
        else:
            self._transport.abort()


class ControlSocket:
    """Listens while `serve` runs. `sessions` is called only from its event loop."""

    def __init__(
        self, path: Path, sessions: Sessions, arena: Arena, meter: Meter, uid: int | None = None
    ) -> None:
        self._path = path
        self._sessions = sessions
        self._arena = arena
        self._meter = meter
        self._uid = os.getuid() if uid is None else uid
        self._tasks: set[asyncio.Task[None]] = set()  # shaking hands
        self._transports: set[asyncio.Transport] = set()
        self._listener: socket.socket | None = None

    def bind(self) -> None:
        """Make the socket. Raises SocketError, also when another daemon listens there."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._path.exists():
                self._remove_stale()
        except OSError as error:
            raise SocketError(f"cannot listen on {self._path}: {error}") from error
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            mask = os.umask(0o177)
            try:
                listener.bind(str(self._path))
            finally:
                os.umask(mask)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise SocketError(f"cannot listen on {self._path}: {error}") from error
        listener.setblocking(False)
        self._listener = listener

    async def serve(self) -> None:
        """Accept until cancelled, then close every connection and remove the socket."""
        assert self._listener is not None, "bind first"
        listener, loop = self._listener, asyncio.get_running_loop()
        loop.add_reader(listener, self._accept)
        try:
            await loop.create_future()  # until cancelled
        finally:
            await self._stop_listening()
            for transport in self._transports:
                transport.close()

    async def send_away(self, deadline_s: float) -> list[Slot]:
        """Let nobody in any more and have every engine leave, its workers by answering a fence.

        Leased slots of engines that had not left at the deadline: they may still be written to.
        """
        await self._stop_listening()
        end = time.monotonic() + deadline_s
        self._sessions.end()
        while self._sessions.all and time.monotonic() < end:
            await asyncio.sleep(LEAVING_POLL_S)
        return [slot for session in self._sessions.all for slot in session.leased]

    # -- below ---------------------------------------------------------------------------

    async def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()
        self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        """One connection waits to be accepted."""
        if self._listener is None:
            return
        loop = asyncio.get_running_loop()
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of file descriptors, most likely
            self._meter.error("accept", "os")
            _log.error("cannot_accept", reason=str(error))
            loop.remove_reader(self._listener)
            loop.call_later(ACCEPT_RETRY_S, self._accept_again)
            return
        self._transports = {t for t in self._transports if not t.is_closing()}
        if len(self._tasks) + len(self._transports) >= CONNECTIONS_MAX:
            self._meter.error("accept", "too_many_connections")
            sock.close()
            return
        task = loop.create_task(self._admit(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept_again(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _remove_stale(self) -> None:
        if not stat.S_ISSOCK(self._path.lstat().st_mode):
            raise SocketError(f"{self._path} exists and is no socket: move it or change `socket`")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(self._path))
            except (ConnectionRefusedError, FileNotFoundError):
                self._path.unlink(missing_ok=True)
                return
        raise SocketError(f"another daemon listens on {self._path}: stop it or change `socket`")

    async def _admit(self, sock: socket.socket) -> None:
        """Shake hands with a new peer; from then on its transport's protocol has it."""
        loop = asyncio.get_running_loop()
        connection: _Connection | None = None
        is_admitted = False
        try:
            sock.setblocking(False)
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await self._greet(sock)
            connection = _Connection(hello, self._sessions, self._meter)
            session = connection.join()
            fds = [self._arena.fd] if hello.role == "worker" else []
            # A small first message on a fresh socket: it is sent whole or not at all.
            tenant = session.tenant
            welcome = encode(
                Welcome(VERSION, self._arena.epoch, session.number, tenant.salt, tenant.tag)
            )
            socket.send_fds(sock, [welcome], fds)
            protocol = connection
            transport, _ = await loop.create_unix_connection(lambda: protocol, sock=sock)
            is_admitted = True
            self._transports.add(transport)
            _log.info("member_joined", engine=hello.engine, role=hello.role, rank=hello.rank)
        except Refusal as refusal:
            self._meter.error("connection", "refused")
            _log.warning("peer_refused", reason=str(refusal))
            with contextlib.suppress(OSError):
                sock.send(encode(Refused(str(refusal))))
        except (FrameError, OSError, TimeoutError) as error:
            self._meter.error("connection", "handshake")
            _log.warning("handshake_failed", reason=str(error) or type(error).__name__)
        finally:
            if not is_admitted:
                sock.close()
                if connection is not None:
                    self._sessions.leave(connection)

    async def _greet(self, sock: socket.socket) -> Hello:
        frames = FrameReader(HELLO_BYTES_MAX)
        while True:
            data = await asyncio.get_running_loop().sock_recv(sock, HELLO_BYTES_MAX)
            if not data:
                raise FrameError("the peer left before its hello")
            for body in frames.feed(data):
                message = decode_from_client(body)
                if not isinstance(message, Hello):
                    raise FrameError(f"expected a hello, got {type(message).__name__}")
                # Asked last: a peer that is still talking would not hear the reason.
                uid = peer_of(sock).uid
                if uid != self._uid:
                    raise Refusal(f"user {uid} may not use the daemon of user {self._uid}")
                return message
