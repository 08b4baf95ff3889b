"""The router of one model: which worker serves a request, and which computes its prompt.

With prefill workers a request gets two: one that computes the prompt, chosen by what it finds and
has to do, and one that decodes, chosen by its load. A prompt of which a decode worker has nearly
all is computed there, where the settings allow that. Without prefill workers a request gets one.

What callers tell of their requests teaches how fast workers are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final, Literal, Protocol, Self

import msgspec

from router.forecast import Forecast, split_between
from router.index import WorkerId
from router.pace import Paces, with_step
from router.pool import POOLS, Pool, PoolName, Surroundings, create_pool
from router.router import Query, Rejected, Routed, Router
from router.selector import Chosen, Wishes
from router.workers import Capacity, Speed, Worker, parse_worker
from runtime.engine_card import EngineCard

STEP_REQUESTS: Final = 64  # assumed: so many requests in a step double what an empty one takes
STEP_CACHES: Final = 2  # assumed: and reading so many times its whole KV cache

Part = Literal["all", "prefill", "decode"]
"""Of a request: what is asked of these workers. `prefill`: its prompt is computed, and decoded
elsewhere; `decode`: its prompt was computed elsewhere."""

FOLLOW_S: Final = 1.0  # so often workers that were not measured follow those that were
Source = Literal["node", "learnt", "others", "assumed"]
"""Of a speed: its node measured it; requests taught it; the median of the model's other workers,
of which one of those is true; a constant."""

Ending = Literal["done", "failed", "cancelled", "expired", "worker-gone"]


class Measured(Protocol):
    """What nodes measured of their workers."""

    def of(self, worker: WorkerId, assumed: Speed) -> Speed: ...
    def has_prefill(self, worker: WorkerId) -> bool: ...


class NothingMeasured:
    def of(self, worker: WorkerId, assumed: Speed) -> Speed:
        return assumed

    def has_prefill(self, worker: WorkerId) -> bool:
        return False


class Meter(Protocol):
    """Is told what happens to requests; names are of models."""

    def placed(self, model: str, placed: Placed) -> None: ...
    def rejected(self, model: str, kind: str) -> None: ...
    def first_token(self, model: str, seconds: float) -> None: ...
    def ended(self, model: str, ending: Ending, tokens: int, decode_s: float | None) -> None: ...


class Unmetered:
    def placed(self, model: str, placed: Placed) -> None: ...
    def rejected(self, model: str, kind: str) -> None: ...
    def first_token(self, model: str, seconds: float) -> None: ...
    def ended(self, model: str, ending: Ending, tokens: int, decode_s: float | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine instance that a router may send requests to."""

    instance: int
    card: EngineCard
    transport: str = ""
    serving: bool = True
    healthy: bool = True
    taints: frozenset[str] = frozenset()

    @property
    def pool(self) -> PoolName:
        return "prefill" if self.card.role == "prefill" else "decode"

    @property
    def workers(self) -> list[WorkerId]:
        return [WorkerId(self.instance, rank) for rank in range(self.card.dp_size)]


@dataclass(frozen=True, slots=True)
class Where:
    """Whether a prefill worker computes the prompt, and why."""

    split: bool
    why: str


class Placed:
    """A request on its worker or workers. Leaving the context ends it.

    `prefilled` is for callers that see a prefill worker's answer; the first token says the same.
    """

    def __init__(
        self, model: ModelRouter, query: Query, routed: dict[PoolName, Routed], *times: float
    ) -> None:
        self.model = model
        self.query = query
        self.decode = routed["decode"]
        self.prefill = routed.get("prefill")
        self.asked_at, self.sent_at = times
        self.lost: WorkerId | None = None  # a worker of it that has gone
        self.is_over = False
        self._first_at: float | None = None
        self._last_at = 0.0
        self._tokens = 0
        self._is_prefilled = False

    @property
    def worker(self) -> WorkerId:
        return self.decode.worker

    @property
    def computes(self) -> Routed:
        """Where its prompt is computed."""
        return self.prefill or self.decode

    @property
    def waited_s(self) -> float:
        """In the lines of workers without room."""
        return sum(one.ahead.waited_s for one in (self.prefill, self.decode) if one is not None)

    def prefilled(self) -> None:
        if self._is_prefilled or self.is_over:
            return
        self._is_prefilled = True
        self.computes.first_token()
        self.model.learn_prefill(self.computes, self.sent_at)
        if self.prefill is not None:
            self.prefill.end()

    def first_token(self) -> None:
        if self._first_at is not None or self.is_over:
            return
        self.prefilled()
        if self.prefill is not None:
            self.decode.first_token()
        self._first_at = self._last_at = self.model.now()
        self._tokens = 1
        self.decode.output(1)
        self.model.meter.first_token(self.model.name, self._first_at - self.asked_at)

    def output(self, tokens: int) -> None:
        """So many more have come; the first of all is the first token.

        Fewer than 0: fewer had come than were told of.
        """
        if not tokens or self.is_over:
            return
        if tokens < 0:
            self._tokens = max(self._tokens + tokens, 0)
            self.decode.output(tokens)
            return
        if self._first_at is None:
            self.first_token()
            tokens -= 1
        self._tokens += tokens
        self._last_at = self.model.now()
        self.decode.output(tokens)

    def answered(self, tokens: int) -> None:
        """So many have come at once, the whole answer: when each did is not known."""
        if tokens <= 0 or self._first_at is not None or self.is_over:
            return
        if self.prefill is not None and not self._is_prefilled:
            self.prefill.first_token(timed=False)
        self._is_prefilled = True
        self.decode.first_token(timed=False)
        self._tokens += tokens
        self.decode.output(tokens)

    def end(self, ending: Ending = "done") -> None:
        """Idempotent."""
        if self.is_over:
            return
        self.is_over = True
        self.decode.end()
        if self.prefill is not None:
            self.prefill.end()
        decode_s = None
        if self._first_at is not None and self._tokens > 1:
            decode_s = (self._last_at - self._first_at) / (self._tokens - 1)
            self.model.learn_decode(self.worker, self._tokens - 1, self._last_at - self._first_at)
        self.model.forget(self.query.request)
        self.model.meter.ended(self.model.name, ending, self._tokens, decode_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end("done" if kind is None else "failed")


class ModelRouter:
    """All methods are called from one event loop."""

    def __init__(
        self,
        name: str,
        block_tokens: int,
        around: Surroundings,
        *,
        measured: Measured | None = None,
        meter: Meter | None = None,
        on_lost: Callable[[Placed], None] | None = None,
    ) -> None:
        self.name = name
        self.block_tokens = block_tokens
        self.meter: Meter = Unmetered() if meter is None else meter
        self.pools: dict[PoolName, Pool] = {
            pool: create_pool(around, name, pool, block_tokens) for pool in POOLS
        }
        self.engines: dict[int, Engine] = {}
        self.paces = Paces()
        self.now = around.clock
        self._measured: Measured = NothingMeasured() if measured is None else measured
        self._disaggregation = around.settings.disaggregation
        self._output_tokens = around.settings.seconds.expected_output_tokens
        self._on_lost = on_lost
        self._running: dict[str, Placed] = {}
        self._own_sources: dict[WorkerId, tuple[Source | None, Source | None]] = {}
        # Of workers whose speed is known: seconds per prompt token, and its quadratic part; a step.
        self._others_at = -math.inf
        self._others_prefill: tuple[float, float] | None = None
        self._others_step_s: float | None = None

    def __len__(self) -> int:
        """Workers."""
        return sum(len(pool.workers) for pool in self.pools.values())

    # -- engines -------------------------------------------------------------------------

    def put(self, engine: Engine) -> None:
        """It has come, or says something else of itself."""
        before = self.engines.get(engine.instance)
        if before is not None and (before.pool, before.card.dp_size) != (
            engine.pool,
            engine.card.dp_size,
        ):
            self.remove(engine.instance)
            before = None
        self.engines[engine.instance] = engine
        router = self.pools[engine.pool].router
        for worker in engine.workers:
            if before is None:
                self.paces.add(worker, assumed(engine.card))
                self._own_sources[worker] = None, None
                router.add_worker(self._worker(engine, worker))
                self._follow_others(worker)
            else:
                router.change_worker(self._worker(engine, worker))

    def remove(self, instance: int) -> None:
        """It is gone, and with it what ran there."""
        engine = self.engines.pop(instance)
        for worker in engine.workers:  # first: what is lost with one may teach speeds of others
            self._own_sources.pop(worker)
        for worker in engine.workers:
            for request in self.pools[engine.pool].router.remove_worker(worker):
                placed = self._running.get(request)
                if placed is not None and not placed.is_over:
                    placed.lost = worker
                    if self._on_lost is not None:
                        self._on_lost(placed)
            self.paces.forget(worker)

    def refresh(self, worker: WorkerId) -> None:
        """More is known of its speed than before."""
        engine = self.engines.get(worker.instance)
        if engine is not None and worker.dp_rank < engine.card.dp_size:
            self.pools[engine.pool].router.change_worker(self._worker(engine, worker))
            self._follow_others(worker)

    def sources(self, worker: WorkerId) -> tuple[Source, Source]:
        """Where what is known of its prefill, and of its decode steps, comes from."""
        prefill, step = self._sources_of(worker)
        return (
            prefill or ("assumed" if self._others_prefill is None else "others"),
            step or ("assumed" if self._others_step_s is None else "others"),
        )

    def pool_of(self, worker: WorkerId) -> Pool | None:
        return next((pool for pool in self.pools.values() if worker in pool.workers), None)

    # -- requests ------------------------------------------------------------------------

    async def route(
        self,
        query: Query,
        *,
        deadline_s: float,
        prefill: Wishes | None = None,
        part: Part = "all",
    ) -> Placed | Rejected:
        """Choose, after waiting for room if need be, and count the request where it goes."""
        asked_at = self.now()
        found = await self._route(self._completed(query), prefill, asked_at + deadline_s, part)
        if isinstance(found, Rejected):
            self.meter.rejected(self.name, found.kind)
            return found
        placed = Placed(self, query, found, asked_at, self.now())
        self._running[query.request] = placed
        self.meter.placed(self.name, placed)
        return placed

    def explain(
        self, query: Query, prefill: Wishes | None = None, part: Part = "all"
    ) -> dict[str, Any]:
        """Where it would go now, and why; nothing is sent."""
        query = self._completed(query)
        told: dict[str, Any] = {"model": self.name, "block_tokens": self.block_tokens}
        if part != "all":
            router, query = self._for_part(query, part)
            found = router.explain(query)
            why = f"asked for {part} alone"
            told |= {"disaggregated": False, "why": why, "prefill": None, "decode": found}
            return {"worker": found["worker"], **told}
        where = self._where(query)
        if isinstance(where, Rejected):
            return {**told, "worker": None, "rejected": where.kind, "why": where.why}
        told |= {"disaggregated": where.split, "why": where.why, "prefill": None}
        if where.split:
            told["prefill"] = self.pools["prefill"].router.explain(_for_prefill(query, prefill))
            query = replace(query, decode_only=True)
        told["decode"] = self.pools["decode"].router.explain(query)
        return {"worker": told["decode"]["worker"], **told}

    def forecast(self, query: Query, prefill: Wishes | None = None, part: Part = "all") -> Forecast:
        """What it may expect where it would go now; nothing is sent."""
        query = self._completed(query)
        if part != "all":
            router, query = self._for_part(query, part)
            return self._with_source(router.forecast(query), part)
        where = self._where(query)
        if isinstance(where, Rejected):
            return Forecast(why=where.why, tokens=query.prompt.tokens)
        decode = self.pools["decode"].router
        if not where.split:
            return self._with_source(decode.forecast(query), part)
        computes = self.pools["prefill"].router.forecast(_for_prefill(query, prefill))
        decodes = decode.forecast(replace(query, decode_only=True))
        return split_between(
            self._with_source(computes, "prefill"), self._with_source(decodes, "decode")
        )

    def learn_prefill(self, routed: Routed, sent_at: float) -> None:
        ahead = routed.ahead
        seconds = self.now() - sent_at - ahead.load_s
        if self.paces.prefilled(routed.worker, ahead.new_tokens, ahead.waiting_tokens, seconds):
            self.refresh(routed.worker)

    def learn_decode(self, worker: WorkerId, tokens: int, seconds: float) -> None:
        if self.paces.decoded(worker, tokens, seconds):
            self.refresh(worker)

    def forget(self, request: str) -> None:
        self._running.pop(request, None)

    # -- inside --------------------------------------------------------------------------

    def _worker(self, engine: Engine, worker: WorkerId) -> Worker:
        card = engine.card
        return Worker(
            worker,
            self._speed(worker),
            Capacity(card.kv_blocks or None, card.batch_tokens or None),
            engine.taints,
            engine.serving,
            engine.healthy,
        )

    def _for_part(self, query: Query, part: Part) -> tuple[Router, Query]:
        """Who is asked for one part alone; engines that do both compute prompts as well."""
        if part == "decode":
            return self.pools["decode"].router, replace(query, decode_only=True)
        name: PoolName = "prefill" if self.pools["prefill"].is_serving else "decode"
        return self.pools[name].router, replace(query, expected_output_tokens=0)

    def _with_source(self, forecast: Forecast, part: Part) -> Forecast:
        """Whether the speeds that the part depends on were measured."""
        if forecast.worker is None:
            return forecast
        prefill, step = self.sources(parse_worker(forecast.worker))
        known = (part == "decode" or prefill != "assumed") and (
            part == "prefill" or step != "assumed"
        )
        return msgspec.structs.replace(forecast, measured=known)

    def _speed(self, worker: WorkerId) -> Speed:
        speed = self._measured.of(worker, self.paces.of(worker))
        prefill, step = self._sources_of(worker)
        if prefill is None and self._others_prefill is not None:
            a, q = self._others_prefill
            speed = replace(speed, prefill_s_per_token=a, prefill_s_per_token2=q)
        if step is None and self._others_step_s is not None:
            speed = with_step(speed, self._others_step_s)
        return speed

    def _sources_of(self, worker: WorkerId) -> tuple[Source | None, Source | None]:
        """None where nothing was measured of it."""
        prefill, step = self.paces.learnt(worker)
        from_node = self._measured.has_prefill(worker)
        return (
            "node" if from_node else "learnt" if prefill else None,
            "learnt" if step else None,
        )

    def _follow_others(self, changed: WorkerId) -> None:
        """Workers that nothing was measured of are taken to be as the model's others.

        At once where something of `changed` was measured for the first time, else now and then.
        """
        own = self._sources_of(changed)
        is_news = own != self._own_sources[changed]
        self._own_sources[changed] = own
        now = self.now()
        if not is_news and now - self._others_at < FOLLOW_S:
            return
        self._others_at = now
        known = [
            self._at(worker).speed for worker, (prefill, _) in self._own_sources.items() if prefill
        ]
        steps = [
            self._at(worker).speed.step_s for worker, (_, step) in self._own_sources.items() if step
        ]
        before = self._others_prefill, self._others_step_s
        if known:
            a = median(speed.prefill_s_per_token for speed in known)
            self._others_prefill = a, median(speed.prefill_s_per_token2 for speed in known)
        if steps:
            self._others_step_s = median(steps)
        if (self._others_prefill, self._others_step_s) != before:
            for worker, sources in self._own_sources.items():
                if None in sources:
                    engine = self.engines[worker.instance]
                    self.pools[engine.pool].router.change_worker(self._worker(engine, worker))

    def _at(self, worker: WorkerId) -> Worker:
        found = self.pools[self.engines[worker.instance].pool].workers.get(worker)
        assert found is not None, "it is an engine's"
        return found

    def _completed(self, query: Query) -> Query:
        if query.expected_output_tokens:
            return query
        return replace(query, expected_output_tokens=self._output_tokens)

    def _where(self, query: Query) -> Where | Rejected:
        if not self.pools["prefill"].is_serving:
            if self._disaggregation.enforce:
                return Rejected("no-prefill-worker", "disaggregation.enforce: none is there")
            return Where(split=False, why="no prefill worker is there")
        if not self._disaggregation.conditional:
            return Where(split=True, why="prefill workers are there")
        decision = self.pools["decode"].router.preview(query)
        if not isinstance(decision, Chosen):
            return Where(split=True, why="no decode worker could compute the prompt now")
        found = int(decision.request.covered[-1, decision.row]) * self.block_tokens
        tokens = query.prompt.tokens
        new = max(tokens - found, 1)
        wanted = self._disaggregation
        local = new < wanted.local_tokens and new / max(tokens, 1) < wanted.local_ratio
        why = f"{new} of {tokens} prompt tokens are new to decode worker {decision.worker}: "
        return Where(not local, why + ("few enough to compute there" if local else "too many"))

    async def _route(
        self, query: Query, prefill: Wishes | None, end_at: float, part: Part
    ) -> dict[PoolName, Routed] | Rejected:
        if part != "all":
            router, query = self._for_part(query, part)
            one = await router.route(query, deadline_s=max(end_at - self.now(), 0.0))
            return one if isinstance(one, Rejected) else {"decode": one}
        where = self._where(query)
        if isinstance(where, Rejected):
            return where
        routed: dict[PoolName, Routed] = {}
        if where.split:
            asked = _for_prefill(query, prefill)
            left_s = max(end_at - self.now(), 0.0)
            found = await self.pools["prefill"].router.route(asked, deadline_s=left_s)
            if isinstance(found, Rejected):
                return replace(found, why=f"prefill: {found.why}")
            routed["prefill"] = found
            query = replace(query, decode_only=True)
        try:
            left_s = max(end_at - self.now(), 0.0)
            decode = await self.pools["decode"].router.route(query, deadline_s=left_s)
        except BaseException:
            for one in routed.values():
                one.end()
            raise
        if not isinstance(decode, Rejected):
            routed["decode"] = decode
            gone = [str(one.worker) for one in routed.values() if self.pool_of(one.worker) is None]
            if not gone:
                return routed
            why = f"worker {gone[0]} has gone while the request waited"
            decode = Rejected("no-worker", why)
        for one in routed.values():
            one.end()
        return decode


def assumed(card: EngineCard) -> Speed:
    """Of a worker that nothing is known of: that a step takes longer with more in it."""
    plain = Speed()
    per_block = plain.step_s / (STEP_CACHES * card.kv_blocks) if card.kv_blocks else 0.0
    return replace(
        plain, step_s_per_request=plain.step_s / STEP_REQUESTS, step_s_per_block=per_block
    )


def _for_prefill(query: Query, wishes: Wishes | None) -> Query:
    if wishes is None:
        wishes = replace(query.wishes, among=None, pinned=None)
    return replace(query, wishes=wishes, expected_output_tokens=0)
