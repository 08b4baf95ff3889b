"""A connection to the daemon that an engine keeps: one background thread, never blocking a caller.

The owner calls `send` from any thread; what the daemon says is handed to the owner's `Handler` on
the link's thread. A broken or refused connection is tried again for as long as the link lives,
with growing pauses; what was queued for the broken one is dropped, because it means nothing to the
next one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from kvbm.address import peer_of
from kvbm.protocol import (
    FrameError,
    FrameReader,
    FromClient,
    FromDaemon,
    Hello,
    Refused,
    Welcome,
    decode_from_daemon,
    encode,
)

OUTBOX_BYTES_MAX: Final = 32 << 20
CONNECT_TIMEOUT_S: Final = 2.0
WELCOME_TIMEOUT_S: Final = 5.0
RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 1.0
STEADY_S: Final = 5.0
_READ_BYTES: Final = 1 << 18

_logger = logging.getLogger("kvbm.link")


class Handler(Protocol):
    """What the link's owner does with events; all called on the link's thread, must not raise."""

    def connected(self, connection: int, welcome: Welcome, arena_fd: int | None) -> None: ...

    def received(self, message: FromDaemon) -> None: ...

    def disconnected(self) -> None: ...


class Link:
    """`start` it once, `close` it once. `hello` is asked for at each connection."""

    def __init__(self, path: str, hello: Callable[[], Hello], handler: Handler) -> None:
        self._path = path
        self._hello = hello
        self._handler = handler
        self._lock = threading.Lock()
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0
        self._open = False  # messages may be queued
        self._connection = 0  # counts connections, so that a message meets only the one it is for
        self._closing = threading.Event()
        self._drop = False  # the owner wants a new connection
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kvbm-link", daemon=True)
        self._last_problem = ""

    @property
    def problem(self) -> str:
        """Why the last connection attempt failed; empty while connected."""
        return self._last_problem

    def start(self) -> None:
        self._thread.start()

    def send(self, connection: int, message: FromClient) -> bool:
        """Queue a message for that connection. False if it is gone or its queue is full."""
        frame = encode(message)
        with self._lock:
            if not self._open or connection != self._connection:
                return False
            if self._outbox_bytes + len(frame) > OUTBOX_BYTES_MAX:
                # The daemon does not read, and it would miss what this says: start over.
                self._drop = True
                return False
            self._outbox.append(memoryview(frame))
            self._outbox_bytes += len(frame)
        self._wake()
        return True

    def reconnect(self) -> int:
        """Drop the connection, if any, and make a new one; the number of the last one made."""
        with self._lock:
            self._drop = self._open
            last = self._connection
        self._wake()
        return last

    def close(self) -> None:
        """End the connection and the thread; waits for it unless called on it."""
        self._closing.set()
        if self._thread.ident is None:  # it was never started
            self._wake_reader.close()
            self._wake_writer.close()
            return
        self._wake()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(timeout=5)

    # -- the link's thread ---------------------------------------------------------------

    def _run(self) -> None:
        pause_s = RETRY_S_MIN
        while not self._closing.is_set():
            began = time.monotonic()
            self._connect_and_serve()
            # A connection that breaks as soon as it stands must not be made again in a hurry.
            if time.monotonic() - began > STEADY_S:
                pause_s = RETRY_S_MIN
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, RETRY_S_MAX)
        self._wake_reader.close()
        self._wake_writer.close()

    def _connect_and_serve(self) -> None:
        """One connection's life."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        welcomed = False
        try:
            reader, early = self._shake_hands(sock)
            welcomed = True
            self._serve(sock, reader, early)
        except (OSError, FrameError) as error:
            self._note_problem(str(error) or type(error).__name__)
        finally:
            with self._lock:
                self._open = False
                self._drop = False
                self._outbox.clear()
                self._outbox_bytes = 0
            if welcomed:
                self._handler.disconnected()
            # Closed last: the daemon frees our leases when it sees the end of the stream, and
            # by then the owner must have stopped writing to them.
            sock.close()

    def _shake_hands(self, sock: socket.socket) -> tuple[FrameReader, list[bytes]]:
        sock.settimeout(CONNECT_TIMEOUT_S)
        sock.connect(self._path)
        uid = peer_of(sock).uid
        if uid != os.getuid():
            raise FrameError(f"it is user {uid}'s, not user {os.getuid()}'s as this engine is")
        sock.sendall(encode(self._hello()))
        sock.settimeout(WELCOME_TIMEOUT_S)
        reader = FrameReader()
        bodies: list[bytes] = []
        fds: list[int] = []
        try:
            while not bodies:
                data, received, _, _ = socket.recv_fds(sock, _READ_BYTES, 4)
                fds += received
                if not data:
                    raise FrameError("the daemon closed the connection before its welcome")
                bodies += reader.feed(data)
            welcome = decode_from_daemon(bodies.pop(0))
            if isinstance(welcome, Refused):
                raise FrameError(f"the daemon refused: {welcome.reason}")
            if not isinstance(welcome, Welcome):
                raise FrameError(f"expected a welcome, got {type(welcome).__name__}")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        for fd in fds[1:]:
            os.close(fd)
        with self._lock:
            self._open = True
            self._connection += 1
        self._last_problem = ""
        self._handler.connected(self._connection, welcome, fds[0] if fds else None)
        return reader, bodies

    def _serve(self, sock: socket.socket, reader: FrameReader, early: list[bytes]) -> None:
        for body in early:
            self._handler.received(decode_from_daemon(body))
        sock.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            selector.register(sock, selectors.EVENT_READ)
            while not self._closing.is_set() and not self._drop:
                wants = selectors.EVENT_READ
                if self._outbox:
                    wants |= selectors.EVENT_WRITE
                selector.modify(sock, wants)
                for key, events in selector.select():
                    if key.fileobj is self._wake_reader:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_reader.recv(_READ_BYTES)
                        continue
                    if events & selectors.EVENT_READ and not self._read(sock, reader):
                        raise FrameError("the daemon closed the connection")
                    if events & selectors.EVENT_WRITE:
                        self._write(sock)

    def _read(self, sock: socket.socket, reader: FrameReader) -> bool:
        data = sock.recv(_READ_BYTES)
        for body in reader.feed(data):
            self._handler.received(decode_from_daemon(body))
        return bool(data)

    def _write(self, sock: socket.socket) -> None:
        while True:
            with self._lock:
                if not self._outbox:
                    return
                frame = self._outbox[0]
            try:
                sent = sock.send(frame)
            except BlockingIOError:
                return
            with self._lock:
                self._outbox_bytes -= sent
                if sent == len(frame):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = frame[sent:]

    def _wake(self) -> None:
        # A full pipe means that the thread will wake anyway; a closed one that it has ended.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_writer.send(b"\0")

    def _note_problem(self, problem: str) -> None:
        if problem != self._last_problem:
            _logger.warning("kvbm-daemon at %s: %s; serving without it", self._path, problem)
        self._last_problem = problem
