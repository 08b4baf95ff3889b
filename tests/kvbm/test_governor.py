"""Loading against computing: what `decide` promises, and what the manager does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.governor import PROBE_S, SLACK, Line, Part, Verdict, decide
from kvbm.manager import Wanted
from kvbm.protocol import COMING, HERE, PRESENT, Pace
from storage_tiers.base import StoreItem, TierName
from storage_tiers.memory import MemoryTier
from storage_tiers.throttled import Throttled
from tests.kvbm.builders import CHUNK_BYTES, Node, chunks_of, keys_of

TOKENS = 16
FAST = Pace(token_s=1e-6)
"""Computes a chunk in 16 microseconds."""
SLOW = Pace(token_s=1.0)

MakeNode = Callable[..., Node]


def part(places: list[int], *, window: int = 0, size: int = 1000, tokens: int = TOKENS) -> Part:
    return Part(tokens, window, size, np.array(places, dtype=np.uint8))


def line(byte_s: float, *, begin_s: float = 0.0, queued: int = 0, stuck_s: float = 0.0) -> Line:
    return Line(TierName.SSD, begin_s, byte_s, queued, stuck_s)


# -- what it decides --------------------------------------------------------------------


def test_a_slow_tail_is_cut_where_its_tier_begins() -> None:
    places = [1] * 10 + [2] * 10
    pace = Pace(token_s=1e-3, copy_byte_s=1e-9)
    verdict = decide([part(places)], 320, [line(byte_s=1e-3)], pace)
    assert verdict.tokens == 160 and verdict.skipped_tokens == 160
    assert verdict.chosen is not None and verdict.everything is not None
    assert verdict.chosen.tier_bytes == (0,) and verdict.everything.tier_bytes == (10_000,)
    assert verdict.everything.load_s == pytest.approx(10 + 20_000 * 1e-9)
    assert verdict.compute_all_s == pytest.approx(0.32)
    assert verdict.chosen.compute_s == pytest.approx(0.16)


def test_computing_grows_dearer_with_depth_so_a_long_prefix_is_loaded() -> None:
    pace, tier = Pace(token_s=1e-6, pair_s=1e-6), line(byte_s=1e-6)
    assert decide([part([2] * 20)], 320, [tier], pace).tokens == 320
    assert decide([part([2])], 16, [tier], pace).tokens == 0


def test_what_waits_before_it_counts() -> None:
    pace, places = Pace(token_s=1e-3), [2] * 10
    assert decide([part(places)], 160, [line(1e-6)], pace).tokens == 160
    assert decide([part(places)], 160, [line(1e-6, queued=1_000_000)], pace).tokens == 0
    assert decide([part(places)], 160, [line(1e-6, begin_s=1.0)], pace).tokens == 0
    assert decide([part(places)], 160, [line(1e-6, stuck_s=1.0)], pace).tokens == 0


def test_what_is_on_its_way_already_is_not_counted_twice() -> None:
    mine = replace(part([2] * 10), coming=np.ones(10, dtype=np.bool_))
    tier = line(byte_s=1e-6, queued=10_000)
    pace = Pace(token_s=1e-4)
    verdict = decide([mine], 160, [tier], pace)
    assert verdict.tokens == 160 and verdict.everything is not None
    assert verdict.everything.load_s == pytest.approx(0.01)
    assert decide([part([2] * 10)], 160, [tier], pace).tokens == 0


def test_host_memory_too_is_left_where_copying_takes_longer() -> None:
    assert decide([part([1] * 10)], 160, [], Pace(1e-6, copy_byte_s=1e-6)).tokens == 0
    assert decide([part([1] * 10)], 160, [], Pace(1e-3, copy_byte_s=1e-6)).tokens == 160
    assert decide([part([1] * 10)], 160, [], Pace(1e-3, copy_s=1.0)).tokens == 0


def test_only_a_windows_end_is_loaded_so_only_that_counts() -> None:
    """Forty chunks of the window's group lie on the slow tier; two are needed."""
    groups = [part([1] * 40), part([2] * 40, window=2)]
    verdict = decide(groups, 640, [line(byte_s=1e-5)], Pace(token_s=1e-3))
    assert verdict.tokens == 640 and verdict.chosen is not None
    assert verdict.chosen.tier_bytes == (3000,)


def test_a_cut_is_made_only_where_windows_are_whole() -> None:
    """Chunks 3 to 5 of the window's group are kept: the prefix may end behind 4, or behind 5."""
    window = part([0, 0, 0, 1, 1, 1, 0, 0], window=2)
    groups = [part([1] * 6 + [2] * 2), window]
    verdict = decide(groups, 8 * TOKENS, [line(byte_s=1.0)], Pace(token_s=1e-3))
    assert verdict.tokens == 6 * TOKENS
    late = part([0, 0, 0, 0, 0, 0, 1, 1], window=2)
    assert decide([groups[0], late], 8 * TOKENS, [line(1.0)], Pace(token_s=1e-3)).tokens == 0


# -- what it promises -------------------------------------------------------------------

COSTS = st.floats(0, 1e-2)
PACES = st.builds(Pace, st.floats(1e-7, 1e-2), st.floats(0, 1e-6), COSTS, st.floats(0, 1e-5))
LINES = st.builds(
    Line,
    st.just(TierName.SSD),
    COSTS,
    st.floats(0, 1e-4),
    st.integers(0, 1 << 20),
    st.floats(0, 1),
)
CHUNKS = st.lists(st.integers(1, 3), min_size=1, max_size=40)


def predicted_s(places: list[int], count: int, lines: list[Line], pace: Pace) -> float:
    """The time that the first `count` chunks loaded and the rest computed take, by hand."""
    waits = [0.0]
    for number, tier in enumerate(lines):
        size = 1000 * sum(place == number + 2 for place in places[:count])
        if size:
            wait = tier.begin_s + (tier.queued_bytes + size) * tier.byte_s
            waits.append(max(wait, tier.stuck_s))
    copy_s = pace.copy_s + count * 1000 * pace.copy_byte_s if count else 0.0
    return max(waits) + copy_s + pace.prefill_s(count * TOKENS, len(places) * TOKENS)


def judged(places: list[int], lines: list[Line], pace: Pace) -> Verdict:
    return decide([part(places)], len(places) * TOKENS, lines, pace)


@settings(deadline=None)
@given(CHUNKS, st.lists(LINES, min_size=2, max_size=2), PACES)
def test_it_takes_the_best_cut_and_never_one_worse_than_computing_all(
    places: list[int], lines: list[Line], pace: Pace
) -> None:
    verdict = judged(places, lines, pace)
    every = [predicted_s(places, count, lines, pace) for count in range(len(places) + 1)]
    chosen_s = every[verdict.tokens // TOKENS]
    assert verdict.chosen is not None
    assert verdict.chosen.total_s == pytest.approx(chosen_s)
    assert verdict.compute_all_s == pytest.approx(every[0])
    assert chosen_s <= every[0] * (1 + 1e-9)
    assert chosen_s <= min(every) + SLACK * every[0] * (1 + 1e-9)


@settings(deadline=None)
@given(CHUNKS, LINES, PACES, st.floats(0, 1))
def test_a_faster_tier_is_never_used_less(
    places: list[int], tier: Line, pace: Pace, part_of: float
) -> None:
    places = [min(place, 2) for place in places]
    faster = replace(tier, byte_s=tier.byte_s * part_of)
    before = judged(places, [tier], pace).tokens
    assert judged(places, [faster], pace).tokens >= before


@settings(deadline=None)
@given(CHUNKS, st.lists(LINES, min_size=2, max_size=2), PACES, st.floats(1, 100))
def test_a_slower_engine_never_loads_less(
    places: list[int], lines: list[Line], pace: Pace, times: float
) -> None:
    slower = Pace(pace.token_s * times, pace.pair_s * times, pace.copy_s, pace.copy_byte_s)
    before = judged(places, lines, pace)
    assert judged(places, lines, slower).tokens >= before.tokens


# -- in the block manager ---------------------------------------------------------------


def wanted(items: list[StoreItem]) -> Wanted:
    return Wanted(TOKENS, 0, keys_of(items), CHUNK_BYTES)


class Tap:
    """A throttled tier's sleep that can be shortened."""

    def __init__(self) -> None:
        self.is_slow = True
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds if self.is_slow else 1e-6

    def slow(self, memory: MemoryTier) -> Throttled:
        return Throttled(memory, bytes_per_s=1e5, clock=self.clock, sleep=self.sleep)


def attach(node: Node, tap: Tap) -> None:
    """Have the node measure by the tap's clock."""
    node.manager.governor._clock = tap.clock
    node.manager.governor._probed_at = [tap.now_s] * 2
    for pace in node.manager.onboarder.paces:
        pace._clock = pace._costs._clock = tap.clock


async def on_ssd_only(node: Node, name: str, count: int) -> list[StoreItem]:
    items = chunks_of(name, count)
    await node.memories[0].store(items)
    return items


async def ask(node: Node, items: list[StoreItem], pace: Pace) -> Verdict:
    """A lookup that waits for what comes, and is closed."""
    told: list[object] = []
    ticket = node.manager.match([wanted(items)], told.append, pace)
    await node.settle()
    assert set(ticket.states) <= {HERE, COMING, PRESENT}
    node.manager.close(ticket)
    return ticket.verdict


async def test_a_tier_found_slow_is_passed_over_probed_and_used_again_once_fast(
    make_node: MakeNode,
) -> None:
    tap = Tap()
    node = make_node(tap.slow)
    attach(node, tap)
    pace = Pace(token_s=1e-4)  # a chunk: 1.6 ms to compute, 82 ms to bring up
    async with node.running():
        first = await ask(node, await on_ssd_only(node, "first", 8), pace)
        assert first.tokens == 128, "nothing was measured yet"
        second = await ask(node, await on_ssd_only(node, "second", 8), pace)
        assert second.tokens == 0 and second.everything is not None
        assert second.everything.load_s > 10 * second.compute_all_s
        loaded = node.memories[0].usage().loaded_bytes_total
        assert loaded == 8 * CHUNK_BYTES, "nothing came up for the second"
        tap.is_slow = False
        third = await ask(node, await on_ssd_only(node, "third", 8), pace)
        assert third.tokens == 0, "nobody knows yet that it is fast again"
        tap.now_s += PROBE_S
        fourth = await ask(node, await on_ssd_only(node, "fourth", 8), pace)
        assert fourth.tokens == 0 and node.meter.probes == {"G3": 1}
        tap.now_s += 1
        fifth = await ask(node, await on_ssd_only(node, "fifth", 8), pace)
        assert fifth.tokens == 128
    assert node.meter.verdicts == {"measured": 5}
    assert node.meter.skipped_tokens == 3 * 128


async def test_a_tier_still_slow_is_probed_only_now_and_then(make_node: MakeNode) -> None:
    tap = Tap()
    node = make_node(tap.slow)
    attach(node, tap)
    async with node.running():
        await ask(node, await on_ssd_only(node, "first", 8), FAST)
        for number in range(20):
            tap.now_s += PROBE_S / 5
            verdict = await ask(node, await on_ssd_only(node, f"{number}", 2), FAST)
            assert verdict.tokens == 0
    assert 2 <= node.meter.probes["G3"] <= 4


async def test_without_figures_or_when_told_to_everything_is_loaded(make_node: MakeNode) -> None:
    tap = Tap()
    node = make_node(tap.slow)
    attach(node, tap)
    async with node.running():
        await ask(node, await on_ssd_only(node, "first", 8), FAST)
        unmeasured = await ask(node, await on_ssd_only(node, "second", 8), Pace())
        node.manager.governor.mode = "always_load"
        forced = await ask(node, await on_ssd_only(node, "third", 8), FAST)
    assert (unmeasured.tokens, unmeasured.why) == (128, "unmeasured")
    assert (forced.tokens, forced.why) == (128, "always_load")
    assert node.meter.skipped_tokens == 0


async def test_what_is_skipped_is_neither_claimed_nor_stored_again(make_node: MakeNode) -> None:
    node = make_node()
    items = chunks_of("here", 4)
    node.commit(items)
    pace = Pace(token_s=1e-6, copy_byte_s=1e-3)
    ticket = node.manager.match([wanted(items)], lambda _: None, pace)
    assert list(ticket.states) == [PRESENT] * 4 and not ticket.claims
    ticket = node.manager.match([wanted(items)], lambda _: None, SLOW)
    assert list(ticket.states) == [HERE] * 4
    node.manager.close(ticket)
