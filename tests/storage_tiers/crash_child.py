"""Run as a program by test_ssd_crash: stores into an SSD tier until it is killed.

Prints "+key" when a store is acknowledged and "-key" when a chunk is evicted.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from storage_tiers.base import Key, RemovalReason, Stored, TierName
from storage_tiers.ssd import SsdTier
from storage_tiers.testing import make_items


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Printing:
    def appeared(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes] = ()) -> None:
        pass

    def noted(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        pass

    def removed(self, tier: TierName, keys: Sequence[Key], reason: RemovalReason) -> None:
        for key in keys:
            tell(f"-{key.hex()}")


async def store_forever(path: Path, capacity_bytes: int, seed: int) -> None:
    tier = SsdTier(path, capacity_bytes, Printing(), recover="strict", mover="plain")
    await tier.open()
    source = random.Random(seed)
    for index in range(1 << 30):
        length = source.choice([5000, 40_000, 40_000, 40_000])
        items = make_items(f"{seed}/{index}", source.randint(1, 6), length)
        for item, outcome in zip(items, await tier.store(items), strict=True):
            if isinstance(outcome, Stored):
                tell(f"+{item.chunk.key.hex()}")
        if index == 2:
            tell("running")


if __name__ == "__main__":
    asyncio.run(store_forever(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
