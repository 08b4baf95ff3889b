"""A row of steps that an engine takes without looking up, and integer arithmetic over them.

Each step of a row of pure decode takes longer than the one before by the same amount, because each
sequence has one more token of KV. A step with prefill is a row of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from mocker.sequence import Sequence


@dataclass(slots=True)
class Plan:
    """Step `s` of it, counted from 0, begins at `begin_of(s)`; `ended` steps are accounted for."""

    begin_ps: int
    steps: int
    first_ps: int
    growth_ps: int
    decodes: list[Sequence]
    prefills: list[tuple[Sequence, int]]  # and how many tokens
    begun: int = 1
    ended: int = 0

    @property
    def end_ps(self) -> int:
        return self.begin_of(self.steps)

    def begin_of(self, step: int) -> int:
        """Which is also the end of the step before."""
        return self.begin_ps + step * self.first_ps + self.growth_ps * (step * (step - 1) // 2)

    def ended_by(self, now_ps: int) -> int:
        """Steps, of any number, that end at `now_ps` or before."""
        span_ps = now_ps - self.begin_ps
        if span_ps <= 0:
            return 0
        if self.growth_ps == 0:
            return span_ps // self.first_ps
        # The largest n with n x first + growth x n (n - 1) / 2 <= span; integer roots are exact.
        b = 2 * self.first_ps - self.growth_ps
        return (isqrt(b * b + 8 * self.growth_ps * span_ps) - b) // (2 * self.growth_ps)

    def begun_before(self, now_ps: int) -> int:
        """Steps, of any number, that begin before `now_ps`."""
        return self.ended_by(now_ps - 1) + 1 if now_ps > self.begin_ps else 0
