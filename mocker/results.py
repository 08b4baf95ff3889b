"""What a replay found: a record for each request, and figures over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mocker.sequence import Record
from mocker.timing import PS_PER_S

PERCENTILES: Final = (50, 90, 99)
TIERS: Final = ("G1", "G2", "G3", "G4")


@dataclass(frozen=True, slots=True)
class EngineTotals:
    busy_ps: int
    tokens_computed: int
    steps: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Records by request id. A refused request has none."""

    records: Sequence[Record]
    engines: Sequence[EngineTotals]
    refused: int

    def figures(self) -> dict[str, Any]:
        """Durations in seconds; hit rates are of prompt tokens; peaks are those of engines."""
        records = self.records
        ends = [r.finished_ps for r in records if r.finished_ps is not None]
        span_ps = max(ends) - min(r.arrival_ps for r in records) if ends else 0
        prompt = sum(r.prompt_tokens for r in records)
        output = sum(len(r.token_times_ps) for r in records)
        itls = np.concatenate([r.itls_ps for r in records]) if records else np.empty(0, np.int64)
        per_s = PS_PER_S / span_ps if span_ps else 0.0
        return {
            "requests": len(records),
            "refused": self.refused,
            "span_s": span_ps / PS_PER_S,
            "ttft_s": _spread([r.ttft_ps for r in records if r.ttft_ps is not None]),
            "itl_s": _spread(itls),
            "e2e_s": _spread([r.e2e_ps for r in records if r.e2e_ps is not None]),
            "hit_rate": {
                tier: sum(r.cached_tokens.get(tier, 0) for r in records) / prompt if prompt else 0.0
                for tier in TIERS
            },
            "busy_peak": _peak([e.busy_ps for e in self.engines]),
            "tokens_peak": _peak([e.tokens_computed for e in self.engines]),
            "utilisation": sum(e.busy_ps for e in self.engines) / len(self.engines) / span_ps
            if span_ps
            else 0.0,
            "requests_per_s": len(records) * per_s,
            "prompt_tokens_per_s": prompt * per_s,
            "output_tokens_per_s": output * per_s,
            "preemptions": sum(e.preemptions for e in self.engines),
            "steps": sum(e.steps for e in self.engines),
        }

    def throughput(self) -> float:
        """Requests a second while the fleet is full, if all came faster than it can serve.

        Over the middle 80 % of the completions: not while it fills, nor while it empties.
        """
        ends = sorted(r.finished_ps for r in self.records if r.finished_ps is not None)
        first, last = len(ends) // 10, len(ends) * 9 // 10
        return (last - first) * PS_PER_S / (ends[last] - ends[first])

    def requests(self) -> list[dict[str, Any]]:
        """One row for each request, in seconds and tokens."""
        return [_row(record) for record in self.records]


def _row(record: Record) -> dict[str, Any]:
    ttft_ps, e2e_ps, itls_ps = record.ttft_ps, record.e2e_ps, record.itls_ps
    return {
        "request": record.request_id,
        "engine": record.engine,
        "outcome": record.outcome,
        "arrival_s": record.arrival_ps / PS_PER_S,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": len(record.token_times_ps),
        "cached_tokens": {tier: record.cached_tokens.get(tier, 0) for tier in TIERS},
        "ttft_s": None if ttft_ps is None else ttft_ps / PS_PER_S,
        "e2e_s": None if e2e_ps is None else e2e_ps / PS_PER_S,
        "itl_mean_s": float(itls_ps.mean()) / PS_PER_S if len(itls_ps) else None,
        "itl_max_s": int(itls_ps.max()) / PS_PER_S if len(itls_ps) else None,
        "preemptions": record.preemptions,
    }


def _spread(values_ps: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Mean and percentiles in seconds; each percentile is a value that occurred."""
    if not len(values_ps):
        return {}
    values = np.asarray(values_ps, np.int64)
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    told = {f"p{p}": float(value) / PS_PER_S for p, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(values.mean()) / PS_PER_S, **told}


def _peak(values: Sequence[int]) -> float:
    """The largest over the mean: 1 is perfect balance."""
    mean = float(np.mean(values))
    return max(values) / mean if mean else 1.0
