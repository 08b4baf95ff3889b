"""Wrappers keep the contract of what they wrap, and add what they say."""

from __future__ import annotations

import asyncio
import math

import pytest

from storage_tiers.base import Corrupt, Failed, Key, Loaded, Missing, Stored, Tier, TierListener
from storage_tiers.faulty import Faults, Faulty
from storage_tiers.instrumented import Instrumented, TierCall
from storage_tiers.memory import MemoryTier
from storage_tiers.testing import (
    RecordingListener,
    TierConformance,
    load_one,
    make_items,
    store_all,
)
from storage_tiers.throttled import Throttled


class OverMemory(TierConformance):
    """Conformance of a wrapper around the dictionary tier."""

    loads_notes = True

    def inner(self, listener: TierListener) -> MemoryTier:
        self.memory = MemoryTier(self.capacity_bytes, listener)
        return self.memory

    async def corrupt(self, tier: Tier, key: Key) -> None:
        self.memory.contents[key][-1] ^= 0x80

    def check(self, tier: Tier) -> None:
        super().check(self.memory)


class TestThrottled(OverMemory):
    def make(self, listener: TierListener) -> Throttled:
        return Throttled(self.inner(listener), bytes_per_s=1 << 40)


class TestInstrumented(OverMemory):
    def make(self, listener: TierListener) -> Instrumented:
        return Instrumented(self.inner(listener), lambda call: None)


class TestFaultyWithoutFaults(OverMemory):
    def make(self, listener: TierListener) -> Faulty:
        return Faulty(self.inner(listener), Faults(), seed=1)


async def test_a_throttled_tier_takes_its_bytes_over_its_bandwidth() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    inner = MemoryTier(1 << 20, RecordingListener())
    tier = Throttled(inner, bytes_per_s=1000, latency_s=0.5, clock=lambda: 100.0, sleep=sleep)
    items = make_items("a", 2, 1000)
    await store_all(tier, items)
    await tier.store(items)  # known: no bytes, but the line is still busy
    await load_one(tier, items[0])
    assert slept == [2.5, 2.5, 3.5]
    with pytest.raises(ValueError, match="bandwidth above 0"):
        Throttled(inner, bytes_per_s=0)


async def test_an_instrumented_tier_tells_operation_bytes_time_and_outcomes() -> None:
    calls: list[TierCall] = []
    ticks = iter(range(100))
    inner = MemoryTier(3000, RecordingListener())
    tier = Instrumented(inner, calls.append, clock=lambda: float(next(ticks)))
    await tier.open()
    items = make_items("a", 4, 1000)
    await tier.store(items)
    await tier.load([])
    await load_one(tier, items[3])
    assert [call.operation for call in calls] == ["open", "store", "load", "load"]
    assert (calls[1].bytes, calls[1].seconds) == (3000, 1.0)
    assert calls[1].outcomes == {"stored": 3, "full": 1}
    assert calls[3].outcomes == {"missing": 1}


async def test_an_instrumented_tier_counts_cancelled_calls() -> None:
    calls: list[TierCall] = []
    slow = Throttled(MemoryTier(1 << 20, RecordingListener()), bytes_per_s=1)
    tier = Instrumented(slow, calls.append)
    task = asyncio.ensure_future(tier.store(make_items("a", 2)))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert calls[0].outcomes == {"cancelled": 2}


async def test_faults_are_the_same_for_the_same_seed_and_never_wrong_bytes() -> None:
    async def run(seed: int) -> list[str]:
        waits: list[float] = []

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        faults = Faults(flip=0.2, fail=0.2, drop=0.1, delay=0.3)
        inner = MemoryTier(1 << 20, RecordingListener())
        tier = Faulty(inner, faults, seed=seed, sleep=sleep)
        seen: list[str] = []
        for index in range(100):
            [item] = make_items(f"a{index}", 1, 500)
            [stored] = await tier.store([item])
            assert isinstance(stored, Stored | Failed)
            outcome, data = await load_one(tier, item)
            assert isinstance(outcome, Loaded | Missing | Corrupt | Failed)
            assert not isinstance(outcome, Loaded) or data == item.data
            assert not isinstance(outcome, Corrupt) or tier.find([item.chunk.key]) == [None]
            seen.append(type(outcome).__name__)
        assert tier.happened["delay"] == len(waits)
        inner.check_integrity()
        return seen

    first = await run(3)
    assert first == await run(3) != await run(4)
    assert {"Loaded", "Missing", "Corrupt", "Failed"} == set(first)
    assert math.isclose(first.count("Failed"), 20, abs_tol=15)
