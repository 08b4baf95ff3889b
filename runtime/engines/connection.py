"""One connection to an engine's HTTP server: a request at a time, its answer as it arrives.

HTTP/1.1 as engines speak it. All that has arrived when the reader comes is one part, so a burst of
events costs one wake-up. A reader that does not come stops the engine at `UNREAD_BYTES_MAX`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import httptools

UNREAD_BYTES_MAX: Final = 256 << 10
_INTERIM: Final = range(100, 200)  # answers before the answer; the parser refuses a 101
_HAS_LENGTH: Final = frozenset((b"content-length", b"transfer-encoding"))


class Broken(Exception):
    """No answer, or no more of it, will come; says why."""


class EngineConnection(asyncio.Protocol):
    """`on_lost` is called once, when it can be used no more."""

    def __init__(self, on_lost: Callable[[EngineConnection], None]) -> None:
        self.status = 0  # 0: the answer's head has not come
        self.headers: list[tuple[bytes, bytes]] = []  # names in lower case
        self.is_over = True  # all of the answer has come
        self.silent_ticks = 0  # counted by the pool while somebody waits
        self._loop = asyncio.get_running_loop()
        self._on_lost = on_lost
        self._parser: Any = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._unread_bytes = 0
        self._is_paused = False
        self._is_whole = True  # the parser cannot know that an answer to HEAD ends with its head
        self._has_length = False
        self._keeps = True
        self._broken: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def can_be_kept(self) -> bool:
        """For another request: nothing is left of the last one."""
        clear = self.is_over and not self._is_paused
        return clear and self._keeps and self._broken is None

    @property
    def is_awaited(self) -> bool:
        return self._waiter is not None

    def send(self, request: bytes, body: bytes, *, is_answered_whole: bool = True) -> None:
        """Head and body of a request. The last answer is over; this one may be a head alone."""
        self._is_whole = is_answered_whole
        self.status, self.headers, self.is_over = 0, [], False
        self._parts.clear()
        self._unread_bytes = 0
        self._transport.write(request + body if len(body) < UNREAD_BYTES_MAX else request)
        if len(body) >= UNREAD_BYTES_MAX:
            self._transport.write(body)

    async def head(self) -> None:
        """Until status and headers have come. Raises Broken."""
        while not self.status:
            await self._wait()

    async def part(self) -> bytes:
        """What has come of the body since; nothing at its end. Raises Broken."""
        while not self._parts:
            if self.is_over:
                return b""
            await self._wait()
        parts, self._parts, self._unread_bytes = self._parts, [], 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self, why: str = "closed") -> None:
        """At once, whatever is under way. Idempotent."""
        self._transport.abort()
        self._break(why)

    # -- called by asyncio ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self.silent_ticks = 0
        if self.is_over:
            self.close("it said something that was not asked for")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.close(f"its answer is no HTTP: {error}")
            return
        if self._unread_bytes > UNREAD_BYTES_MAX and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if error is None and self.status and not self._has_length:
            self.is_over = True
        self._break(str(error or "it closed the connection"))

    # -- called by the parser -------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_over:
            raise ValueError("an answer to nothing")
        self.headers = []
        self._has_length = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._has_length = self._has_length or name in _HAS_LENGTH
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status in _INTERIM:
            return
        self.status = status
        self._keeps = self._is_whole and self._parser.should_keep_alive()
        self.is_over = not self._is_whole

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)
        self._unread_bytes += len(data)

    def on_message_complete(self) -> None:
        self.is_over = bool(self.status)

    # -- within ---------------------------------------------------------------------------

    async def _wait(self) -> None:
        if self._broken is not None:
            raise Broken(self._broken)
        assert self._waiter is None, "an answer has one reader"
        self.silent_ticks = 0
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
            self._on_lost(self)
            self._wake()
