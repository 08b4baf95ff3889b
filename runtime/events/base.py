"""The event plane: small messages from one program to all that listen, at most a moment late.

A plane carries bytes on dotted subjects. Publishing costs the caller a queue append: it never
waits, never raises, and says by its return value whether the message was taken. Delivery is not
guaranteed; a message may be lost (counted where it is known) or, over a reconnect, come twice.
What must survive that carries an epoch and a sequence, as block events do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final, Protocol, Self, runtime_checkable

SUBSCRIPTION_MESSAGES: Final = 4096


@dataclass(frozen=True, slots=True)
class Message:
    subject: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class PlaneStatus:
    kind: str
    connected: bool
    error: str | None  # why it is not connected
    published_total: int
    dropped_total: int
    queued: int
    queue_limit: int
    missed_total: int = 0  # known, by their numbers, to have been lost on their way here
    malformed_total: int = 0  # what came and was no message
    unconfirmed_total: int = 0  # sent, but not known to be kept (`nats_durable`)
    faults_total: int = 0  # of ours or the library's, after which it began anew


class EventPlane(Protocol):
    """All methods are called from one event loop."""

    async def start(self) -> None:
        """Begin to work; returns at once, whether the other side can be reached or not."""
        ...

    async def close(self) -> None:
        """Send what is queued if that is quick, then stop. Idempotent."""
        ...

    def publish(self, subject: str, payload: bytes) -> bool:
        """Queue a message; False if it was dropped. Never blocks, never raises."""
        ...

    def subscribe(self, subject: str, limit: int = SUBSCRIPTION_MESSAGES) -> Subscription:
        """Messages from now on whose subject matches; `*` is one token, a final `>` the rest."""
        ...

    def status(self) -> PlaneStatus: ...


@runtime_checkable
class SupportsPeers(Protocol):
    """A plane without a broker: each program listens to the others' own addresses."""

    @property
    def address(self) -> str | None:
        """Where this one publishes, once it is known; with the wildcard host if bound to one."""
        ...

    async def bound(self) -> str:
        """`address`, as soon as it is known: it may be taken when the plane starts."""
        ...

    def add_peer(self, address: str) -> None:
        """Listen to a publisher from now on, also if it comes later. Idempotent."""
        ...

    def remove_peer(self, address: str) -> None:
        """Listen no more. Idempotent."""
        ...


class HistoryUnavailable(Exception):
    """What was published cannot be read again, or not to its end; the message says why."""


@runtime_checkable
class SupportsHistory(Protocol):
    """A plane that keeps some of what is published, for those who were away."""

    def history(self, subject: str, since_s: float) -> AsyncGenerator[Message, None]:
        """What was published since then (in seconds since 1970) and is kept, in its order.

        It ends with what was there when it was asked: who subscribes first and then reads this
        misses nothing, and gets what came in between twice. How long messages are kept is the
        settings' to say, the time is the server's. Raises HistoryUnavailable.
        """
        ...


class Subscription:
    """Messages of one subscriber, as an async iterator that ends when it is closed.

    Holds at most `limit` messages: when more wait, the oldest are dropped and counted.
    """

    def __init__(self, subject: str, limit: int, on_close: Callable[[Subscription], None]) -> None:
        assert limit > 0
        self.subject = subject
        self.dropped_total = 0
        self.active = asyncio.Event()  # the plane delivers; set and cleared by the plane
        self._messages: deque[Message] = deque(maxlen=limit)
        self._arrived = asyncio.Event()
        self._on_close = on_close
        self._closed = False

    def deliver(self, message: Message) -> None:
        """Called by the plane."""
        if self._closed:
            return
        if len(self._messages) == self._messages.maxlen:
            self.dropped_total += 1
        self._messages.append(message)
        self._arrived.set()

    def close(self) -> None:
        """End the iteration after what is held. Idempotent."""
        if not self._closed:
            self._closed = True
            self._arrived.set()
            self._on_close(self)

    async def take(self, limit: int) -> list[Message]:
        """What is held, `limit` at most and at least one; none once it is closed."""
        assert limit > 0
        while not self._messages:
            if self._closed:
                return []
            self._arrived.clear()
            await self._arrived.wait()
        return [self._messages.popleft() for _ in range(min(limit, len(self._messages)))]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        found = await self.take(1)
        if not found:
            raise StopAsyncIteration
        return found[0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def matches(pattern: str, subject: str) -> bool:
    """NATS's rules: `*` matches one token, `>` at the end one or more."""
    wanted = pattern.split(".")
    given = subject.split(".")
    for index, part in enumerate(wanted):
        if part == ">":
            return index == len(wanted) - 1 and len(given) > index
        if index >= len(given) or part not in {"*", given[index]}:
            return False
    return len(wanted) == len(given)
