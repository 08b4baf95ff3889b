"""What a frontend takes for an engine: it has each request served by an engine of some pool.

One relay is one role of one model: an endpoint that takes tokens and gives them
(`runtime.generation`). Answers go through as they come. A request that fails before anything has
come of it goes on to the next pool of its order; afterwards the error is the caller's, who knows
what was given and may ask again for the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from router.pools.asked import NOTHING_OWED, Asked, Owed
from router.pools.decision import Decision, DecisionLog, Outcome
from router.pools.engines import Engines
from router.pools.feedback import Outlook, settle
from router.pools.grid import Strategy
from router.pools.meter import GlobalRouterMetrics
from router.pools.passage import Passage
from router.pools.pool import Pool
from router.pools.settings import GlobalRouterSettings
from runtime.generation import Generate, Hints, decode_generate
from runtime.requests import RequestContext
from runtime.requests.errors import Overloaded


class Relay:
    """Called from one event loop."""

    def __init__(
        self,
        strategy: Strategy,
        model: str,
        pools: Mapping[str, Pool],
        engines: Engines,
        settings: GlobalRouterSettings,
        log: DecisionLog,
        meter: GlobalRouterMetrics,
    ) -> None:
        self.strategy = strategy
        self.model = model
        self._pools = [pools[name] for name in strategy.namespaces]
        self._engines = engines
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
        asked.owed = self._owed(decision)
        passage = Passage(decision, asked, context, self._pools, self._engines, self._meter)
        outcome: Outcome = "failed"
        try:
            async with aclosing(passage.pieces()) as pieces:
                async for item, generated in pieces:
                    if decision.first_item_s is None:
                        decision.first_item_s = time.monotonic() - began_s
                        self._meter.first_item(decision)
                    decision.tokens += len(generated.token_ids)
                    if generated.finish_reason is not None or generated.refused is not None:
                        outcome = "done"
                    yield item
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "done" if outcome == "done" else "cancelled"
            raise
        except Overloaded:
            outcome = "refused"
            raise
        finally:
            asked.owed.paid()
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

    def _owed(self, decision: Decision) -> Owed:
        pool = decision.settled.pool
        if pool is None:
            return NOTHING_OWED
        return self._pools[pool].owe(decision.outlooks[pool].forecast)
