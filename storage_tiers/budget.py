"""A budget over time: what wears a medium out or costs money may be spent evenly, not at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

DAY_S: Final = 86400.0
BURST_S: Final = 3600.0
"""What was not spent is kept for an hour; a restart forgives at most as much."""


class Budget:
    """Grows steadily by `per_day` of any unit; without one it is never spent.

    Spending more than is left is allowed and paid back before the next: who asks first may not
    know yet how much it will be.
    """

    def __init__(
        self, per_day: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_day = per_day
        self._clock = clock
        self._since = clock()
        self._left = self._most

    @property
    def left(self) -> float:
        """May be below 0; infinite without a budget."""
        if self.per_day is None:
            return float("inf")
        now = self._clock()
        self._left = min(self._left + (now - self._since) * self.per_day / DAY_S, self._most)
        self._since = now
        return self._left

    def spend(self, amount: float) -> None:
        if self.per_day is not None:
            self._left = self.left - amount

    @property
    def _most(self) -> float:
        return 0.0 if self.per_day is None else self.per_day * BURST_S / DAY_S
