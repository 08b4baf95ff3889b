"""What a node's dashboard shows: tiers, queues, engines, events, the latest requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from kvbm.daemon.metrics import Metrics
from kvbm.daemon.reports import TierReport
from kvbm.daemon.view import NodeView
from kvbm.receipts import Receipt

RECEIPTS_SHOWN: Final = 20


class NodePage:
    """A `runtime.web.dashboard.Source`."""

    kind: Final = "node"

    def __init__(self, view: NodeView, metrics: Metrics) -> None:
        self.name = metrics.node
        self._view = view
        self._metrics = metrics

    def figures(self) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for usage in self._view.tiers():
            tier = usage.tier.value
            found[f"used.{tier}"] = usage.used_bytes
            found[f"stored.{tier}"] = usage.stored_bytes_total
            found[f"loaded.{tier}"] = usage.loaded_bytes_total
            found[f"hits.{tier}"] = self._metrics.lookups(usage.tier, "hit")
            found[f"misses.{tier}"] = self._metrics.lookups(usage.tier, "miss")
            found[f"evicted.{tier}"] = sum(usage.evictions_total.values())
        for queue in self._view.queues():
            found[f"queue.{queue.name}"] = queue.depth
        found["events"] = self._view.events().published_total
        return found

    def failed(self) -> None:
        self._metrics.error("dashboard", "fault")

    def state(self) -> Mapping[str, Any]:
        view = self._view
        rates = view.rates()
        receipts = view.receipts(None, RECEIPTS_SHOWN).receipts[:RECEIPTS_SHOWN]
        return {
            "version": self._metrics.version,
            "process": view.status(),
            "readiness": view.readiness(),
            "drain": view.drain_status(),
            "tiers": [TierReport.of(u, rates.get(u.tier, ()), self._metrics) for u in view.tiers()],
            "policies": view.policies(),
            "queues": view.queues(),
            "sessions": view.sessions(),
            "events": view.events(),
            "stream": view.stream(),
            "governor": view.governor(),
            "peers": view.peer_list(),
            "quarantined": view.quarantine().total,
            "requests": [_request(receipt) for receipt in receipts],
        }


def _request(receipt: Receipt) -> dict[str, Any]:
    """In tokens: what was asked for, where it was, what was loaded and what was not, and why."""
    kept: Counter[str] = Counter()
    asked = missing = 0
    for group in receipt.groups[:1]:  # the others have the same tokens
        tokens = group.tokens_per_chunk
        asked, missing = group.asked * tokens, group.missing * tokens
        kept.update({tier: chunks * tokens for tier, chunks in group.kept.items()})
    outcome = receipt.outcome
    return {
        "request": receipt.request,
        "engine": receipt.engine,
        "asked_at": receipt.asked_at,
        "asked_tokens": asked,
        "kept_tokens": dict(kept),
        "missing_tokens": missing,
        "why": receipt.refused or receipt.verdict.why,
        "state": None if outcome is None else outcome.state,
        "local_tokens": None if outcome is None else outcome.local_tokens,
        "loaded_tokens": None if outcome is None else outcome.loaded_tokens,
        "load_s": None if outcome is None else outcome.load_s,
    }
