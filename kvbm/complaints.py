"""Saying in the log why a medium fails: at once, and then no more than a line a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from storage_tiers.base import TierName

PAUSE_S: Final = 60.0


class Complaints:
    """One place's failures by tier and operation. Counters have every one; the log has a sample."""

    def __init__(self, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """`log`: the structlog logger that the lines are written to."""
        self._log = log
        self._clock = clock
        self._said: dict[tuple[TierName, str], float] = {}
        self._unsaid: dict[tuple[TierName, str], int] = {}

    def failed(self, tier: TierName, op: str, reason: str) -> None:
        now, what = self._clock(), (tier, op)
        if now - self._said.get(what, -PAUSE_S) < PAUSE_S:
            self._unsaid[what] = self._unsaid.get(what, 0) + 1
            return
        self._said[what] = now
        unsaid = self._unsaid.pop(what, 0)
        self._log.warning("tier_failed", tier=tier.value, op=op, reason=reason, unsaid=unsaid)
