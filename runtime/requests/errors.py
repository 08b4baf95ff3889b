"""What can become of a request, as a closed tree that callers match on.

    RequestError              `received_items`: responses that came before; 0 means none did
    ├── UnknownEndpoint       nothing of that name is served at the address
    ├── Draining              the server finishes what it has and takes nothing new
    ├── Overloaded            the server, or this client, has as much in flight as it may
    ├── PayloadTooLarge       a request or a response is over the limit
    ├── DeadlineExceeded      the time given is over, on whichever side noticed first
    ├── Cancelled             ended early, by the caller or by the server that stops
    ├── HandlerFailed         the handler raised; the message is the handler's
    └── ConnectionLost        no connection, or it broke; `was_sent` tells whether the request left

`may_retry` says that no handler can have begun on the request: it may be sent elsewhere even if
it must not run twice. Where it is false and `received_items` is 0, nothing was seen of the answer,
but the handler may have run.
"""

from __future__ import annotations

import enum
from typing import ClassVar, Final

MESSAGE_CHARACTERS_MAX: Final = 4096


class Outcome(enum.StrEnum):
    """How a stream ended, as it stands on the wire."""

    DONE = "done"
    UNKNOWN_ENDPOINT = "unknown_endpoint"
    DRAINING = "draining"
    OVERLOADED = "overloaded"
    TOO_LARGE = "too_large"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    FAILED = "failed"


class RequestError(Exception):
    """Any of the errors above; `target` is the endpoint and address, as far as they are known."""

    outcome: ClassVar[Outcome | None] = None  # ConnectionLost has none: nobody can send it
    sentence: ClassVar[str] = "the request failed"

    def __init__(self, detail: str = "", *, target: str = "", received_items: int = 0) -> None:
        self.detail = detail
        self.target = target
        self.received_items = received_items
        super().__init__(detail)

    @property
    def may_retry(self) -> bool:
        return False

    def __str__(self) -> str:
        after = f" after {self.received_items} responses" if self.received_items else ""
        parts = [self.target, self.sentence + after, self.detail]
        return ": ".join(part for part in parts if part)


class UnknownEndpoint(RequestError):
    outcome = Outcome.UNKNOWN_ENDPOINT
    sentence = "nothing is served there by this name"

    @property
    def may_retry(self) -> bool:
        return True


class Draining(RequestError):
    outcome = Outcome.DRAINING
    sentence = "the server is draining"

    @property
    def may_retry(self) -> bool:
        return True


class Overloaded(RequestError):
    """Raised by a handler it may come after work was done, but never after a response."""

    outcome = Outcome.OVERLOADED
    sentence = "too much is in flight"

    @property
    def may_retry(self) -> bool:
        return self.received_items == 0


class PayloadTooLarge(RequestError):
    outcome = Outcome.TOO_LARGE
    sentence = "a payload is over the limit"


class DeadlineExceeded(RequestError):
    outcome = Outcome.DEADLINE
    sentence = "the deadline is over"


class Cancelled(RequestError):
    outcome = Outcome.CANCELLED
    sentence = "it was cancelled"


class HandlerFailed(RequestError):
    outcome = Outcome.FAILED
    sentence = "the handler failed"


class ConnectionLost(RequestError):
    sentence = "the connection was lost"

    def __init__(
        self,
        detail: str = "",
        *,
        target: str = "",
        received_items: int = 0,
        was_sent: bool = False,
    ) -> None:
        super().__init__(detail, target=target, received_items=received_items)
        self.was_sent = was_sent

    @property
    def may_retry(self) -> bool:
        return not self.was_sent


_BY_OUTCOME: Final[dict[Outcome, type[RequestError]]] = {
    Outcome.UNKNOWN_ENDPOINT: UnknownEndpoint,
    Outcome.DRAINING: Draining,
    Outcome.OVERLOADED: Overloaded,
    Outcome.TOO_LARGE: PayloadTooLarge,
    Outcome.DEADLINE: DeadlineExceeded,
    Outcome.CANCELLED: Cancelled,
    Outcome.FAILED: HandlerFailed,
}


def error_of(outcome: Outcome, detail: str) -> RequestError | None:
    """The error a stream ends with; None if it ended well."""
    return None if outcome is Outcome.DONE else _BY_OUTCOME[outcome](detail)
