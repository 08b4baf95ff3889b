"""Comments in a stream that has nothing to say for long, so that nothing on the way ends it.

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
    """While its context lasts, the client hears something every `every_s` at the latest.

    It costs a stream one timer, and its events nothing: at each half of `every_s` what was sent
    last is compared with what had been.
    """

    def __init__(self, reply: Reply, every_s: float, opening: Callable[[], Head | None]) -> None:
        """`every_s`: 0 for never. `opening`: headers to begin a stream with that has not begun;
        None while it must not begin.
        """
        self._reply = reply
        self._every_s = every_s
        self._opening = opening
        self._seen: object = self  # no part of a stream: the first look finds a change
        self._quiet = 0  # looks in a row that found nothing new
        self._over = False
        self._saying: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        if self._every_s:
            self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        if self._every_s:
            self._timer.cancel()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every_s / 2, self._look)

    def _look(self) -> None:
        latest = self._reply.latest
        self._quiet = self._quiet + 1 if latest is self._seen else 0
        self._seen = latest
        if self._quiet % 2:
            self._saying = asyncio.ensure_future(self._say())
        self._arm()

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
