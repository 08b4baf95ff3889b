"""What a router answers, whoever asks: the HTTP API and the request plane call this.

Requests come as JSON bytes, answers go as values that JSON has. What cannot be answered raises
`AskRefused`, or `NotRouted` with a kind that callers can act on.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Final, Literal, get_args

from router.asks import (
    AskRefused,
    Happened,
    RouteAsk,
    decode_busy,
    decode_events,
    decode_route,
    prefill_wishes_of,
    prompt_of,
    urgency_of,
    wishes_of,
)
from router.assembly import Assembly, changed_limits
from router.forecast import Forecast
from router.model import ModelRouter, Placed
from router.reports import speed_of
from router.router import Query, Rejected, Routed
from router.workers import parse_worker

Kind = Literal[
    "unknown-model",
    "unknown-request",
    "no-worker",
    "no-prefill-worker",
    "busy",
    "queue-full",
    "deadline",
    "duplicate",
    "full",
]
KINDS: Final = get_args(Kind)


class NotRouted(Exception):
    """The request was sent nowhere, or is not known."""

    def __init__(self, kind: Kind, why: str) -> None:
        self.kind: Kind = kind
        super().__init__(why)


class RouterService:
    """All methods are called from one event loop."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self.events_instance: str | None = None  # of the endpoint that hears of this one's requests

    # -- requests --------------------------------------------------------------------------

    async def route(self, body: bytes) -> dict[str, Any]:
        """Where to send a request, which counts there until it ends or its lease does.

        Raises AskRefused or NotRouted.
        """
        start = time.perf_counter()
        ask = decode_route(body)
        model = self._model(ask)
        query = self._query(ask, model)
        held = self.assembly.reservations
        if query.request in held:
            raise NotRouted("duplicate", f"request {query.request!r} is running already")
        if held.is_full:
            raise NotRouted("full", f"{len(held)} requests run already (reservations.limit)")
        settings = self.assembly.settings
        most_s = settings.queue.deadline
        deadline_s = most_s if ask.deadline_s is None else min(ask.deadline_s, most_s)
        prefill = prefill_wishes_of(ask)
        placed = await model.route(query, deadline_s=deadline_s, prefill=prefill, part=ask.part)
        if isinstance(placed, Rejected):
            raise NotRouted(placed.kind, placed.why)
        if query.request in held or held.is_full:  # others came while it waited
            placed.end("cancelled")
            raise NotRouted("full", "too many requests came at once")
        lease_s = ask.lease_s or settings.reservations.expiry
        held.hold(query.request, placed, lease_s)
        answer = self._placed(placed, lease_s)
        self.assembly.metrics.took("total", time.perf_counter() - start - placed.waited_s)
        return answer

    def explain(self, body: bytes) -> dict[str, Any]:
        """Where it would go now, and why, with all candidates; nothing is sent.

        Raises AskRefused or NotRouted.
        """
        ask = decode_route(body)
        model = self._model(ask)
        told = model.explain(self._query(ask, model), prefill_wishes_of(ask), ask.part)
        for name in ("decode", "prefill"):
            for one in (told.get(name) or {}).get("candidates", ()):
                one["speed"] = speed_of(self.assembly, model, parse_worker(one["worker"]))
        return told

    def forecast(self, body: bytes) -> Forecast:
        """What it may expect where it would go now; nothing is sent. Raises as `explain` does."""
        ask = decode_route(body)
        model = self._model(ask)
        return model.forecast(self._query(ask, model), prefill_wishes_of(ask), ask.part)

    def events(self, body: bytes) -> dict[str, Any]:
        """What happened to requests, in order. Raises AskRefused."""
        asked = decode_events(body)
        unknown = [one.request for one in asked.events if not self.happened(one)]
        return {"applied": len(asked.events) - len(unknown), "unknown": unknown}

    def happened(self, what: Happened) -> bool:
        """False if there is no such request, or no more."""
        held = self.assembly.reservations
        if what.kind == "end":
            return held.end(what.request, what.ending)
        placed = held.heard(what.request)
        if placed is None:
            return False
        match what.kind:
            case "prefilled":
                placed.prefilled()
            case "first_token":
                placed.first_token()
            case "output":
                placed.output(what.tokens)
            case "answered":
                placed.answered(what.tokens)
        return True

    # -- limits ----------------------------------------------------------------------------

    def busy_threshold(self, model: str | None = None) -> dict[str, Any]:
        """Raises NotRouted."""
        names = self.assembly.models if model is None else [self._named(model).name]
        return {"models": [self._limits(name) for name in sorted(names)]}

    def set_busy_threshold(self, body: bytes) -> dict[str, Any]:
        """Of one model, or of all. Raises AskRefused or NotRouted."""
        ask = decode_busy(body)
        assembly = self.assembly
        names = list(assembly.models) if ask.model is None else [self._named(ask.model).name]
        try:
            limits = {n: changed_limits(assembly.limits_of(n), ask.changes()) for n in names}
        except ValueError as error:
            raise AskRefused(str(error)) from error
        for name, limit in limits.items():
            assembly.set_limits(name, limit)
        return self.busy_threshold(ask.model)

    # -- inside ----------------------------------------------------------------------------

    def _model(self, ask: RouteAsk) -> ModelRouter:
        models = self.assembly.models
        if ask.model is not None:
            return self._named(ask.model)
        if len(models) == 1:
            return next(iter(models.values()))
        if not models:
            raise NotRouted("no-worker", "no engine was found yet")
        raise AskRefused(f"name one of {len(models)} models - at `$.model`")

    def _named(self, name: str) -> ModelRouter:
        found = self.assembly.models.get(name)
        if found is None and name in self.assembly.settings.models:
            raise NotRouted("no-worker", f"no engine of {name!r} was found yet")
        if found is None:
            raise NotRouted("unknown-model", f"no engine of a model {name!r} was found")
        return found

    def _query(self, ask: RouteAsk, model: ModelRouter) -> Query:
        start = time.perf_counter()
        prompt = prompt_of(ask, model.block_tokens)
        self.assembly.metrics.took("hashing", time.perf_counter() - start)
        return Query(
            ask.request or secrets.token_hex(8),
            prompt,
            wishes_of(ask),
            urgency_of(ask),
            ask.expected_output_tokens,
        )

    def _placed(self, placed: Placed, lease_s: float) -> dict[str, Any]:
        model, computes = placed.model, placed.computes
        found = computes.chosen.covered_blocks()
        prefill = placed.prefill
        return {
            "request": placed.query.request,
            "model": model.name,
            **self._worker(model, placed.decode),
            "prefill": None if prefill is None else self._worker(model, prefill),
            "prompt_tokens": placed.query.prompt.tokens,
            "block_tokens": model.block_tokens,
            "blocks_found": found,
            "cached_tokens": sum(found.values()) * model.block_tokens,
            "waited_s": round(placed.waited_s, 6),
            "lease_s": lease_s,
            "events_instance": self.events_instance,
        }

    def _worker(self, model: ModelRouter, routed: Routed) -> dict[str, Any]:
        worker, chosen = routed.worker, routed.chosen
        engine = model.engines[worker.instance]
        return {
            "worker": str(worker),
            "instance": f"{worker.instance:x}",
            "dp_rank": worker.dp_rank,
            "dp_size": engine.card.dp_size,
            "url": engine.card.url,
            "transport": engine.transport,
            "policy": chosen.policy,
            "reason": chosen.reason,
            "cost": None if chosen.costs is None else float(chosen.costs.total[chosen.row]),
            "unit": None if chosen.costs is None else chosen.costs.unit,
        }

    def _limits(self, name: str) -> dict[str, Any]:
        limits = self.assembly.limits_of(name)
        return {
            "model": name,
            "blocks_fraction": limits.blocks_fraction,
            "prefill_tokens": limits.prefill_tokens,
            "prefill_fraction": limits.prefill_fraction,
        }
