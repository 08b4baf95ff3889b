"""One pool: the engines of a namespace, and whoever chooses among them.

An engine that broke off is passed over for a moment, as long as there are others.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Final, TypeVar

import msgspec
import structlog

from router.asks import Happened
from router.fleet import Fleet
from router.forecast import Forecast
from router.model import Engine
from router.pools.asked import Asked, Owed
from router.pools.feedback import Outlook
from router.pools.local_router import (
    FoundRouter,
    LocalRouter,
    OwnRouter,
    Place,
    Refusal,
    RouterGone,
)
from router.pools.settings import GlobalRouterSettings
from router.service import NotRouted
from runtime.component import Runtime
from runtime.engine_card import Role
from runtime.events import EventPlane

AVOIDED_S: Final = 2.0
"""An engine that broke off, or a pool's router that was not reached, is not asked for so long."""

T = TypeVar("T")

_log = structlog.get_logger("kvbm.global_router")


class Pool:
    """Called from one event loop. `run` is called once; `on_change` when engines come or go."""

    def __init__(
        self,
        namespace: str,
        runtime: Runtime,
        plane: EventPlane,
        settings: GlobalRouterSettings,
        on_change: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.namespace = namespace
        self.engines: dict[int, Engine] = {}
        self.in_flight = 0
        self._fleet = Fleet(runtime.discovery, namespace, self._put, self._remove)
        self._on_change = on_change
        self._clock = clock
        self._avoided: dict[int, float] = {}  # instance -> until when
        self._runtime = runtime
        self._plane = plane
        self._settings = settings
        self._own: OwnRouter | None = None
        self._found: FoundRouter | None = None
        self._silent_until = -math.inf
        if settings.pool_routers == "found":
            self._found = FoundRouter(runtime, namespace, settings.router_component)
        self._tasks: asyncio.TaskGroup | None = None
        # Of all requests that were to be sent here, seconds of prompts: decided, and routed.
        self._owed_s = self._routed_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            if self._found is not None:
                tasks.create_task(self._found.run(), name=f"router of {self.namespace}")
                await self._found.listed.wait()
            _ = self._router  # so that it has its index before the first request
            await self._fleet.start()
            try:
                await asyncio.Event().wait()
            finally:
                await self._fleet.close()

    @property
    def is_listed(self) -> bool:
        return self._fleet.is_synced

    @property
    def router_kind(self) -> str:
        """`found`, or `own`; `none` before it runs."""
        if self._found is not None and self._found.is_there:
            return "found"
        return "none" if self._own is None else "own"

    @property
    def untold_total(self) -> int:
        return 0 if self._found is None else self._found.untold_total

    def engines_of(self, model: str, role: Role | None = None) -> Iterator[Engine]:
        """That serve it; engines that do everything have each role."""
        for engine in self.engines.values():
            able = role in {None, "prefill"} or engine.pool == "decode"
            if engine.serving and engine.card.model == model and able:
                yield engine

    def away(self, model: str, role: Role) -> str | None:
        """Why nothing can be sent here now."""
        if any(self.engines_of(model, role)):
            return None
        return f"no engine of {model!r} serves in {self.namespace}"

    async def outlook(self, asked: Asked, timeout_s: float) -> Outlook:
        """What it expects of the request."""
        away = self.away(asked.model, asked.role)
        if away is not None:
            return Outlook(away=away)
        counted_s, body = self._routed_s, asked.body(*self._among(asked))
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._ask(lambda router: router.forecast(body, timeout_s))
        except TimeoutError:
            return Outlook(unknown=f"its router did not answer in {timeout_s:g} s")
        except Refusal as error:
            return Outlook(away=str(error))
        return Outlook(found, found.why, counted_s=counted_s)

    def as_of_now(self, outlook: Outlook) -> Outlook:
        """With what was decided since it was asked for, and was not counted anywhere then.

        Requests of a burst all ask before the first of them is counted where it goes.
        """
        found = outlook.forecast
        owed_s = self._owed_s - outlook.counted_s
        if found is None or owed_s <= 0.0:
            return outlook
        wait_s = found.wait_s + owed_s / max(found.serving, 1)
        return replace(outlook, forecast=msgspec.structs.replace(found, wait_s=wait_s))

    def owe(self, forecast: Forecast | None) -> Owed:
        """A request was decided to go here."""
        seconds = 0.0 if forecast is None else forecast.load_s + forecast.compute_s
        self._owed_s += seconds
        return Owed(seconds, self._paid)

    async def route(self, asked: Asked, timeout_s: float) -> Place:
        """Raises one of `Refusal`."""
        block_tokens, workers = self._among(asked)
        if workers == []:
            raise NotRouted("no-worker", f"no engine of {self.namespace} could be reached")
        body = asked.body(block_tokens, workers, timeout_s)
        try:
            place = await self._ask(lambda router: router.route(body, timeout_s))
        except TimeoutError:
            raise NotRouted("deadline", f"no place in {timeout_s:g} s") from None
        finally:
            asked.owed.paid()
        self.in_flight += 1
        return place

    def tell(self, place: Place, happened: Happened) -> None:
        if happened.kind == "end":
            self.in_flight -= 1
        # Whoever routed it knows of it; who does not is not harmed.
        if place.events_instance is None and self._own is not None:
            self._own.tell(place, happened)
        elif self._found is not None:
            self._found.tell(place, happened)

    def avoid(self, instance: int) -> None:
        self._avoided[instance] = self._clock() + AVOIDED_S

    async def _ask(self, question: Callable[[LocalRouter], Awaitable[T]]) -> T:
        """The one here if the pool's own cannot be reached. Raises as the question does."""
        try:
            return await question(self._router)
        except RouterGone as error:
            _log.warning("pool_router_gone", namespace=self.namespace, why=str(error))
            self._silent_until = self._clock() + AVOIDED_S
            return await question(self._router)

    def _paid(self, seconds: float) -> None:
        self._routed_s += seconds

    @property
    def _router(self) -> LocalRouter:
        found = self._found
        if found is not None and found.is_there and self._clock() >= self._silent_until:
            return found
        if self._own is None:
            assert self._tasks is not None, "it runs"
            of_pool = self._settings.of_pool(self.namespace)
            self._own = OwnRouter(self._runtime, self._plane, of_pool)
            self._tasks.create_task(self._own.run(), name=f"own router of {self.namespace}")
            _log.info("pool_routed_here", namespace=self.namespace)
        return self._own

    def _among(self, asked: Asked) -> tuple[int, list[str] | None]:
        """Tokens of a block, and workers that may be chosen; None: all of them."""
        engines = list(self.engines_of(asked.model, asked.role))
        block_tokens = engines[0].card.block_tokens if engines else 16
        if self._avoided:
            now = self._clock()
            self._avoided = {one: until for one, until in self._avoided.items() if until > now}
        if not asked.failed and not self._avoided:
            return block_tokens, None
        able = [engine for engine in engines if engine.instance not in asked.failed]
        well = [engine for engine in able if engine.instance not in self._avoided]
        return block_tokens, [str(w) for engine in well or able for w in engine.workers]

    def _put(self, engine: Engine) -> None:
        self.engines[engine.instance] = engine
        self._on_change()

    def _remove(self, instance: int) -> None:
        del self.engines[instance]
        self._on_change()
