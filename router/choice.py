"""From costs, or without them, to one worker: the policies' last step.

Each choice takes the rows that may be used, at least one, and returns a row. Where it needs chance
it draws from the generator it was given, so that a run can be repeated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from router.workers import Bools, Floats, Workers


def lowest(costs: Floats, eligible: Bools, dice: random.Random) -> int:
    """The cheapest; one of the cheapest by chance where several cost the same."""
    from router.cost_kernel import cheapest  # compiled only for who chooses

    ties = np.empty(len(costs), dtype=np.int64)
    count = cheapest(costs, eligible, ties)
    return int(ties[0 if count == 1 else dice.randrange(count)])


def sampled(costs: Floats, eligible: Bools, temperature: float, dice: random.Random) -> int:
    """By chance, cheaper ones sooner: softmax of the negated costs, scaled to 0..1, by temperature.

    Source of the scaling: the reference's `--router-temperature`. At 0 the cheapest.
    """
    if temperature <= 0.0:
        return lowest(costs, eligible, dice)
    rows = np.flatnonzero(eligible)
    chances = chances_of(costs[rows], temperature)
    drawn = np.searchsorted(np.cumsum(chances), dice.random(), side="right")
    return int(rows[min(int(drawn), len(rows) - 1)])


def chances_of(costs: Floats, temperature: float) -> Floats:
    """Of being drawn; they sum to 1. A temperature below a millionth counts as that."""
    low, high = costs.min(), costs.max()
    if high == low:
        return np.full(len(costs), 1 / len(costs))
    # The cheapest has exponent 0 and the dearest -1/temperature: nothing overflows.
    weights = np.exp(-(costs - low) / (high - low) / max(temperature, 1e-6))
    chances: Floats = weights / weights.sum()
    return chances


@dataclass(slots=True)
class RoundRobin:
    """The next row after the last one that may be used."""

    last: int = field(default=-1, init=False)

    def __call__(self, workers: Workers, eligible: Bools) -> int:
        rows = np.flatnonzero(eligible)
        at = int(np.searchsorted(rows, self.last, side="right"))
        self.last = int(rows[at % len(rows)])
        return self.last


def any_of(eligible: Bools, dice: random.Random) -> int:
    rows = np.flatnonzero(eligible)
    return int(rows[dice.randrange(len(rows))])


def least_loaded(workers: Workers, eligible: Bools, dice: random.Random) -> int:
    """Fewest requests; by blocks, then by chance, where several have as few."""
    rows = slice(workers.rows)
    # Blocks only break ties: below one request each, whatever their number.
    blocks = workers.blocks[rows]
    return lowest(workers.requests[rows] + blocks / (blocks.max() + 1.0), eligible, dice)


def better_of_two(workers: Workers, eligible: Bools, dice: random.Random) -> int:
    """Two by chance, the one with fewer requests: the power of two choices."""
    rows: Sequence[int] = np.flatnonzero(eligible).tolist()
    if len(rows) == 1:
        return rows[0]
    one, other = dice.sample(rows, 2)
    return one if workers.requests[one] <= workers.requests[other] else other
