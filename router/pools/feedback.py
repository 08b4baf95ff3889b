"""Where a request goes, given the grid's choice and what each pool expects of it now.

The grid's choice stands unless there is a reason in seconds: it is expected to miss the request's
target and another pool to keep it; or another saves more than a margin, and breaks no target that
the chosen one would keep. An override is an order, and only a pool that cannot take the request is
passed over then. A pool that has not said what it expects is left to the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from router.forecast import Forecast
from router.pools.grid import Features, GridChoice, Strategy
from runtime.engine_card import Role

Reason = Literal["grid", "override", "away", "target", "saves"]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of one pool for one request."""

    forecast: Forecast | None = None
    away: str | None = None  # why it cannot take the request
    unknown: str | None = None  # why there is no forecast, though it may
    counted_s: float = 0.0  # of `Pool`: what the forecast can know of


@dataclass(frozen=True, slots=True)
class Settled:
    """`order`: pools to be tried, one after another; empty if there is none."""

    order: tuple[int, ...]
    reason: Reason
    why: str

    @property
    def pool(self) -> int | None:
        return self.order[0] if self.order else None


def settle(
    strategy: Strategy,
    choice: GridChoice,
    features: Features,
    outlooks: Mapping[int, Outlook],
    margin_s: float | None,
) -> Settled:
    """`margin_s` None: pools that are away are skipped, and nothing else is looked at."""
    by_grid: Reason = "grid" if choice.override is None else "override"
    there = [pool for pool, outlook in outlooks.items() if outlook.away is None]
    order = tuple(pool for pool in strategy.order(choice.pool) if pool in there)
    chosen = outlooks[choice.pool]
    forecasts = {
        pool: found
        for pool in there
        if pool != choice.pool and (found := outlooks[pool].forecast) is not None
    }
    if chosen.away is not None:
        best = None if margin_s is None else _best(forecasts, strategy.role, features)
        if best is not None:
            order = _first(best, order, strategy)
        return Settled(order, "away", chosen.away)
    mine = chosen.forecast
    if margin_s is None or mine is None or choice.override is not None:
        return Settled(order, by_grid, chosen.unknown or "")
    missed = misses(strategy.role, mine, features)
    keeping = {p: f for p, f in forecasts.items() if not misses(strategy.role, f, features)}
    if missed and keeping:
        best = min(keeping, key=lambda pool: keeping[pool].cost_s)
        why = f"{strategy.namespaces[choice.pool]} would miss its target: {missed}"
        return Settled(_first(best, order, strategy), "target", why)
    able = forecasts if missed else keeping
    best = min(able, key=lambda pool: able[pool].cost_s, default=None)
    if best is not None and (saved := mine.cost_s - able[best].cost_s) > margin_s:
        why = f"saves {saved:.3f} s over {strategy.namespaces[choice.pool]}"
        return Settled(_first(best, order, strategy), "saves", why)
    return Settled(order, by_grid, missed and f"{missed}, and no other pool keeps it")


def misses(role: Role, forecast: Forecast, features: Features) -> str:
    """Which of the targets that count for the role, and by what; empty if none is missed."""
    found = []
    ttft_ms, itl_ms = forecast.first_token_s * 1e3, forecast.step_s * 1e3
    if role != "decode" and features.ttft_ms is not None and ttft_ms > features.ttft_ms:
        found.append(f"first token after {ttft_ms:.0f} of {features.ttft_ms:g} ms")
    if role != "prefill" and features.itl_ms is not None and itl_ms > features.itl_ms:
        found.append(f"a token in {itl_ms:.1f} of {features.itl_ms:g} ms")
    return ", ".join(found)


def _best(forecasts: Mapping[int, Forecast], role: Role, features: Features) -> int | None:
    """That keeps the targets if there is one, at the least cost."""
    return min(
        forecasts,
        key=lambda pool: (
            bool(misses(role, forecasts[pool], features)),
            forecasts[pool].cost_s,
        ),
        default=None,
    )


def _first(pool: int, order: tuple[int, ...], strategy: Strategy) -> tuple[int, ...]:
    """That pool before the others, which are there only where requests are tried again."""
    return (pool, *(one for one in order if one != pool)) if strategy.retries else (pool,)
