"""Comments in streams that have nothing to say for long, so that nothing on the way ends them.

Lines of a stream of events that begin with a colon say nothing (WHATWG HTML, section 9.2.6);
clients pass over them. They go between events, never into one that is half sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Self

from frontend.respond import Reply

COMMENT: Final = b": keep-alive\n\n"
EVENT_STREAM: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)
_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")

Head = Sequence[tuple[bytes, bytes]]


class KeepAlive:
    """Sees to it that no stream is silent for longer than `every_s`; 0: any may be.

    One timer looks at all of them at each half of `every_s`, whether what was sent last is what it
    had been. So a stream costs its coming and going, and an event nothing.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._watched: set[_Watched] = set()
        self._is_looking = False

    def watching(self, reply: Reply, opening: Callable[[], Head | None]) -> _Watched:
        """A context for as long as a stream lasts, or is waited for.

        `opening`: headers to begin it with if it has not begun; None while it must not begin.
        """
        return _Watched(self, reply, opening)

    def add(self, watched: _Watched) -> None:
        if not self._every_s:
            return
        self._watched.add(watched)
        if not self._is_looking:
            self._is_looking = True
            self._look_later()

    def remove(self, watched: _Watched) -> None:
        self._watched.discard(watched)

    def _look_later(self) -> None:
        asyncio.get_running_loop().call_later(self._every_s / 2, self._look)

    def _look(self) -> None:
        for watched in self._watched:
            watched.look()
        if self._watched:
            self._look_later()
        else:
            self._is_looking = False


class _Watched:
    __slots__ = ("_keeper", "_opening", "_over", "_quiet", "_reply", "_saying", "_seen")

    def __init__(self, keeper: KeepAlive, reply: Reply, opening: Callable[[], Head | None]) -> None:
        self._keeper = keeper
        self._reply = reply
        self._opening = opening
        self._seen: object = self  # no part of a stream: the first look finds a change
        self._quiet = 0  # looks in a row that found nothing new
        self._over = False
        self._saying: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._keeper.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._keeper.remove(self)

    def look(self) -> None:
        latest = self._reply.latest
        self._quiet = self._quiet + 1 if latest is self._seen else 0
        self._seen = latest
        if self._quiet % 2:
            self._saying = asyncio.ensure_future(self._say())

    async def _say(self) -> None:
        reply = self._reply
        if self._over:
            return
        if reply.status is None:
            head = self._opening()
            if head is None:
                return
            await reply.begin(200, head)
        # What is sent is in the order of the calls, also where the client reads too slowly.
        if reply.latest is None or reply.latest.endswith(_EVENT_ENDS):
            await reply.comment(COMMENT)


NEVER: Final = KeepAlive(0.0)
