"""What a node can tell of other sizes of its tiers: the curve, and single questions.

Questions are answered on a thread, one at a time; what they go by is copied on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from kvbm.curve import Curve
from kvbm.daemon.settings import DaemonSettings
from kvbm.daemon.tiers import make_policy
from kvbm.daemon.view import (
    BusyError,
    CurvePoint,
    CurveStatus,
    CurveTier,
    SampleStatus,
    SizeAnswer,
    UnanswerableError,
)
from kvbm.manager import BlockManager
from kvbm.protocol import Pace
from kvbm.what_if import SizedTier, what_if
from runtime.units import format_size
from storage_tiers.base import TierName
from storage_tiers.dram import DramTier
from storage_tiers.policy import EvictionPolicy, LruPolicy

POINTS: Final = 48
POINTS_PER_OCTAVE: Final = 4

_OFF: Final = "what_if.enabled is false: lookups are not watched"


def make_curve(settings: DaemonSettings, dram: DramTier) -> Curve | None:
    found = settings.what_if
    if not found.enabled:
        return None
    return Curve(
        found.keys,
        settings.what_if_reach,
        found.window,
        rate_max=found.rate,
        taken_bytes=dram.slot_bytes,
    )


class Sizing:
    """Called on the daemon's event loop."""

    def __init__(
        self,
        settings: DaemonSettings,
        manager: BlockManager,
        paces: Callable[[], Sequence[tuple[str, Pace]]],
    ) -> None:
        """`paces`: of the engines that are ready."""
        self._settings = settings
        self._manager = manager
        self._paces = paces
        self._is_busy = False

    def sample(self) -> SampleStatus | None:
        curve = self._manager.curve
        return None if curve is None else _sample(curve)

    def curve(self) -> CurveStatus | None:
        """Cost: a millisecond."""
        curve = self._manager.curve
        if curve is None:
            return None
        reach = curve.sample.reach_bytes
        sizes = [int(reach / 2 ** (n / POINTS_PER_OCTAVE)) for n in range(POINTS - 1, -1, -1)]
        tiers = self._tiers()
        own = [tier.size_bytes for tier in tiers]
        points = [
            CurvePoint(size, rate)
            for size, rate in zip([*sizes, *own], curve.hit_rates([*sizes, *own]), strict=True)
        ]
        found = self._found(curve)
        shown = [
            CurveTier(tier.name, point, found.get(tier.name, 0.0))
            for tier, point in zip(tiers, points[POINTS:], strict=True)
        ]
        return CurveStatus(_sample(curve), shown, points[:POINTS])

    async def what_if(self, tier: TierName, size_bytes: int | None, add_bytes: int) -> SizeAnswer:
        """Raises UnanswerableError and BusyError."""
        curve = self._manager.curve
        if curve is None:
            raise UnanswerableError(_OFF)
        tiers = self._tiers()
        now = {each.name: each.size_bytes for each in tiers}
        if tier not in now:
            has = ", ".join(name.value for name in now)
            raise UnanswerableError(f"this node has no tier {tier.value} of its own; it has {has}")
        then = now[tier] + add_bytes if size_bytes is None else size_bytes
        reach = curve.sample.reach_bytes
        if not 0 <= then <= reach:
            raise UnanswerableError(
                f"a {tier.value} of {then} bytes is out of reach: what_if.reach is "
                f"{format_size(reach)}"
            )
        if self._is_busy:
            raise BusyError("another such question is being answered; ask again in some seconds")
        recent = curve.uses()
        if recent.first == len(recent.uses):
            raise UnanswerableError("no engine has asked for anything yet")
        slack = curve.sideways(now[tier]), curve.sideways(then)
        tenants = {each.tag: name for name, each in self._settings.tenants.items()}
        self._is_busy = True
        try:
            answer = await asyncio.to_thread(
                what_if, recent, tiers, tier, then, slack=slack, tenants=tenants
            )
        finally:
            self._is_busy = False
        others = max((size for name, size in now.items() if name != tier), default=0)
        lru_now, lru_then = curve.hit_rates([max(others, now[tier]), max(others, then)])
        return SizeAnswer(
            answer, sum(self._found(curve).values()), lru_now, lru_then, _sample(curve)
        )

    # -- below ---------------------------------------------------------------------------

    def _tiers(self) -> list[SizedTier]:
        """Those whose size this node sets, fastest first: not other nodes' host memory."""
        manager, settings = self._manager, self._settings
        copies = [pace.copy_byte_s for _, pace in self._paces() if pace.copy_byte_s > 0]
        copy_byte_s = sum(copies) / len(copies) if copies else None
        policies: dict[TierName, Callable[[], EvictionPolicy]] = {
            TierName.DRAM: partial(make_policy, settings.dram.eviction),
            # The oldest written go first there; used ones are not written again.
            TierName.S3: LruPolicy,
        }
        if settings.ssd is not None:
            policies[TierName.SSD] = partial(make_policy, settings.ssd.eviction)
        room = manager.dram.usage().capacity_bytes - manager.lent_bytes
        tiers = [SizedTier(TierName.DRAM, room, policies[TierName.DRAM], copy_byte_s)]
        for tier, pace in zip(manager.tiers, manager.onboarder.paces, strict=True):
            if tier.name in policies:
                up = pace.costs
                cost = None if up is None or copy_byte_s is None else up[1] + copy_byte_s
                size = tier.usage().capacity_bytes
                tiers.append(SizedTier(tier.name, size, policies[tier.name], cost))
        return tiers

    def _found(self, curve: Curve) -> dict[TierName, float]:
        names = [self._manager.dram.name, *(tier.name for tier in self._manager.tiers)]
        return dict(zip(names, curve.found()[1:], strict=False))


def _sample(curve: Curve) -> SampleStatus:
    return SampleStatus(
        keys=len(curve.sample),
        keys_max=curve.sample.keys_max,
        rate=curve.sample.rate,
        asked_chunks_total=curve.asked_total,
        sampled_chunks_total=curve.sampled_total,
        window_s=curve.window_s,
        seconds=curve.seconds,
        reach_bytes=curve.sample.reach_bytes,
    )
