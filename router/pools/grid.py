"""Which pool a request belongs to, by its length, its targets and its priority; and who is next.

The algorithm is that of NVIDIA Dynamo's global router (its README: "Pool Selection",
"Priority-Based Pool Override", "Priority Retry"), decision for decision: a table over ranges cut
into equal cells, where what lies outside counts as the cell at the edge, and a target that is not
given as the middle of its range; then the first override whose range has the request's priority.
Nothing here knows of load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.engine_card import Role

Feature = Literal["tokens", "ttft_ms", "itl_ms"]
Mapping = Sequence["int | Mapping"]
"""Nested as deep as there are axes; the innermost are pools."""


@dataclass(frozen=True, slots=True)
class Features:
    """Of a request. None: it does not say."""

    tokens: int
    ttft_ms: float | None = None
    itl_ms: float | None = None
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """`cells` equal parts of the range from `low` to `high`; `low < high`, `cells > 0`."""

    feature: Feature
    low: float
    high: float
    cells: int

    def cell(self, value: float | None) -> int:
        if value is None:
            value = (self.low + self.high) / 2
        step = (self.high - self.low) / self.cells
        return max(0, min(int((value - self.low) / step), self.cells - 1))


@dataclass(frozen=True, slots=True)
class Override:
    """Both ends belong to it."""

    min_priority: int
    max_priority: int
    pool: int


@dataclass(frozen=True, slots=True)
class GridChoice:
    pool: int
    cell: tuple[int, ...]
    override: int | None  # which one, if it was not the cell's pool


@dataclass(frozen=True, slots=True)
class Strategy:
    """Of one role. Pools are numbers: places in `namespaces` and `priorities`."""

    role: Role
    namespaces: tuple[str, ...]
    priorities: tuple[int, ...]  # lower is faster
    axes: tuple[Axis, ...]
    mapping: Mapping
    overrides: tuple[Override, ...] = ()
    retries: bool = False

    def choose(self, features: Features) -> GridChoice:
        cell = tuple(axis.cell(getattr(features, axis.feature)) for axis in self.axes)
        pool: int | Mapping = self.mapping
        for place in cell:
            assert not isinstance(pool, int), "the mapping is as deep as there are axes"
            pool = pool[place]
        assert isinstance(pool, int)
        if features.priority is not None:
            for number, rule in enumerate(self.overrides):
                if rule.min_priority <= features.priority <= rule.max_priority:
                    return GridChoice(rule.pool, cell, number)
        return GridChoice(pool, cell, None)

    def order(self, pool: int) -> tuple[int, ...]:
        """That pool, and with retries all faster ones, the slowest of them first."""
        if not self.retries:
            return (pool,)
        faster = [
            other
            for other, priority in enumerate(self.priorities)
            if priority < self.priorities[pool]
        ]
        # Sorting is stable: pools of one priority stay in the order of the configuration.
        return (pool, *sorted(faster, key=lambda other: -self.priorities[other]))
