"""`kvbm-daemon` with an SSD that is slow while a file says so, as a process of its own.

    python -m tests.kvbm.slow_daemon FILE serve --config ...

FILE holds the bytes a second that the SSD gives; without it the SSD is as fast as it is.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from kvbm.daemon import __main__ as program
from kvbm.daemon import node
from kvbm.daemon.tiers import make_lower_tiers
from kvbm.offload import LaneSettings
from storage_tiers.base import LoadItem, LoadOutcome, Tier, TierName
from storage_tiers.throttled import Throttled


class SlowWhile(Throttled):
    """Throttled while the file is there, by the number in it."""

    def __init__(self, tier: Tier, file: Path) -> None:
        super().__init__(tier, bytes_per_s=1.0, sleep=asyncio.sleep)
        self._plain = tier
        self._file = file

    async def load(self, items: list[LoadItem]) -> list[LoadOutcome]:  # type: ignore[override]
        if not self._file.exists():
            return await self._plain.load(items)
        self._bytes_per_s = float(self._file.read_text())
        return await super().load(items)

    async def _delay(self, moved_bytes: int) -> None:
        if self._file.exists():
            await super()._delay(moved_bytes)


def make_slow_tiers(*arguments: Any) -> list[tuple[Tier, LaneSettings | None]]:
    file = Path(sys.argv[0])
    made: list[tuple[Tier, LaneSettings | None]] = []
    for tier, lane in make_lower_tiers(*arguments):
        slow: Any = SlowWhile(tier, file)
        made.append((slow if tier.name is TierName.SSD else tier, lane))
    return made


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    setattr(node, "make_lower_tiers", make_slow_tiers)  # noqa: B010 (mypy: it is not exported)
    program.main()
