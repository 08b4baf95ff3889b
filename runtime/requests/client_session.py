"""A client's session with one server: many streams over one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from runtime.requests.errors import (
    ConnectionLost,
    PayloadTooLarge,
    error_of,
)
from runtime.requests.session import Link, Session
from runtime.requests.settings import RequestPlaneSettings
from runtime.requests.stream import Call
from runtime.requests.wire import Cancel, End, Frame, FrameError, Grant, Item, Open, Stop, encode


class ClientSession(Session):
    def __init__(
        self,
        link: Link,
        settings: RequestPlaneSettings,
        name: str,
        on_end: Callable[[Session], None],
    ) -> None:
        super().__init__(link, settings, name, on_end)
        self.ready = asyncio.Event()  # greeted, or ended
        self._calls: dict[int, Call] = {}
        self._last_stream = 0

    @property
    def calls_count(self) -> int:
        return len(self._calls)

    def greeted(self) -> None:
        self.ready.set()

    async def open(
        self, call: Call, endpoint: str, payload: bytes, headers: Mapping[str, str], end_s: float
    ) -> None:
        """Send the request; waits while the link is full. Raises RequestError; `end_s` is when the
        caller's patience ends, on the loop's clock."""
        while self.reason is None and not self.room.is_set():
            await self.room.wait()
        if self.reason is not None:
            raise ConnectionLost(self.reason)
        if call.ended:
            return
        stream = self._last_stream + 1
        timeout_s = max(0.0, end_s - self._loop.time())
        data = encode(Open(stream, endpoint, payload, dict(headers), timeout_s, call.window_bytes))
        excess = self.excess_of(data, payload)
        if excess is not None:
            raise PayloadTooLarge(f"a request of {excess}")
        self._last_stream = stream
        self._calls[stream] = call
        call.driver = _StreamDriver(self, stream, call)
        self.write(data)

    def take(self, frame: Frame) -> None:
        match frame:
            case Item():
                call = self._known(frame.stream)
                if call is not None:
                    if call.ungranted_bytes >= call.window_bytes:
                        raise FrameError(f"stream {frame.stream} sent more than it was granted")
                    call.deliver(frame.payload)
            case End():
                call = self._known(frame.stream)
                if call is not None:
                    del self._calls[frame.stream]
                    call.finish(error_of(frame.outcome, frame.message))
            case _:
                raise FrameError(f"{type(frame).__name__} from a server")

    def ended(self, reason: str) -> None:
        self.ready.set()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.finish(ConnectionLost(reason))

    def cancel_stream(self, stream: int) -> None:
        if self._calls.pop(stream, None) is not None:
            self.send(Cancel(stream))

    def _known(self, stream: int) -> Call | None:
        """None for one that was cancelled here while the server still sent."""
        if stream > self._last_stream:
            raise FrameError(f"stream {stream} was never opened")
        return self._calls.get(stream)


class _StreamDriver:
    """Grants anew what the reader has taken, half a window at a time."""

    def __init__(self, session: ClientSession, stream: int, call: Call) -> None:
        self._session = session
        self._stream = stream
        self._call = call
        self._taken_bytes = 0

    def taken(self, size_bytes: int) -> None:
        self._taken_bytes += size_bytes
        if 2 * self._taken_bytes >= self._call.window_bytes:
            self._session.send(Grant(self._stream, self._taken_bytes))
            self._call.ungranted_bytes -= self._taken_bytes
            self._taken_bytes = 0

    def stop(self) -> None:
        self._session.send(Stop(self._stream))

    def cancel(self) -> None:
        self._session.cancel_stream(self._stream)
