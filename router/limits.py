"""When a worker is too busy to be sent more, and when all are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.workers import Bools, Workers


@dataclass(frozen=True, slots=True)
class BusyLimits:
    """None switches a limit off. A rank of an engine counts by itself: the others may still serve.

    `blocks_fraction`: of a worker's KV blocks in use by running sequences. `prefill_tokens`, and
    `prefill_fraction` of what the worker takes into one step: prompt tokens that are assigned to it
    and not computed. A worker that has not said its sizes is never busy by a fraction.
    """

    blocks_fraction: float | None = None
    prefill_tokens: int | None = None
    prefill_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.blocks_fraction is not None and not 0.0 < self.blocks_fraction <= 1.0:
            raise ValueError(f"blocks_fraction is {self.blocks_fraction}; it must be in (0, 1]")
        for name in ("prefill_tokens", "prefill_fraction"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")

    def why_busy(self, workers: Workers, row: int) -> str | None:
        """In words, for an explanation."""
        blocks, waiting = workers.blocks[row], workers.prefill_tokens[row]
        if self.blocks_fraction is not None:
            most = self.blocks_fraction * workers.kv_blocks[row]
            if blocks > most:
                return f"busy: {blocks:g} KV blocks in use, over {most:g}"
        if self.prefill_tokens is not None and waiting > self.prefill_tokens:
            return f"busy: {waiting:g} prompt tokens to compute, over {self.prefill_tokens}"
        if self.prefill_fraction is not None:
            most = self.prefill_fraction * workers.batch_tokens_max[row]
            if waiting > most:
                return f"busy: {waiting:g} prompt tokens to compute, over {most:g}"
        return None

    @property
    def is_set(self) -> bool:
        return not (self.blocks_fraction is self.prefill_tokens is self.prefill_fraction is None)

    def below(self, workers: Workers, able: Bools) -> Bools:
        """Of these rows those that are not busy."""
        return able & ~self.busy(workers) if self.is_set else able

    def busy(self, workers: Workers) -> Bools:
        rows = slice(workers.rows)
        busy: Bools = np.zeros(workers.rows, dtype=np.bool_)
        if self.blocks_fraction is not None:
            busy |= workers.blocks[rows] > self.blocks_fraction * workers.kv_blocks[rows]
        waiting = workers.prefill_tokens[rows]
        if self.prefill_tokens is not None:
            busy |= waiting > self.prefill_tokens
        if self.prefill_fraction is not None:
            busy |= waiting > self.prefill_fraction * workers.batch_tokens_max[rows]
        return busy
