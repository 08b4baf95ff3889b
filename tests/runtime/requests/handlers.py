"""Handlers that the tests of the request plane serve, and how they look at what became of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from runtime.requests import RequestContext, RequestServer

WAIT_S = 60.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


class Handlers:
    """`begun`, `ended`: how often a handler began, and how often its `finally` ran."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.yielded = 0
        self.contexts: list[RequestContext] = []

    def serve(self, server: RequestServer) -> None:
        server.serve("test.echo.once", self.echo)
        server.serve("test.count.to", self.count)
        server.serve("test.wait.forever", self.forever)
        server.serve("test.until.stopped", self.until_stopped)
        server.serve("test.raise.after", self.raise_after)
        server.serve("test.many.bytes", self.many_bytes)
        server.serve("test.one.large", self.one_large)
        server.serve("test.not.bytes", self.not_bytes)

    async def echo(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        self.contexts.append(context)
        yield payload

    async def count(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        """As many items as the payload says, without ever waiting for anything itself."""
        for number in range(int(payload)):
            yield b"%d" % number

    async def forever(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        """One item, then nothing until it is cancelled; its clean-up takes a while."""
        self.begun += 1
        self.contexts.append(context)
        try:
            yield b"begun"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)
            self.ended += 1

    async def until_stopped(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        yield b"begun"
        await context.stopped.wait()
        yield b"killed" if context.killed.is_set() else b"stopped"

    async def raise_after(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        for number in range(int(payload)):
            yield b"%d" % number
        raise ValueError("the handler's own words")

    async def many_bytes(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        """Items of 10 kB until it is cancelled."""
        self.begun += 1
        try:
            while True:
                self.yielded += 1
                yield b"x" * 10_000
        finally:
            self.ended += 1

    async def one_large(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        yield b"first"
        yield b"x" * int(payload)

    async def not_bytes(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        yield "text"  # type: ignore[misc]


async def deaf(payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
    """Swallows its cancellation and goes on."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        try:
            yield b"x"
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            continue
