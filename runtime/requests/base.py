"""The request plane: a payload goes to an endpoint at an address, a stream of payloads comes back.

An endpoint is a dotted name (`namespace.component.endpoint`), an address a string that a server
gave out when it started, such as `tcp://host:port`; who serves what where is discovery's business.
Every kind keeps the same promises: responses come in order and none is lost without an error; a
reader that is slow holds up its own handler and nothing else; a reader that leaves cancels the
handler; every request has a deadline; a peer that falls silent is noticed.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from runtime.requests.stream import ResponseStream
from runtime.requests.wire import HEADERS_MAX

REQUEST_ID: Final = "x-request-id"
TRACEPARENT: Final = "traceparent"  # W3C trace context, passed on as it is
TRACESTATE: Final = "tracestate"
PRIORITY: Final = "x-priority"  # a whole number; more is sooner, 0 if absent
HEADERS_BYTES_MAX: Final = 16 << 10
_NAME = re.compile(r"[a-z0-9_-]{1,128}")
_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")


class RequestContext:
    """What a handler knows of its request, and how it learns that the caller wants no more.

    `stopped`: bring the answer to its end. `killed`: nobody reads any more; the handler's task is
    cancelled at the same moment, so this is for work that it has given to others.
    """

    __slots__ = ("deadline_s", "endpoint", "headers", "killed", "stopped")

    def __init__(self, endpoint: str, headers: Mapping[str, str], deadline_s: float) -> None:
        self.endpoint = endpoint
        self.headers = headers
        self.deadline_s = deadline_s  # on time.monotonic()'s clock
        self.stopped = asyncio.Event()
        self.killed = asyncio.Event()

    @property
    def id(self) -> str:
        return self.headers.get(REQUEST_ID, "")

    @property
    def priority(self) -> int:
        """0 also where the header is no number."""
        text = self.headers.get(PRIORITY, "0")
        return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else 0

    def left_s(self) -> float:
        return max(0.0, self.deadline_s - time.monotonic())


Handler = Callable[[bytes, RequestContext], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class Canary:
    """A request that a server sends to its own endpoint when that has been idle for a while."""

    payload: bytes
    interval_s: float = 10.0
    timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    in_flight: int
    unhealthy: str | None  # why its canary failed
    probed: bool = False  # a canary has ended, well or not


@dataclass(frozen=True, slots=True)
class ServerStatus:
    kind: str
    address: str | None  # None before start and after close
    draining: bool
    endpoints: Mapping[str, EndpointStatus]
    connections: int
    in_flight: int
    in_flight_max: int
    requests_total: int  # taken
    outcomes_total: Mapping[str, int]  # how they ended, refusals included
    violations_total: int  # connections that were closed because of what came over them

    @property
    def healthy(self) -> bool:
        return all(endpoint.unhealthy is None for endpoint in self.endpoints.values())


@dataclass(frozen=True, slots=True)
class ClientStatus:
    kind: str
    connections: int
    in_flight: int
    in_flight_max: int
    lost_total: int  # connections that ended by themselves
    violations_total: int


class RequestServer(Protocol):
    """All methods are called from one event loop."""

    def serve(self, endpoint: str, handler: Handler, *, canary: Canary | None = None) -> None:
        """Answer requests to `endpoint` with what the handler yields; before start or later."""
        ...

    def withdraw(self, endpoint: str) -> None:
        """Take no more requests for it; those in flight go on."""
        ...

    async def start(self) -> str:
        """Begin to listen; the address for clients. Raises OSError where that cannot be."""
        ...

    async def drain(self, timeout_s: float) -> int:
        """Refuse what is new, let the rest end until then, cancel what is left: how many."""
        ...

    async def close(self) -> None:
        """Cancel what is in flight and stop. Idempotent."""
        ...

    def status(self) -> ServerStatus: ...


class RequestClient(Protocol):
    """All methods are called from one event loop."""

    def stream(
        self,
        address: str,
        endpoint: str,
        payload: bytes,
        *,
        deadline_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ResponseStream:
        """The answer, sent for when it is entered or first read; `deadline_s` from now."""
        ...

    async def close(self) -> None:
        """End all streams and connections. Idempotent."""
        ...

    def status(self) -> ClientStatus: ...


class RequestPlane(Protocol):
    def server(self) -> RequestServer:
        """One that is not started; each has an address of its own."""
        ...

    def client(self) -> RequestClient: ...


def with_request_id(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Checked headers, with an id of their own if they have none; raises ValueError."""
    found = dict(headers or {})
    found.setdefault(REQUEST_ID, secrets.token_hex(16))
    if len(found) > HEADERS_MAX:
        raise ValueError(f"{len(found)} headers; at most {HEADERS_MAX} may be")
    if sum(len(name) + len(value) for name, value in found.items()) > HEADERS_BYTES_MAX:
        raise ValueError(f"the headers are over {HEADERS_BYTES_MAX} bytes")
    for name, value in found.items():
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no header's name; accepted: a-z, 0-9, - and _")
        if _VALUE.fullmatch(value) is None or len(value) > 4096:
            raise ValueError(f"header {name}: {value!r} is not printable ASCII of 4096 at most")
    return found
