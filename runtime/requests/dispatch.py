"""The server's half of requests, the same for every kind: endpoints, handlers, limits, drain.

A plane gives each request with a `Reply` to `open` and gets a `Running`, or None if it was refused;
either way the reply's `end` is called once. A handler's task owns the request: it ends when the
handler has, at the deadline, or when it is killed, and the generator is closed in all cases.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from runtime.requests.base import Canary, EndpointStatus, Handler, RequestContext, ServerStatus
from runtime.requests.errors import MESSAGE_CHARACTERS_MAX, Outcome, RequestError
from runtime.requests.settings import RequestPlaneSettings

CANCEL_TIMEOUT_S: Final = 5.0  # what a cancelled handler gets to clean up before we stop waiting

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Request:
    endpoint: str
    payload: bytes
    headers: Mapping[str, str]
    timeout_s: float


class Reply(Protocol):
    async def item(self, payload: bytes) -> None:
        """Send a response; waits for room. Raises PayloadTooLarge."""
        ...

    def end(self, outcome: Outcome, message: str) -> None: ...


@dataclass(slots=True)
class Endpoint:
    handler: Handler
    canary: Canary | None
    in_flight: int = 0
    answered_s: float = field(default_factory=time.monotonic)  # when it last gave a response,
    asked_s: float = 0.0  # and when its canary last ended
    unhealthy: str | None = None


class Running:
    """A request whose handler has begun, or is about to."""

    def __init__(self, endpoint: Endpoint, request: Request, is_probe: bool) -> None:
        self.endpoint = endpoint
        self.size_bytes = len(request.payload)
        self.is_probe = is_probe
        deadline_s = time.monotonic() + request.timeout_s
        self.context = RequestContext(request.endpoint, request.headers, deadline_s)
        self.task: asyncio.Task[tuple[Outcome, str]] | None = None
        self.deadline: asyncio.Timeout | None = None  # while the handler runs

    def stop(self) -> None:
        self.context.stopped.set()

    def kill(self) -> None:
        """Cancel the handler, but once: it may be cleaning up already, killed or out of time."""
        if self.context.killed.is_set():
            return
        self.context.stopped.set()
        self.context.killed.set()
        if self.deadline is not None:
            if self.deadline.expired():
                return
            self.deadline.reschedule(None)
        if self.task is not None:
            self.task.cancel()


class Dispatcher:
    def __init__(self, settings: RequestPlaneSettings) -> None:
        self._settings = settings
        self._endpoints: dict[str, Endpoint] = {}
        self._running: set[Running] = set()
        self._held_bytes = 0
        self._draining = False
        self._requests_total = 0
        self._outcomes: Counter[Outcome] = Counter()

    @property
    def endpoints(self) -> Mapping[str, Endpoint]:
        return self._endpoints

    @property
    def is_draining(self) -> bool:
        return self._draining

    def serve(self, endpoint: str, handler: Handler, canary: Canary | None) -> None:
        assert endpoint not in self._endpoints, f"{endpoint} is served already"
        self._endpoints[endpoint] = Endpoint(handler, canary)

    def withdraw(self, endpoint: str) -> None:
        self._endpoints.pop(endpoint, None)

    def open(self, request: Request, reply: Reply) -> Running | None:
        refused = self._refusal(request)
        if refused is not None:
            self._outcomes[refused[0]] += 1
            reply.end(*refused)
            return None
        return self.begin(self._endpoints[request.endpoint], request, reply)

    def begin(
        self, endpoint: Endpoint, request: Request, reply: Reply, *, is_probe: bool = False
    ) -> Running:
        """Start the handler, whatever the limits say."""
        running = Running(endpoint, request, is_probe)
        task = asyncio.create_task(
            _answer(running, request.payload, reply), name=f"request {request.endpoint}"
        )
        running.task = task
        self._running.add(running)
        endpoint.in_flight += not is_probe
        self._requests_total += not is_probe
        self._held_bytes += running.size_bytes

        def ended(task: asyncio.Task[tuple[Outcome, str]]) -> None:
            # Also for a task that was cancelled before it took its first step.
            outcome, message = (
                (Outcome.CANCELLED, "the server stopped it") if task.cancelled() else task.result()
            )
            self._running.discard(running)
            endpoint.in_flight -= not is_probe
            self._held_bytes -= running.size_bytes
            if not is_probe:
                self._outcomes[outcome] += 1
            reply.end(outcome, message[:MESSAGE_CHARACTERS_MAX])

        task.add_done_callback(ended)
        return running

    async def drain(self, timeout_s: float) -> int:
        self._draining = True
        if self._tasks():
            await asyncio.wait(self._tasks(), timeout=timeout_s)
        left = [running for running in self._running if not running.is_probe]
        await self._kill_all()
        return len(left)

    async def close(self) -> None:
        self._draining = True
        await self._kill_all()

    def status(
        self, kind: str, address: str | None, connections: int, violations_total: int
    ) -> ServerStatus:
        return ServerStatus(
            kind=kind,
            address=address,
            draining=self._draining,
            endpoints={
                name: EndpointStatus(endpoint.in_flight, endpoint.unhealthy, endpoint.asked_s > 0)
                for name, endpoint in self._endpoints.items()
            },
            connections=connections,
            in_flight=sum(not running.is_probe for running in self._running),
            in_flight_max=self._settings.in_flight_max,
            requests_total=self._requests_total,
            outcomes_total={str(name): count for name, count in self._outcomes.items()},
            violations_total=violations_total,
        )

    def _refusal(self, request: Request) -> tuple[Outcome, str] | None:
        settings = self._settings
        if self._draining:
            return Outcome.DRAINING, ""
        if request.endpoint not in self._endpoints:
            return Outcome.UNKNOWN_ENDPOINT, ""
        if len(self._running) >= settings.in_flight_max:
            return Outcome.OVERLOADED, f"the server has {len(self._running)} requests"
        if self._held_bytes + len(request.payload) > settings.in_flight_bytes_max:
            return Outcome.OVERLOADED, f"the server holds {self._held_bytes} bytes of requests"
        return None

    def _tasks(self) -> list[asyncio.Task[tuple[Outcome, str]]]:
        return [running.task for running in self._running if running.task is not None]

    async def _kill_all(self) -> None:
        for running in self._running:
            running.kill()
        tasks = self._tasks()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=CANCEL_TIMEOUT_S)
            if stuck:
                _log.warning("requests_stuck", count=len(stuck), waited_s=CANCEL_TIMEOUT_S)


async def _answer(running: Running, payload: bytes, reply: Reply) -> tuple[Outcome, str]:
    """Run the handler; how it ended. Raises only CancelledError."""
    context, endpoint = running.context, running.endpoint
    loop = asyncio.get_running_loop()
    deadline = asyncio.timeout_at(loop.time() + context.left_s())
    try:
        async with deadline, _closing(endpoint.handler(payload, context)) as items:
            running.deadline = deadline
            async for item in items:
                # A handler that swallows its cancellation gets no further than its next response.
                if context.killed.is_set():
                    raise asyncio.CancelledError
                if deadline.expired():
                    raise TimeoutError
                if not isinstance(item, bytes | bytearray | memoryview):
                    return Outcome.FAILED, f"it yielded {type(item).__name__} instead of bytes"
                await reply.item(item)
                if not running.is_probe:
                    endpoint.answered_s = time.monotonic()
    except RequestError as error:
        return error.outcome or Outcome.FAILED, error.detail or str(error)
    except Exception as error:  # noqa: BLE001 (task border: handlers are others' code)
        if isinstance(error, TimeoutError) and deadline.expired():
            running.kill()  # for those who work for the handler
            return Outcome.DEADLINE, "at the server"
        _log.warning("handler_failed", endpoint=context.endpoint, id=context.id, exc_info=error)
        return Outcome.FAILED, f"{type(error).__name__}: {error}"
    finally:
        running.deadline = None
    return Outcome.DONE, ""


@asynccontextmanager
async def _closing(items: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """Close it if it is a generator; an iterator of another make has nothing to close."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
