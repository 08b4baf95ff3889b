"""What a frontend takes for an engine: it has each request served by an engine of some pool.

One relay is one role of one model: an endpoint that takes tokens and gives them
(`runtime.generation`). Answers go through as they come. A request that fails before anything has
come of it goes on to the next pool of its order; afterwards the error is the caller's, who knows
what was given and may ask again for the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Final, Literal

import structlog

from router.asks import Happened
from router.pools.asked import Asked
from router.pools.decision import Attempt, Decision, DecisionLog, Outcome
from router.pools.feedback import Outlook, settle
from router.pools.grid import Strategy
from router.pools.local_router import Place, Refusal
from router.pools.meter import GlobalRouterMetrics
from router.pools.pool import Owed, Pool
from router.pools.settings import GlobalRouterSettings
from runtime.engine_card import COMPONENT, ENDPOINT
from runtime.generation import Generate, Generated, Hints, decode_generate, decode_generated
from runtime.requests import RequestClient, RequestContext, RequestError
from runtime.requests.errors import ConnectionLost, HandlerFailed, Overloaded

ENGINES_TRIED_MAX: Final = 4
"""In one pool, of engines that cannot have begun on the request."""

Piece = tuple[bytes, Generated]
"""As it came, and read."""

_log = structlog.get_logger("kvbm.global_router")


class Relay:
    """Called from one event loop."""

    def __init__(
        self,
        strategy: Strategy,
        model: str,
        pools: Mapping[str, Pool],
        client: RequestClient,
        settings: GlobalRouterSettings,
        log: DecisionLog,
        meter: GlobalRouterMetrics,
    ) -> None:
        self.strategy = strategy
        self.model = model
        self._pools = [pools[name] for name in strategy.namespaces]
        self._client = client
        self._feedback = settings.feedback
        ttft_s, itl_s = settings.default_ttft_target, settings.default_itl_target
        self._defaults = Hints(
            None if ttft_s is None else ttft_s * 1e3, None if itl_s is None else itl_s * 1e3
        )
        self._log = log
        self._meter = meter

    async def generate(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        """The endpoint's handler."""
        began_s = time.monotonic()
        asked = self.asked(decode_generate(payload))
        decision = await self.decide(asked, context.id)
        self._log.add(decision)
        self._meter.decided(decision)
        owed = self._owed(decision)
        outcome: Outcome = "failed"
        try:
            async with aclosing(self._from_pools(decision, asked, context, owed)) as pieces:
                async for item, generated in pieces:
                    if decision.first_item_s is None:
                        decision.first_item_s = time.monotonic() - began_s
                        self._meter.first_item(decision)
                    decision.tokens += len(generated.token_ids)
                    if generated.finish_reason is not None:
                        outcome = "done"
                    yield item
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "done" if outcome == "done" else "cancelled"
            raise
        except Overloaded:
            outcome = "refused"
            raise
        finally:
            if owed is not None:
                owed.paid()
            decision.outcome = outcome
            self._meter.ended(decision)

    def asked(self, request: Generate) -> Asked:
        return Asked(self.strategy.role, self.model, request, self._defaults)

    async def decide(self, asked: Asked, request: str) -> Decision:
        """Which pools, in which order, and why; nothing is sent."""
        began_s = time.perf_counter()
        choice = self.strategy.choose(asked.features)
        outlooks = await self._outlooks(asked)
        margin_s = self._feedback.margin if self._feedback.enabled else None
        settled = settle(self.strategy, choice, asked.features, outlooks, margin_s)
        took_s = time.perf_counter() - began_s
        return Decision(
            request,
            self.model,
            asked.features,
            self.strategy,
            choice,
            outlooks,
            settled,
            took_s,
        )

    async def _outlooks(self, asked: Asked) -> dict[int, Outlook]:
        if not self._feedback.enabled:
            away = (pool.away(asked.model, asked.role) for pool in self._pools)
            return {number: Outlook(away=why) for number, why in enumerate(away)}
        timeout_s = self._feedback.timeout
        found = await asyncio.gather(*(pool.outlook(asked, timeout_s) for pool in self._pools))
        pairs = zip(self._pools, found, strict=True)
        return {number: pool.as_of_now(one) for number, (pool, one) in enumerate(pairs)}

    def _owed(self, decision: Decision) -> Owed | None:
        pool = decision.settled.pool
        return None if pool is None else self._pools[pool].owe(decision.outlooks[pool].forecast)

    async def _from_pools(
        self, decision: Decision, asked: Asked, context: RequestContext, owed: Owed | None
    ) -> AsyncGenerator[Piece, None]:
        """From the first pool that gives anything. Raises RequestError."""
        error: RequestError | None = None
        for number in decision.settled.order:
            pool, begun = self._pools[number], False
            if error is not None:
                self._meter.retried(decision, pool.namespace)
            try:
                async with aclosing(
                    self._from_pool(pool, decision, asked, context, owed)
                ) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                if begun:
                    return
                error = HandlerFailed(f"{pool.namespace} ended its answer before it began")
            except RequestError as fault:
                if begun or context.left_s() <= 0.0:
                    raise
                error = fault
            except Refusal as refusal:
                decision.attempts.append(Attempt(pool.namespace, error=str(refusal)))
                error = Overloaded(f"{pool.namespace}: {refusal}")
            _log.warning("pool_failed", pool=pool.namespace, request=decision.id, why=str(error))
        raise error or Overloaded(_nowhere(decision))

    async def _from_pool(
        self,
        pool: Pool,
        decision: Decision,
        asked: Asked,
        context: RequestContext,
        owed: Owed | None,
    ) -> AsyncGenerator[Piece, None]:
        """From one of its engines. Raises RequestError or one of `Refusal`."""
        for left in reversed(range(ENGINES_TRIED_MAX)):
            try:
                place = await pool.route(asked, max(context.left_s(), 0.001))
            finally:
                if owed is not None:
                    owed.paid()
            attempt = Attempt(pool.namespace, place.instance)
            decision.attempts.append(attempt)
            try:
                async with aclosing(self._from_engine(pool, place, asked, context)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except RequestError as error:
                attempt.error = str(error)
                if error.may_retry or isinstance(error, ConnectionLost):
                    instance = int(place.instance, 16)
                    pool.avoid(instance)
                    asked.failed.add(instance)
                if not left or not error.may_retry:
                    raise

    async def _from_engine(
        self, pool: Pool, place: Place, asked: Asked, context: RequestContext
    ) -> AsyncGenerator[Piece, None]:
        ending: Literal["done", "failed", "cancelled"] = "failed"
        name = place.request
        stream = self._client.stream(
            place.transport,
            f"{pool.namespace}.{COMPONENT}.{ENDPOINT}",
            asked.payload(place.dp_rank),
            deadline_s=context.left_s(),
            headers=context.headers,
        )
        try:
            async with stream as items:
                async for item in items:
                    generated = decode_generated(item)
                    count = len(generated.token_ids)
                    if count:
                        pool.tell(place, Happened(request=name, kind="output", tokens=count))
                    if generated.finish_reason is not None:
                        ending = "done"
                    if context.stopped.is_set():
                        stream.stop()
                    yield item, generated
        except (GeneratorExit, asyncio.CancelledError):
            ending = "done" if ending == "done" else "cancelled"
            raise
        finally:
            pool.tell(place, Happened(request=name, kind="end", ending=ending))


def _nowhere(decision: Decision) -> str:
    away = "; ".join(one.away for one in decision.outlooks.values() if one.away is not None)
    return f"no pool can take the request: {away or decision.settled.why}"
