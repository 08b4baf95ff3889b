"""The dictionary tier, held to the contract of every tier."""

from __future__ import annotations

from storage_tiers.base import Key, Tier, TierListener
from storage_tiers.memory import MemoryTier
from storage_tiers.testing import TierConformance


class TestMemoryTier(TierConformance):
    loads_notes = True

    def make(self, listener: TierListener) -> MemoryTier:
        return MemoryTier(self.capacity_bytes, listener)

    async def corrupt(self, tier: Tier, key: Key) -> None:
        assert isinstance(tier, MemoryTier)
        tier.contents[key][0] ^= 1
