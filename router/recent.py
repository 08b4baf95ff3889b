"""The latest decisions of a router and the prefixes that prompts had in common.

A `Meter` before another: it keeps what is there already, a few references for each request, and
makes sentences and counts of them only when somebody looks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from router.index import Hashes
from router.model import Ending, Meter, Placed

DECISIONS_KEPT: Final = 20
PROMPTS_KEPT: Final = 1024
PREFIXES_SHOWN: Final = 12
_DEPTHS: Final = 1 << np.arange(13)  # in blocks
_PLACES: Final = _DEPTHS - 1


@dataclass(frozen=True, slots=True)
class _Prompt:
    model: str
    prefixes: Hashes  # sequence hashes at those of `_DEPTHS` that it has
    found_blocks: int  # where its prompt was computed
    block_tokens: int


@dataclass(slots=True)
class Totals:
    requests: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    found_tokens: int = 0  # of these, in whichever tier of the worker
    output_tokens: int = 0
    first_tokens: int = 0
    first_token_s: float = 0.0


class Recent:
    """Called from one event loop."""

    def __init__(self, meter: Meter, clock: Callable[[], float] = time.time) -> None:
        self.totals = Totals()
        self._meter = meter
        self._clock = clock
        self._decisions: deque[tuple[float, Placed]] = deque(maxlen=DECISIONS_KEPT)
        self._prompts: deque[_Prompt] = deque(maxlen=PROMPTS_KEPT)

    def placed(self, model: str, placed: Placed) -> None:
        self._meter.placed(model, placed)
        chosen, hashes = placed.computes.chosen, placed.query.prompt.sequence_hashes
        found = int(chosen.request.covered[-1, chosen.row])
        block_tokens = chosen.request.block_tokens
        self._decisions.append((self._clock(), placed))
        depths = len(hashes).bit_length()  # so many powers of two are not above it
        prefixes = hashes[_PLACES[:depths]]
        self._prompts.append(_Prompt(model, prefixes, found, block_tokens))
        totals = self.totals
        totals.requests += 1
        totals.prompt_tokens += placed.query.prompt.tokens
        totals.found_tokens += found * block_tokens

    def rejected(self, model: str, kind: str) -> None:
        self._meter.rejected(model, kind)
        self.totals.rejected += 1

    def first_token(self, model: str, seconds: float) -> None:
        self._meter.first_token(model, seconds)
        self.totals.first_tokens += 1
        self.totals.first_token_s += seconds

    def ended(self, model: str, ending: Ending, tokens: int, decode_s: float | None) -> None:
        self._meter.ended(model, ending, tokens, decode_s)
        self.totals.output_tokens += tokens

    # -- for who looks ---------------------------------------------------------------------

    def decisions(self) -> list[dict[str, Any]]:
        """The latest first: where, why, at what cost, and what the next best would have cost."""
        return [_told(at, placed) for at, placed in reversed(self._decisions)]

    def prefixes(self) -> list[dict[str, Any]]:
        """What several of the latest prompts begin with, by the tokens that sharing it is worth.

        Prompts are compared at depths of 1, 2, 4, ... blocks: a prefix is at least so long. One
        that all who have it share further is told by its longest form only.
        """
        prompts = [one for one in self._prompts if len(one.prefixes)]
        if not prompts:
            return []
        names, counts = np.unique(np.concatenate([p.prefixes for p in prompts]), return_counts=True)
        shown: dict[tuple[str, int], dict[str, Any]] = {}
        for prompt in prompts:
            shares = counts[np.searchsorted(names, prompt.prefixes)].tolist()
            for depth, (name, count) in enumerate(
                zip(prompt.prefixes.tolist(), shares, strict=True)
            ):
                further = shares[depth + 1] if depth + 1 < len(shares) else 0
                if count < 2 or further == count:
                    continue
                blocks = int(_DEPTHS[depth])
                entry = shown.setdefault(
                    (prompt.model, name),
                    {
                        "model": prompt.model,
                        "prefix": f"{name:016x}",
                        "tokens": blocks * prompt.block_tokens,
                        "requests": count,
                        "found_requests": 0,
                    },
                )
                entry["found_requests"] += prompt.found_blocks >= blocks
        return sorted(shown.values(), key=_worth, reverse=True)[:PREFIXES_SHOWN]


def _worth(prefix: dict[str, Any]) -> tuple[int, int]:
    """Tokens that need not be computed; of two that are worth as much, the longer."""
    return (prefix["requests"] - 1) * prefix["tokens"], prefix["tokens"]


def _told(at: float, placed: Placed) -> dict[str, Any]:
    chosen = placed.computes.chosen
    costs, tokens = chosen.costs, chosen.request.block_tokens
    next_best = None
    if costs is not None:
        others = [(costs.total[row], name) for row, name in chosen.names if row != chosen.row]
        if others:
            cost, name = min(others, key=lambda one: one[0])
            next_best = {"worker": str(name), "cost": float(cost)}
    return {
        "at": at,
        "request": placed.query.request,
        "model": placed.model.name,
        "worker": str(placed.worker),
        "prefill": None if placed.prefill is None else str(placed.prefill.worker),
        "prompt_tokens": placed.query.prompt.tokens,
        "found_tokens": {tier: n * tokens for tier, n in chosen.covered_blocks().items() if n},
        "policy": chosen.policy,
        "reason": chosen.reason,
        "cost": None if costs is None else float(costs.total[chosen.row]),
        "unit": None if costs is None else costs.unit,
        "next_best": next_best,
        "candidates": len(chosen.names),
        "waited_s": placed.waited_s,
    }
