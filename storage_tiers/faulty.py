"""A tier that goes wrong on purpose, the same way for the same seed. For tests.

A load whose bytes it damages is reported as `Corrupt` and its key removed, as a tier must. So what
is above meets every outcome the contract allows, and none that it forbids.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from storage_tiers.base import (
    Chunk,
    Corrupt,
    Failed,
    Key,
    Loaded,
    LoadItem,
    LoadOutcome,
    RecoveryReport,
    StoreItem,
    StoreOutcome,
    Tier,
    TierName,
    TierUsage,
)
from storage_tiers.codec import checksum


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances per item, or per call for `delay`."""

    flip: float = 0.0  # one bit of what is loaded changes
    fail: float = 0.0  # Failed, nothing done
    drop: float = 0.0  # a stored chunk is lost before it is loaded: Missing
    delay: float = 0.0
    delay_s: float = 0.01


class Faulty:
    """Wraps a tier; `happened` counts the faults that were dealt out."""

    def __init__(
        self,
        tier: Tier,
        faults: Faults,
        *,
        seed: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._tier = tier
        self.faults = faults
        self._random = random.Random(seed)
        self._sleep = sleep
        self.happened: Counter[str] = Counter()

    @property
    def name(self) -> TierName:
        return self._tier.name

    async def open(self) -> RecoveryReport:
        return await self._tier.open()

    async def close(self) -> None:
        await self._tier.close()

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        return self._tier.find(keys)

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        await self._perhaps_wait()
        failed = [self._happens("fail", self.faults.fail) for _ in items]
        passed = [item for item, fails in zip(items, failed, strict=True) if not fails]
        outcomes = iter(await self._tier.store(passed))
        return [Failed("injected") if fails else next(outcomes) for fails in failed]

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        await self._perhaps_wait()
        lost = [item.key for item in items if self._happens("drop", self.faults.drop)]
        if lost:
            await self._tier.remove(lost)
        failed = [self._happens("fail", self.faults.fail) for _ in items]
        passed = [item for item, fails in zip(items, failed, strict=True) if not fails]
        outcomes = await self._tier.load(passed)
        damaged: dict[Key, None] = {}
        for index, (item, outcome) in enumerate(zip(passed, outcomes, strict=True)):
            if isinstance(outcome, Loaded) and self._happens("flip", self.faults.flip):
                data = item.into[: outcome.chunk.length]
                data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
                assert checksum(data) != outcome.chunk.checksum, "a changed bit changes the sum"
                outcomes[index] = Corrupt("injected")
                damaged[item.key] = None
        if damaged:
            await self._tier.remove(list(damaged))
        given = iter(outcomes)
        return [Failed("injected") if fails else next(given) for fails in failed]

    async def remove(self, keys: Sequence[Key]) -> None:
        await self._perhaps_wait()
        await self._tier.remove(keys)

    def refusal(self, chunk: Chunk) -> str | None:
        return self._tier.refusal(chunk)

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        return self._tier.touch(keys)

    def usage(self) -> TierUsage:
        return self._tier.usage()

    def _happens(self, fault: str, chance: float) -> bool:
        happens = self._random.random() < chance
        self.happened[fault] += happens
        return happens

    async def _perhaps_wait(self) -> None:
        if self._happens("delay", self.faults.delay):
            await self._sleep(self.faults.delay_s)
