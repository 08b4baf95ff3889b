"""One request on its way through the pools of its order, until something comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final, Literal

import structlog

from router.asks import Happened
from router.pools.asked import Asked
from router.pools.decision import Attempt, Decision
from router.pools.engines import Engines, Piece
from router.pools.local_router import Place, Refusal
from router.pools.meter import GlobalRouterMetrics
from router.pools.pool import Pool
from runtime.requests import RequestContext, RequestError
from runtime.requests.errors import ConnectionLost, HandlerFailed, Overloaded

ENGINES_TRIED_MAX: Final = 4
"""In one pool, of engines that cannot have begun on the request."""

_log = structlog.get_logger("kvbm.global_router")


class Passage:
    """`pieces` is called once."""

    def __init__(
        self,
        decision: Decision,
        asked: Asked,
        context: RequestContext,
        pools: Sequence[Pool],
        engines: Engines,
        meter: GlobalRouterMetrics,
    ) -> None:
        self._decision = decision
        self._asked = asked
        self._context = context
        self._pools = [pools[number] for number in decision.settled.order]
        self._engines = engines
        self._meter = meter

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """From the first pool that gives anything. Raises RequestError."""
        error: RequestError | None = None
        for pool in self._pools:
            begun = False
            if error is not None:
                self._meter.retried(self._decision, pool.namespace)
            try:
                async with aclosing(self._from_pool(pool)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                if begun:
                    return
                error = HandlerFailed(f"{pool.namespace} ended its answer before it began")
            except RequestError as fault:
                if begun or self._context.left_s() <= 0.0:
                    raise
                error = fault
            except Refusal as refusal:
                self._decision.attempts.append(Attempt(pool.namespace, error=str(refusal)))
                error = Overloaded(f"{pool.namespace}: {refusal}")
            why, request = str(error), self._decision.id
            _log.warning("pool_failed", pool=pool.namespace, request=request, why=why)
        raise error or Overloaded(_nowhere(self._decision))

    async def _from_pool(self, pool: Pool) -> AsyncGenerator[Piece, None]:
        """From one of its engines. Raises RequestError or one of `Refusal`."""
        for left in reversed(range(ENGINES_TRIED_MAX)):
            place = await pool.route(self._asked, self._context.left_s())
            attempt = Attempt(pool.namespace, place.instance)
            self._decision.attempts.append(attempt)
            try:
                async with aclosing(self._from_engine(pool, place)) as pieces:
                    async for piece in pieces:
                        if piece[1].refused is not None:
                            attempt.error = piece[1].refused.message
                        yield piece
                return
            except RequestError as error:
                attempt.error = str(error)
                if error.may_retry or isinstance(error, ConnectionLost):
                    instance = int(place.instance, 16)
                    pool.avoid(instance)
                    self._asked.failed.add(instance)
                if not left or not error.may_retry:
                    raise

    async def _from_engine(self, pool: Pool, place: Place) -> AsyncGenerator[Piece, None]:
        ending: Literal["done", "failed", "cancelled"] = "failed"
        name, request = place.request, self._asked.for_engine(place.dp_rank)
        try:
            answer = self._engines.ask(pool.namespace, place, request, self._context)
            async with aclosing(answer) as pieces:
                async for item, generated in pieces:
                    count = len(generated.token_ids)
                    if count:
                        pool.tell(place, Happened(request=name, kind="output", tokens=count))
                    if generated.finish_reason is not None or generated.refused is not None:
                        ending = "done"
                    yield item, generated
        except (GeneratorExit, asyncio.CancelledError):
            ending = "done" if ending == "done" else "cancelled"
            raise
        finally:
            pool.tell(place, Happened(request=name, kind="end", ending=ending))


def _nowhere(decision: Decision) -> str:
    away = "; ".join(one.away for one in decision.outlooks.values() if one.away is not None)
    return f"no pool can take the request: {away or decision.settled.why}"
