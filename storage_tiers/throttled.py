"""A tier made slower: a bandwidth and a latency on top of what it wraps. For tests and demos."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from storage_tiers.base import (
    Chunk,
    Key,
    Loaded,
    LoadItem,
    LoadOutcome,
    RecoveryReport,
    Stored,
    StoreItem,
    StoreOutcome,
    Tier,
    TierName,
    TierUsage,
)


class Throttled:
    """Calls take `latency_s` plus their bytes at `bytes_per_s`, which all calls share."""

    def __init__(
        self,
        tier: Tier,
        *,
        bytes_per_s: float,
        latency_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if bytes_per_s <= 0 or latency_s < 0:
            raise ValueError("a throttled tier needs a bandwidth above 0 and no negative latency")
        self._tier = tier
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._clock = clock
        self._sleep = sleep
        self._busy_until = 0.0  # when the shared line has moved what was given to it

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
        outcomes = await self._tier.store(items)
        moved = sum(
            item.chunk.length
            for item, outcome in zip(items, outcomes, strict=True)
            if isinstance(outcome, Stored)
        )
        await self._delay(moved)
        return outcomes

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        outcomes = await self._tier.load(items)
        await self._delay(sum(o.chunk.length for o in outcomes if isinstance(o, Loaded)))
        return outcomes

    async def remove(self, keys: Sequence[Key]) -> None:
        await self._tier.remove(keys)

    def refusal(self, chunk: Chunk) -> str | None:
        return self._tier.refusal(chunk)

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        return self._tier.touch(keys)

    def usage(self) -> TierUsage:
        return self._tier.usage()

    async def _delay(self, moved_bytes: int) -> None:
        now = self._clock()
        self._busy_until = max(now, self._busy_until) + moved_bytes / self._bytes_per_s
        await self._sleep(self._busy_until - now + self._latency_s)
