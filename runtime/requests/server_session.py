"""One client's session at a server: its streams, and what each may send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from runtime.requests.dispatch import Dispatcher, Request, Running
from runtime.requests.errors import Outcome, PayloadTooLarge
from runtime.requests.session import Link, Session
from runtime.requests.settings import RequestPlaneSettings
from runtime.requests.wire import (
    ITEM_COST_BYTES,
    Cancel,
    End,
    Frame,
    FrameError,
    Grant,
    Item,
    Open,
    Stop,
    encode,
)


class ServerSession(Session):
    def __init__(
        self,
        link: Link,
        settings: RequestPlaneSettings,
        name: str,
        on_end: Callable[[Session], None],
        dispatcher: Dispatcher,
    ) -> None:
        super().__init__(link, settings, name, on_end)
        self._dispatcher = dispatcher
        self._streams: dict[int, StreamReply] = {}
        self._last_stream = 0

    def greeted(self) -> None:
        self.say_hello()

    def take(self, frame: Frame) -> None:
        match frame:
            case Open():
                self._open(frame)
            case Grant():
                reply = self._known(frame.stream)
                if reply is not None:
                    reply.grant(frame.size_bytes)
            case Stop():
                reply = self._known(frame.stream)
                if reply is not None and reply.running is not None:
                    reply.running.stop()
            case Cancel():
                reply = self._known(frame.stream)
                if reply is not None and reply.running is not None:
                    del self._streams[frame.stream]
                    reply.running.kill()
            case _:
                raise FrameError(f"{type(frame).__name__} from a client")

    def ended(self, reason: str) -> None:
        streams, self._streams = self._streams, {}
        for reply in streams.values():
            if reply.running is not None:
                reply.running.kill()

    def ended_stream(self, stream: int, outcome: Outcome, message: str) -> None:
        if self._streams.pop(stream, None) is not None:  # else nobody waits for it
            self.send(End(stream, outcome, message))

    def _open(self, frame: Open) -> None:
        if frame.stream <= self._last_stream:
            raise FrameError(f"stream {frame.stream} opened after {self._last_stream}")
        self._last_stream = frame.stream
        reply = StreamReply(self, frame.stream, frame.credit_bytes)
        self._streams[frame.stream] = reply
        timeout_s = min(frame.timeout_s, self.settings.timeout_max)
        request = Request(frame.endpoint, frame.payload, frame.headers, timeout_s)
        reply.running = self._dispatcher.open(request, reply)

    def _known(self, stream: int) -> StreamReply | None:
        """None for one that has ended, which its client cannot have known yet."""
        if stream > self._last_stream:
            raise FrameError(f"stream {stream} was never opened")
        return self._streams.get(stream)


class StreamReply:
    """Sends one stream's responses while its client has room for them."""

    def __init__(self, session: ServerSession, stream: int, credit_bytes: int) -> None:
        self.running: Running | None = None
        self._session = session
        self._stream = stream
        self._credit_bytes = credit_bytes
        self._granted: asyncio.Future[None] | None = None

    async def item(self, payload: bytes) -> None:
        session = self._session
        data = encode(Item(self._stream, payload))
        excess = session.excess_of(data, payload)
        if excess is not None:
            raise PayloadTooLarge(f"a response of {excess}")
        # Both may be over again when the other has come: the handler's deadline bounds this.
        while self._credit_bytes <= 0 or not session.room.is_set():
            if self._credit_bytes <= 0:
                self._granted = asyncio.get_running_loop().create_future()
                await self._granted
            else:
                await session.room.wait()
        self._credit_bytes -= len(payload) + ITEM_COST_BYTES
        session.write(data)

    def grant(self, size_bytes: int) -> None:
        self._credit_bytes += size_bytes
        if self._credit_bytes > 0 and self._granted is not None and not self._granted.done():
            self._granted.set_result(None)

    def end(self, outcome: Outcome, message: str) -> None:
        self._session.ended_stream(self._stream, outcome, message)
