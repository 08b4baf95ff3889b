"""How fast this node's workers compute and load, as measured, in the router's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from kvbm.session import Connected
from runtime.events.node_stream import WorkerSpeed
from storage_tiers.base import TierName

DIGITS: Final = 3
"""Of what is told: a change beyond them is none."""

Costs = Mapping[TierName, tuple[float, float] | None]
"""Seconds before bytes come, and for each byte; None where it was not measured."""


def worker_speeds(engines: Sequence[Connected], tiers: Costs) -> list[WorkerSpeed]:
    """What comes from below host memory is copied from there into the engine, too."""
    found = []
    for engine in engines:
        routing, pace = engine.routing, engine.pace
        block_bytes = engine.token_bytes * routing.block_tokens
        load_s, latency_s = [pace.copy_byte_s * block_bytes], [pace.copy_s]
        for tier in (TierName.SSD, TierName.S3):
            begin_s, byte_s = tiers.get(tier) or (0.0, 0.0)
            load_s.append((pace.copy_byte_s + byte_s) * block_bytes if byte_s else 0.0)
            latency_s.append(begin_s)
        found.append(
            WorkerSpeed(
                routing.worker_id,
                routing.dp_rank,
                _rounded(pace.token_s),
                _rounded(pace.pair_s),
                (_rounded(load_s[0]), _rounded(load_s[1]), _rounded(load_s[2])),
                (_rounded(latency_s[0]), _rounded(latency_s[1]), _rounded(latency_s[2])),
            )
        )
    return found


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS - 1}e}")
