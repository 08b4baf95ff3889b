"""What would another size of a tier change? Answered by the tiers in miniature, policies and all.

The latest uses of the sampled keys go through each tier at its size (`storage_tiers.miniature`),
and through the tier in question at both sizes. Every chunk is written to all tiers, so a chunk is
found in the fastest one that would have it. Admission, quotas and what is lost to full queues are
left out: what was really found stands beside the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvbm.curve import ERRORS, PARTS, Estimate, Recent, part_of, spread_of
from storage_tiers.base import KEY_BYTES, TierName
from storage_tiers.miniature import Uses, replay
from storage_tiers.policy import EvictionPolicy

COMPUTED: Final = "computed"
"""Where a chunk comes from that no tier has."""

Places = NDArray[np.int64]  # by use: which tier has it; their number: none


@dataclass(frozen=True, slots=True)
class SizedTier:
    """A tier as it is. `byte_s`: seconds to load a byte from it; None if not measured."""

    name: TierName
    size_bytes: int
    policy: Callable[[], EvictionPolicy]
    byte_s: float | None


@dataclass(frozen=True, slots=True)
class Flow:
    """What would come from elsewhere than now, in a second."""

    source: str  # now: a tier, or COMPUTED
    target: str  # then
    chunks: Estimate
    bytes: Estimate
    tokens: Estimate
    saved_s: Estimate | None  # of prefill and loading; None if it is not known what these take


@dataclass(frozen=True, slots=True)
class WhatIf:
    tier: TierName
    now_bytes: int
    then_bytes: int
    hit_now: Estimate  # parts of the chunks asked for that any tier has
    hit_then: Estimate
    gain: Estimate
    by_tenant: Mapping[str, Estimate]  # of the gain; empty where there are no tenants
    flows: Sequence[Flow]
    asked_per_s: float  # chunks
    seconds: float  # of traffic that it is made from
    uses: int  # of sampled keys in it


def what_if(
    recent: Recent,
    tiers: Sequence[SizedTier],
    tier: TierName,
    then_bytes: int,
    *,
    slack: tuple[float, float] = (0.0, 0.0),
    tenants: Mapping[int, str] = MappingProxyType({}),
) -> WhatIf:
    """`tiers`: fastest first, `tier` among them; `slack`: `Curve.sideways` of both sizes;
    `tenants`: names by tag.

    Cost: up to 30 microseconds for each use and tier; may run on any thread.
    """
    changed = next(index for index, each in enumerate(tiers) if each.name == tier)
    found = [_found(recent, each, each.size_bytes) for each in tiers]
    now = _places(found)
    found[changed] = _found(recent, tiers[changed], then_bytes)
    then = _places(found)
    counted = np.arange(len(recent.uses)) >= recent.first
    counted &= recent.uses["asked"]
    sums = _Sums(recent, *slack)
    nowhere = len(tiers)
    missed_now, missed_then = counted & (now == nowhere), counted & (then == nowhere)
    tags = recent.uses["word"] >> np.uint64(8 * (KEY_BYTES // 2 - 1))  # the key's last byte
    flows = [
        sums.flow(tiers, source, target, counted & (now == source) & (then == target))
        for source in range(nowhere + 1)
        for target in range(nowhere + 1)
        if source != target
    ]
    return WhatIf(
        tier,
        tiers[changed].size_bytes,
        then_bytes,
        sums.hit_rate(missed_now, sums.slack_now),
        sums.hit_rate(missed_then, sums.slack_then),
        sums.difference(missed_now, missed_then),
        {
            name: sums.difference(missed_now & (tags == tag), missed_then & (tags == tag))
            for tag, name in tenants.items()
        },
        [flow for flow in flows if flow.chunks.value],
        recent.asked / max(recent.seconds, 1.0),
        recent.seconds,
        int(counted.sum()),
    )


def _found(recent: Recent, tier: SizedTier, size_bytes: int) -> NDArray[np.bool_]:
    return replay(recent.uses, tier.policy(), size_bytes * recent.rate)


def _places(found: Sequence[NDArray[np.bool_]]) -> Places:
    """The first tier that has each use's chunk."""
    return np.asarray(np.argmax([*found, np.ones_like(found[0])], axis=0), dtype=np.int64)


class _Sums:
    """Sums over uses of the sample, as estimates for all keys."""

    def __init__(self, recent: Recent, slack_now: float, slack_then: float) -> None:
        self._uses: Uses = recent.uses
        self._recent = recent
        self._parts = part_of(recent.uses["word"])
        self.slack_now, self.slack_then = slack_now, slack_then  # parts of all asked for

    def flow(
        self,
        tiers: Sequence[SizedTier],
        source: int,
        target: int,
        moved: NDArray[np.bool_],
    ) -> Flow:
        uses, ones = self._uses[moved], np.ones(int(moved.sum()))
        names = [*(tier.name.value for tier in tiers), COMPUTED]
        costs = [tier.byte_s for tier in tiers]
        saved = _saved_s(uses, costs, source, target)
        return Flow(
            names[source],
            names[target],
            self._per_s(moved, ones),
            self._per_s(moved, uses["bytes"]),
            self._per_s(moved, uses["tokens"]),
            None if saved is None else self._per_s(moved, saved),
        )

    def hit_rate(self, missed: NDArray[np.bool_], slack: float) -> Estimate:
        """All that was asked for, less what was missed: `kvbm.curve` says why."""
        by_part = self._by_part(missed, np.ones(int(missed.sum()))) / max(self._recent.asked, 1)
        error = math.hypot(ERRORS * spread_of(by_part, self._recent.rate), slack)
        return Estimate(min(1.0, max(0.0, 1.0 - float(by_part.sum()))), error)

    def difference(self, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Estimate:
        """Of the hit rates."""
        by_part = self._by_part(before, np.ones(int(before.sum())))
        by_part = by_part - self._by_part(after, np.ones(int(after.sum())))
        by_part /= max(self._recent.asked, 1)
        spread = ERRORS * spread_of(by_part, self._recent.rate)
        return Estimate(float(by_part.sum()), math.hypot(spread, self.slack_now, self.slack_then))

    def _per_s(self, moved: NDArray[np.bool_], amounts: NDArray[Any]) -> Estimate:
        by_part = self._by_part(moved, amounts) / max(self._recent.seconds, 1.0)
        value = float(by_part.sum())
        asked_per_s = self._recent.asked / max(self._recent.seconds, 1.0)
        each = abs(float(np.mean(amounts))) if len(amounts) else 0.0
        slack = math.hypot(self.slack_now, self.slack_then) * asked_per_s * each
        return Estimate(value, math.hypot(ERRORS * spread_of(by_part, self._recent.rate), slack))

    def _by_part(self, moved: NDArray[np.bool_], amounts: NDArray[Any]) -> NDArray[np.float64]:
        sums = np.bincount(self._parts[moved], weights=amounts, minlength=PARTS)
        return np.asarray(sums / self._recent.rate)


def _saved_s(
    uses: Uses, costs: Sequence[float | None], source: int, target: int
) -> NDArray[np.float64] | None:
    """Seconds less for each use; None if what they take was not measured."""
    prefill_s = uses["prefill_s"].astype(np.float64)
    if max(source, target) == len(costs):  # computed, now or then
        cost = costs[min(source, target)]
        if cost is None or not prefill_s.any():
            return None
        # What is sooner computed than loaded is computed (`kvbm.governor`): nothing is saved then.
        least = np.maximum(prefill_s - uses["bytes"] * cost, 0.0)
        return least if source == len(costs) else -least
    before, after = costs[source], costs[target]
    if before is None or after is None:
        return None
    return np.asarray(uses["bytes"] * (before - after))
