"""A tier that reports each call: what metrics, tracing and the bandwidth estimate hang on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

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
    TierError,
    TierName,
    TierUsage,
)

Operation = Literal["open", "store", "load", "remove"]


@dataclass(frozen=True, slots=True)
class TierCall:
    """One finished call."""

    tier: TierName
    operation: Operation
    seconds: float
    bytes: int  # of the items that were Stored or Loaded
    outcomes: dict[str, int]  # name of the outcome in lower case, or cancelled or error -> items


TierHook = Callable[[TierCall], None]
"""Called on the event loop after each call; must not block or raise."""


class Instrumented:
    """Passes every call on, times it and tells the hook. Costs some microseconds a call."""

    def __init__(
        self, tier: Tier, hook: TierHook, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tier = tier
        self._hook = hook
        self._clock = clock

    @property
    def name(self) -> TierName:
        return self._tier.name

    async def open(self) -> RecoveryReport:
        began = self._clock()
        try:
            report = await self._tier.open()
        except (TierError, asyncio.CancelledError) as error:
            self._tell("open", began, 0, {_named(error): 1})
            raise
        self._tell("open", began, report.bytes, {"opened": 1})
        return report

    async def close(self) -> None:
        await self._tier.close()

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        return self._tier.find(keys)

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        began = self._clock()
        try:
            outcomes = await self._tier.store(items)
        except (TierError, asyncio.CancelledError) as error:
            self._tell("store", began, 0, {_named(error): len(items)})
            raise
        moved = sum(
            item.chunk.length
            for item, outcome in zip(items, outcomes, strict=True)
            if isinstance(outcome, Stored)
        )
        self._tell("store", began, moved, _count(outcomes))
        return outcomes

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        began = self._clock()
        try:
            outcomes = await self._tier.load(items)
        except (TierError, asyncio.CancelledError) as error:
            self._tell("load", began, 0, {_named(error): len(items)})
            raise
        moved = sum(outcome.chunk.length for outcome in outcomes if isinstance(outcome, Loaded))
        self._tell("load", began, moved, _count(outcomes))
        return outcomes

    async def remove(self, keys: Sequence[Key]) -> None:
        began = self._clock()
        try:
            await self._tier.remove(keys)
        except (TierError, asyncio.CancelledError) as error:
            self._tell("remove", began, 0, {_named(error): len(keys)})
            raise
        self._tell("remove", began, 0, {"removed": len(keys)})

    def refusal(self, chunk: Chunk) -> str | None:
        return self._tier.refusal(chunk)

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        return self._tier.touch(keys)

    def usage(self) -> TierUsage:
        return self._tier.usage()

    def _tell(
        self, operation: Operation, began: float, moved: int, outcomes: dict[str, int]
    ) -> None:
        seconds = self._clock() - began
        self._hook(TierCall(self._tier.name, operation, seconds, moved, outcomes))


def _count(outcomes: Sequence[StoreOutcome] | Sequence[LoadOutcome]) -> dict[str, int]:
    return dict(Counter(type(outcome).__name__.lower() for outcome in outcomes))


def _named(error: BaseException) -> str:
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
