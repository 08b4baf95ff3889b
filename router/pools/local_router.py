"""Who chooses the engine within a pool: the pool's own router, or one in this process.

Both are asked the same questions in the same bytes (`router.asks`), and answer the same. A pool's
own kvbm-router is asked over the request plane; what happens to requests is told to it in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Final, Protocol, TypeVar

import msgspec
import structlog

from router.asks import EVENTS_MAX, AskRefused, EventsAsk, Happened
from router.assembly import Assembly
from router.forecast import Forecast
from router.metrics import RouterMetrics
from router.service import NotRouted, RouterService
from router.settings import RouterSettings
from runtime.component import EndpointClient, NoInstance, Runtime
from runtime.event_peers import joined
from runtime.events import EventPlane
from runtime.requests import RequestError
from runtime.requests.errors import DeadlineExceeded

GATHERED_S: Final = 0.005  # what happened is told after so long, together
TOLD_MAX: Final = 1 << 16  # of what happened and was not told yet
TELL_TIMEOUT_S: Final = 5.0
SYNCED_TIMEOUT_S: Final = 10.0

A = TypeVar("A")

_log = structlog.get_logger("kvbm.global_router")


class RouterGone(Exception):
    """A pool's own router cannot be asked."""


class Place(msgspec.Struct, frozen=True):
    """Where a request goes within a pool, as `RouterService.route` answers."""

    request: str
    instance: str
    dp_rank: int
    url: str
    transport: str
    cached_tokens: int
    events_instance: str | None
    dp_size: int = 1

    @property
    def takes_http(self) -> bool:
        """Its engine is not on the request plane, and has an OpenAI server."""
        return bool(self.url) and self.transport == self.url


class LocalRouter(Protocol):
    """`body` is a `router.asks.RouteAsk`. Raises one of `Refusal`, RouterGone or TimeoutError."""

    async def forecast(self, body: bytes, timeout_s: float) -> Forecast: ...
    async def route(self, body: bytes, timeout_s: float) -> Place: ...

    def tell(self, place: Place, happened: Happened) -> None:
        """Does not wait."""
        ...


class OwnRouter:
    """One in this process, while `run` is."""

    def __init__(self, runtime: Runtime, plane: EventPlane, settings: RouterSettings) -> None:
        self._runtime = runtime
        self._plane = plane
        self._settings = settings
        metrics = RouterMetrics("", settings.name)
        self.assembly = Assembly(settings, runtime, plane, metrics)
        self._service = RouterService(self.assembly)

    async def run(self) -> None:
        async with joined(
            self._runtime.discovery,
            self._plane,
            self._settings.events,
            publishes=True,
            listens=True,
        ):
            await self.assembly.run()

    async def forecast(self, body: bytes, timeout_s: float) -> Forecast:
        await self._synced(timeout_s)
        return self._service.forecast(body)

    async def route(self, body: bytes, timeout_s: float) -> Place:
        await self._synced(timeout_s)
        return msgspec.convert(await self._service.route(body), Place)

    def tell(self, place: Place, happened: Happened) -> None:
        self._service.happened(happened)

    async def _synced(self, timeout_s: float) -> None:
        """Its engines are listed; a moment after it was started."""
        if self.assembly.fleet.is_synced:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(timeout_s, SYNCED_TIMEOUT_S)):
                await self.assembly.fleet.wait_synced()


class FoundRouter:
    """A pool's own; any of its instances is asked, and told what it needs to hear."""

    def __init__(self, runtime: Runtime, namespace: str, component: str) -> None:
        place = runtime.namespace(namespace).component(component)
        self._forecast = place.endpoint("forecast").client()
        self._route = place.endpoint("route").client()
        self._events = place.endpoint("events").client()
        self._told: dict[int, deque[Happened]] = {}
        self._some = asyncio.Event()
        self.listed = asyncio.Event()  # whether one is there is known
        self.untold_total = 0  # for want of room, or of anybody who listens

    @property
    def is_there(self) -> bool:
        return bool(self._route.instance_ids)

    async def run(self) -> None:
        """Until cancelled."""
        for client in (self._forecast, self._route, self._events):
            await client.wait_for_instances(0)
        self.listed.set()
        while True:
            await self._some.wait()
            await asyncio.sleep(GATHERED_S)
            self._some.clear()
            told, self._told = self._told, {}
            async with asyncio.TaskGroup() as tasks:
                for instance, events in told.items():
                    tasks.create_task(self._send(instance, list(events)))

    async def forecast(self, body: bytes, timeout_s: float) -> Forecast:
        return await self._ask(self._forecast, body, timeout_s, Forecast)

    async def route(self, body: bytes, timeout_s: float) -> Place:
        return await self._ask(self._route, body, timeout_s, Place)

    def tell(self, place: Place, happened: Happened) -> None:
        if place.events_instance is None:
            return
        told = self._told.setdefault(int(place.events_instance, 16), deque(maxlen=TOLD_MAX))
        self.untold_total += len(told) == TOLD_MAX
        told.append(happened)
        self._some.set()

    async def _ask(self, client: EndpointClient, body: bytes, timeout_s: float, kind: type[A]) -> A:
        try:
            async with contextlib.aclosing(client.generate(body, deadline_s=timeout_s)) as items:
                async for item in items:
                    answer = msgspec.json.decode(item)
                    refused = answer.get("rejected")
                    if refused is not None:
                        raise NotRouted(refused["kind"], refused["why"])
                    return msgspec.convert(answer, kind)
        except DeadlineExceeded as error:
            raise TimeoutError from error
        except (RequestError, NoInstance, msgspec.DecodeError) as error:
            raise RouterGone(str(error)) from error
        raise RouterGone("it did not answer")

    async def _send(self, instance: int, events: list[Happened]) -> None:
        for first in range(0, len(events), EVENTS_MAX):
            body = msgspec.json.encode(EventsAsk(events[first : first + EVENTS_MAX]))
            answer = self._events.direct(body, instance, deadline_s=TELL_TIMEOUT_S)
            try:
                async with contextlib.aclosing(answer) as items:
                    async for _ in items:
                        pass
            except (RequestError, NoInstance) as error:
                # The leases of its requests end there, if it still lives.
                self.untold_total += len(events) - first
                _log.warning("pool_router_not_told", instance=f"{instance:x}", why=str(error))
                return


Refusal = (NotRouted, AskRefused)
"""What asking may raise."""
