"""The SSD tier: the contract with both movers, recovery, quarantine, capacity changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import pytest

from storage_tiers.base import Key, SilentListener, Tier, TierError, TierListener
from storage_tiers.nixl import availability
from storage_tiers.ssd import SsdTier
from storage_tiers.testing import (
    TierConformance,
)

MIB = 1 << 20


class SsdConformance(TierConformance):
    durable = True
    mover: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.path = tmp_path / "ssd"

    def make(self, listener: TierListener) -> SsdTier:
        return SsdTier(self.path, self.capacity_bytes, listener, mover=self.mover)

    async def corrupt(self, tier: Tier, key: Key) -> None:
        assert isinstance(tier, SsdTier)
        flip_bit(self.path, offset_of(tier, key))


class TestSsdTierWithThreads(SsdConformance):
    mover = "plain"


@pytest.mark.skipif(availability() is not None, reason=f"NIXL: {availability()}")
class TestSsdTierWithNixl(SsdConformance):
    mover = "nixl"


def offset_of(tier: SsdTier, key: Key) -> int:
    record = tier._index.get(key)
    assert record is not None
    return record.at


def flip_bit(path: Path, offset: int) -> None:
    with open(path / "extents", "r+b", buffering=0) as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
        os.fsync(file.fileno())


def tier_at(path: Path, capacity_bytes: int = MIB, **options: str) -> SsdTier:
    return SsdTier(path, capacity_bytes, SilentListener(), mover="plain", **options)  # type: ignore[arg-type]


async def test_a_second_daemon_cannot_open_the_directory(tmp_path: Path) -> None:
    tier = tier_at(tmp_path)
    await tier.open()
    with pytest.raises(TierError, match="in use by another daemon"):
        await tier_at(tmp_path).open()
    await tier.close()
    second = tier_at(tmp_path)
    await second.open()
    await second.close()
