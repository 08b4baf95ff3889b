"""A decision with all it was made from, kept for a while together with what came of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from router.pools.feedback import Outlook, Settled, misses
from router.pools.grid import Features, GridChoice, Strategy

Outcome = Literal["done", "cancelled", "failed", "refused"]


@dataclass(slots=True)
class Attempt:
    pool: str
    instance: str | None = None  # None: no engine was found
    error: str | None = None


@dataclass(slots=True)
class Decision:
    """`attempts` and what follows come later."""

    id: str
    model: str
    features: Features
    strategy: Strategy
    choice: GridChoice
    outlooks: Mapping[int, Outlook]
    settled: Settled
    took_s: float
    at_s: float = field(default_factory=time.time)
    attempts: list[Attempt] = field(default_factory=list)
    outcome: Outcome | None = None  # None: it runs
    first_item_s: float | None = None
    tokens: int = 0

    @property
    def pool(self) -> str | None:
        return self.name(self.settled.pool)

    def name(self, pool: int | None) -> str | None:
        return None if pool is None else self.strategy.namespaces[pool]

    def explain(self) -> dict[str, Any]:
        """In words that JSON has."""
        features, rule = self.features, self.choice.override
        return {
            "request": self.id,
            "at": round(self.at_s, 3),
            "role": self.strategy.role,
            "model": self.model,
            "tokens": features.tokens,
            "ttft_target_ms": features.ttft_ms,
            "itl_target_ms": features.itl_ms,
            "priority": features.priority,
            "grid": {
                "cell": dict(
                    zip(
                        (axis.feature for axis in self.strategy.axes),
                        self.choice.cell,
                        strict=True,
                    )
                ),
                "override": rule,
                "pool": self.name(self.choice.pool),
            },
            "pool": self.pool,
            "reason": self.settled.reason,
            "why": self.settled.why,
            "order": [self.name(pool) for pool in self.settled.order],
            "pools": [self._pool(pool, outlook) for pool, outlook in self.outlooks.items()],
            "took_s": round(self.took_s, 6),
        }

    def report(self) -> dict[str, Any]:
        """The same, and what came of it."""
        return {
            **self.explain(),
            "attempts": [
                {"pool": one.pool, "instance": one.instance, "error": one.error}
                for one in self.attempts
            ],
            "outcome": self.outcome or "running",
            "first_item_s": self.first_item_s and round(self.first_item_s, 6),
            "output_tokens": self.tokens,
        }

    def _pool(self, pool: int, outlook: Outlook) -> dict[str, Any]:
        told: dict[str, Any] = {"pool": self.name(pool)}
        if outlook.away is not None:
            told["away"] = outlook.away
        if outlook.unknown is not None:
            told["unknown"] = outlook.unknown
        found = outlook.forecast
        if found is None:
            return told
        told |= {"serving": found.serving, "busy": found.busy, "waiting": found.waiting}
        told |= {"requests": found.requests, "prefill_tokens": found.prefill_tokens}
        if found.why is not None:
            return told
        terms = ("line_s", "wait_s", "room_s", "load_s", "compute_s", "decode_s")
        return told | {
            "worker": found.worker,
            "cached_tokens": found.cached_tokens,
            "first_token_s": found.first_token_s,
            "step_s": found.step_s,
            "cost_s": found.cost_s,
            "terms": {name: getattr(found, name) for name in terms},
            "measured": found.measured,
            "misses": misses(self.strategy.role, found, self.features),
        }


class DecisionLog:
    """The latest; of more the oldest go."""

    def __init__(self, limit: int) -> None:
        self._kept: deque[Decision] = deque(maxlen=limit)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, decision: Decision) -> None:
        self._kept.append(decision)

    def latest(self, count: int, request: str | None = None) -> list[Decision]:
        """The newest first; of one request if it is named."""
        found = (one for one in reversed(self._kept) if request is None or one.id == request)
        return [one for one, _ in zip(found, range(count), strict=False)]
