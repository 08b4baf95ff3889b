"""What both ends of a session do: frames in and out, keep-alive, and one ending.

A session lives on a `Link`, which moves bytes in order and says when it is full or broken. Frames
written within one turn of the event loop go out together. Each side asks at intervals whether the
other is there and ends the session when nothing at all came for `silence_max`; a turn in which this
process itself was held up counts as one interval, however long it was.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from runtime.requests.settings import RequestPlaneSettings
from runtime.requests.wire import (
    LENGTH_BYTES,
    VERSION,
    Bye,
    Frame,
    FrameError,
    FrameReader,
    Hello,
    Ping,
    Pong,
    encode,
)

GATHER_BYTES_MAX: Final = 64 << 10  # more than this is written at once
UNSENT_BYTES_MAX: Final = 2 << 20  # a peer that lets this much wait besides one frame is gone

_log = structlog.get_logger()


class Link(Protocol):
    """Bytes to the other side. It calls the session's `received`, `pause`, `resume`, `lost`."""

    @property
    def peer(self) -> str:
        """Who is there, for logs."""
        ...

    @property
    def frame_bytes_max(self) -> int | None:
        """The largest frame it can carry, if it has a limit of its own."""
        ...

    def write(self, data: bytes | bytearray) -> None: ...

    def unsent_bytes(self) -> int: ...

    def close(self) -> None:
        """Send what is written, if the other side takes it soon, then end."""
        ...


class Session:
    """Subclasses say what frames mean (`take`) and what the end means (`ended`)."""

    def __init__(
        self,
        link: Link,
        settings: RequestPlaneSettings,
        name: str,
        on_end: Callable[[Session], None],
    ) -> None:
        self.link = link
        self.settings = settings
        self.name = name
        self.hello: Hello | None = None  # the other side's
        self.reason: str | None = None  # why it ended; None while it lives
        self.broke_rules = False  # the other side did
        self.room = asyncio.Event()  # the link takes more
        self.room.set()
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        limit = settings.frame_max
        self._takes_bytes_max = min(limit, link.frame_bytes_max or limit)
        self._reader = FrameReader(self._takes_bytes_max)
        self._gathered = bytearray()
        self._heard = True
        self._silent_intervals = 0
        self._timer = self._loop.call_later(settings.ping_interval, self._tick)

    @property
    def sends_bytes_max(self) -> int:
        """The largest frame that may be sent."""
        assert self.hello is not None
        return min(self._takes_bytes_max, self.hello.frame_bytes_max)

    def excess_of(self, data: bytearray, payload: bytes) -> str | None:
        """What is wrong with the size of this encoded frame that carries the payload."""
        over_bytes = len(data) - LENGTH_BYTES - self.sends_bytes_max
        if over_bytes <= 0:
            return None
        return f"{len(payload)} bytes; at most {max(0, len(payload) - over_bytes)} may be"

    def say_hello(self) -> None:
        self.send(Hello(VERSION, self._takes_bytes_max, self.name))

    def send(self, frame: Frame) -> None:
        if self.reason is None:
            self.write(encode(frame))

    def write(self, data: bytearray) -> None:
        """Send an encoded frame. Never waits: who sends much waits for `room` before."""
        if self.reason is not None:
            return
        if len(self._gathered) + len(data) >= GATHER_BYTES_MAX:
            self._flush()
            self._put(data)
            return
        if not self._gathered:
            self._loop.call_soon(self._flush)
        self._gathered += data

    def close(self, reason: str) -> None:
        """End it from this side and tell the other why. Idempotent."""
        if self.reason is None:
            self.send(Bye(reason))
            self._flush()
            self.lost(reason)
            self.link.close()

    # -- called by the link ---------------------------------------------------------------

    def received(self, data: bytes) -> None:
        if self.reason is not None:
            return
        self._heard = True
        try:
            for frame in self._reader.feed(data):
                self._dispatch(frame)
                if self.reason is not None:
                    return
        except FrameError as error:
            self._refuse(str(error))

    def pause(self) -> None:
        self.room.clear()

    def resume(self) -> None:
        self.room.set()

    def lost(self, reason: str) -> None:
        """The link is of no more use. Idempotent."""
        if self.reason is not None:
            return
        self.reason = reason
        self._timer.cancel()
        self.room.set()
        self.ended(reason)
        self._on_end(self)

    # -- for subclasses -------------------------------------------------------------------

    def greeted(self) -> None:
        """The other side's Hello has come."""
        raise NotImplementedError

    def take(self, frame: Frame) -> None:
        """A frame other than those that both sides send; raises FrameError."""
        raise NotImplementedError

    def ended(self, reason: str) -> None:
        raise NotImplementedError

    # -- within ---------------------------------------------------------------------------

    def _dispatch(self, frame: Frame) -> None:
        match frame:
            case Hello():
                if self.hello is not None:
                    raise FrameError("a second Hello")
                if frame.version != VERSION:
                    raise FrameError(f"version {frame.version}; this is version {VERSION}")
                self.hello = frame
                self.greeted()
            case Bye():
                self.lost(f"{self.link.peer} closed it: {frame.reason}")
                self.link.close()
            case _ if self.hello is None:
                raise FrameError(f"{type(frame).__name__} before Hello")
            case Ping():
                self.send(Pong())
            case Pong():
                pass
            case _:
                self.take(frame)

    def _refuse(self, reason: str) -> None:
        self.broke_rules = True
        _log.warning("request_session_refused", peer=self.link.peer, reason=reason)
        self.close(f"{self.link.peer} broke the rules: {reason}")

    def _flush(self) -> None:
        if not self._gathered:
            return
        data, self._gathered = self._gathered, bytearray()
        self._put(data)

    def _put(self, data: bytearray) -> None:
        if self.link.unsent_bytes() > UNSENT_BYTES_MAX + self.settings.frame_max:
            self.broke_rules = True
            self.lost(f"{self.link.peer} does not read what it is sent")
            self.link.close()
            return
        self.link.write(data)

    def _tick(self) -> None:
        interval_s = self.settings.ping_interval
        self._silent_intervals = 0 if self._heard else self._silent_intervals + 1
        self._heard = False
        if self._silent_intervals >= math.ceil(self.settings.silence_max / interval_s):
            silent_s = self._silent_intervals * interval_s
            self.lost(f"{self.link.peer} said nothing for {silent_s:g} s")
            self.link.close()
            return
        if self.hello is not None:
            self.send(Ping())
        self._timer = self._loop.call_later(interval_s, self._tick)
