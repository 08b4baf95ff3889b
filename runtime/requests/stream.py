"""The client's half of one request, the same for every kind.

A `Call` is what the plane fills; a `ResponseStream` is what the caller reads. The plane holds only
the call, so a stream that its reader forgets is noticed and cancelled like one that is closed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, Self

from runtime.requests.errors import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    RequestError,
)
from runtime.requests.wire import ITEM_COST_BYTES


class Driver(Protocol):
    """How a call reaches its server; none of these waits."""

    def taken(self, size_bytes: int) -> None:
        """The reader has taken this much; to be subtracted from `ungranted_bytes` when granted."""
        ...

    def stop(self) -> None: ...

    def cancel(self) -> None:
        """The call has ended here; the server's part should too."""
        ...


class Call:
    """Responses that came and were not read yet: at most `window_bytes` and one response."""

    def __init__(self, target: str, window_bytes: int) -> None:
        self.target = target
        self.window_bytes = window_bytes
        self.received_items = 0
        self.driver: Driver | None = None  # set when the request is sent
        self.ungranted_bytes = 0  # delivered, and the server not told that there is room again
        self.ended = False
        self.error: RequestError | None = None  # how it ended, if not well
        self._items: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def deliver(self, payload: bytes) -> None:
        """Called by the plane, which sees to it that `ungranted_bytes` are below the window."""
        if self.ended:
            return
        self.received_items += 1
        self.ungranted_bytes += len(payload) + ITEM_COST_BYTES
        self._items.append(payload)
        self._wake()

    def finish(self, error: RequestError | None) -> None:
        """No more will come. What is held is read first; only the first ending counts."""
        if self.ended:
            return
        self.ended = True
        if error is not None:
            error.target = self.target
            error.received_items = self.received_items
            if isinstance(error, ConnectionLost) and self.driver is not None:
                error.was_sent = True
        self.error = error
        self._wake()

    def stop(self) -> None:
        if not self.ended and self.driver is not None:
            self.driver.stop()

    def cancel(self, error: RequestError) -> None:
        """End it on both sides."""
        if not self.ended:
            self.finish(error)
            if self.driver is not None:
                self.driver.cancel()

    def discard(self) -> None:
        """Cancel it, and forget what was not read."""
        self.cancel(Cancelled("the caller closed the stream"))
        self._items.clear()

    async def take(self) -> bytes:
        """The next response; raises how it ended when there are no more. One reader at a time."""
        if not self._items:
            await self._arrived()
        payload = self._items.popleft()
        if not self.ended and self.driver is not None:
            self.driver.taken(len(payload) + ITEM_COST_BYTES)
        return payload

    async def take_all(self) -> list[bytes]:
        """The next responses, as many as have come; else as `take`."""
        if not self._items:
            await self._arrived()
        payloads = list(self._items)
        self._items.clear()
        if not self.ended and self.driver is not None:
            self.driver.taken(sum(map(len, payloads)) + ITEM_COST_BYTES * len(payloads))
        return payloads

    async def _arrived(self) -> None:
        while not self._items:
            if self.ended:
                raise StopAsyncIteration if self.error is None else self.error
            assert self._waiter is None, "a stream has one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ResponseStream:
    """One request's responses: an async iterator, and a context manager that cancels on leaving.

    Iteration ends when the handler has, and raises a RequestError if that was not well. Leaving it
    early, by `aclose`, `async with`, or by dropping the stream, cancels the handler.
    """

    def __init__(
        self, request_id: str, call: Call, send: Callable[[Call], Awaitable[None]], timeout_s: float
    ) -> None:
        """`send` sends the request and sets the call's driver, or raises RequestError."""
        self.request_id = request_id
        self._call = call
        self._send = send
        self._timeout_s = timeout_s
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def received_items(self) -> int:
        return self._call.received_items

    def stop(self) -> None:
        """Ask the handler to come to its end; what it still yields is read as before."""
        self._call.stop()

    async def aclose(self) -> None:
        """End it; the handler is cancelled if it still runs. Idempotent."""
        self._leave()

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._deadline is None:
            await self._begin()
        return await self._call.take()

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """The same, as many at a time as have come: a burst costs one wake-up."""
        while True:
            if self._deadline is None:
                await self._begin()
            try:
                found = await self._call.take_all()
            except StopAsyncIteration:
                return
            yield found

    def __del__(self) -> None:
        if self._deadline is not None:
            self._leave()

    async def _begin(self) -> None:
        """Send it; an error is raised here and by every later read."""
        call = self._call
        if call.ended or self._deadline is not None:
            return
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._timeout_s
        # The timer knows the call, not the stream: else no forgotten stream were ever noticed.
        self._deadline = loop.call_at(end_s, call.cancel, DeadlineExceeded())
        try:
            async with asyncio.timeout_at(end_s):
                await self._send(call)
        except RequestError as error:
            call.finish(error)
        except TimeoutError:
            call.finish(DeadlineExceeded("before the request could be sent"))
        except asyncio.CancelledError:
            self._leave()
            raise
        if call.error is not None:
            raise call.error

    def _leave(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._call.discard()
