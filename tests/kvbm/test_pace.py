"""What is learnt of speeds from samples: how near, how soon, and what cannot mislead it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.pace import COPY_STALE_S, REFIT_S, Costs, EnginePace, TierPace
from kvbm.protocol import Pace

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def bring(pace: TierPace, clock: Clock, size: int, seconds: float) -> None:
    """One batch alone, and a pause."""
    batch = pace.begin(size)
    clock.now_s += seconds
    pace.end(batch, size)
    clock.now_s += REFIT_S


# -- costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_costs_are_found_under_noise_and_outliers(clock: Clock, seed: int) -> None:
    """A fifth of the samples is off by up to five times, all by a tenth."""
    rng = random.Random(seed)
    costs = Costs((1e-2, 1e-6, 1e-3), (48, 1e9), clock)
    for _ in range(48):
        tokens, depth = rng.choice([64, 300, 1024, 2048]), rng.choice([0, 2048, 8192, 16384])
        pairs = tokens * depth + tokens**2 / 2
        seconds = (0.004 + 2e-4 * tokens + 3e-8 * pairs) * rng.uniform(0.9, 1.1)
        costs.add((1, tokens, pairs), seconds * rng.choice([1, 1, 1, 1, rng.choice([0.2, 5])]))
    found = costs.now()
    assert found is not None
    for tokens, depth in ((2048, 0), (2048, 16384), (16384, 16384)):
        pairs = tokens * depth + tokens**2 / 2
        true_s = 0.004 + 2e-4 * tokens + 3e-8 * pairs
        said_s = found[0] + found[1] * tokens + found[2] * pairs
        assert said_s == pytest.approx(true_s, rel=0.2)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.tuples(st.integers(0, 1), st.integers(1, 1 << 34)),
            st.floats(0, 1e5, allow_nan=False),
        ),
        max_size=60,
    )
)
def test_no_cost_is_ever_negative_or_no_number(
    samples: list[tuple[tuple[int, int], float]],
) -> None:
    costs = Costs((1e-3, 1e-6), (3, 5), Clock())
    for amounts, seconds in samples:
        costs.add(amounts, seconds)
    found = costs.now()
    if any(seconds >= 1e-7 for _, seconds in samples):
        assert found is not None
        assert Pace(*found).is_sound
    else:
        assert found is None


# -- tiers ------------------------------------------------------------------------------


def test_a_tiers_start_and_its_bytes_are_told_apart(clock: Clock) -> None:
    pace = TierPace(clock)
    assert pace.costs is None and pace.stuck_s == 0
    for size in (MIB, 16 * MIB, 4 * MIB, 16 * MIB):
        bring(pace, clock, size, 0.02 + size / 1e8)
    assert pace.costs == pytest.approx((0.02, 1e-8), rel=0.01)


def test_batches_that_share_the_medium_are_measured_together(clock: Clock) -> None:
    """Two at a time, each half as fast: the tier's speed is that of both."""
    pace = TierPace(clock)
    running = [pace.begin(MIB), pace.begin(MIB)]
    for _ in range(12):
        clock.now_s += MIB / 1e8
        pace.end(running.pop(0), MIB)
        running.append(pace.begin(MIB))
    found = pace.costs
    assert found is not None
    assert found[1] == pytest.approx(1e-8, rel=0.1)


def test_after_a_pause_one_new_measurement_outweighs_the_old_ones(clock: Clock) -> None:
    pace = TierPace(clock)
    for _ in range(20):
        bring(pace, clock, MIB, MIB / 1e6)
    clock.now_s += 30
    bring(pace, clock, MIB, MIB / 1e9)
    found = pace.costs
    assert found is not None
    assert found[0] + found[1] * MIB == pytest.approx(MIB / 1e9, rel=0.1)


def test_a_tier_that_turns_slow_under_load_is_believed_after_a_few(clock: Clock) -> None:
    pace = TierPace(clock)
    for _ in range(20):
        bring(pace, clock, MIB, 0.001)
    for _ in range(5):
        bring(pace, clock, MIB, 1.0)
    found = pace.costs
    assert found is not None
    assert found[0] + found[1] * MIB == pytest.approx(1.0, rel=0.1)


def test_what_is_on_its_way_for_long_shows_before_it_ends(clock: Clock) -> None:
    pace = TierPace(clock)
    batch = pace.begin(MIB)
    clock.now_s += 3
    pace.begin(MIB)
    assert pace.stuck_s == 3
    pace.end(batch, MIB)
    assert pace.stuck_s == 0


def test_a_quick_failure_is_no_speed_and_a_slow_one_is_slowness(clock: Clock) -> None:
    pace = TierPace(clock)
    bring(pace, clock, MIB, 0.01)
    before = pace.costs
    quick = pace.begin(MIB)
    clock.now_s += 0.0001
    pace.end(quick, 0)
    clock.now_s += REFIT_S
    assert pace.costs == before and pace.samples == 1
    clock.now_s += 20
    slow = pace.begin(MIB)
    clock.now_s += 30
    pace.end(slow, 0)
    found = pace.costs
    assert found is not None
    assert found[0] + found[1] * MIB == pytest.approx(30, rel=0.1)


# -- the engine -------------------------------------------------------------------------


def seconds_of(spans: list[tuple[int, int]], token_s: float, pair_s: float) -> float:
    return sum(n * token_s + pair_s * (n * at + n * n / 2) for at, n in spans)


def test_deeper_tokens_are_found_to_cost_more(clock: Clock) -> None:
    pace = EnginePace(clock)
    assert not pace.now().is_measured
    for at in range(0, 20480, 2048):
        clock.now_s += REFIT_S
        pace.note_prefill([(at, 2048)], seconds_of([(at, 2048)], 1e-4, 2e-8))
    found = pace.now()
    assert found.prefill_s(0, 20480) == pytest.approx(
        seconds_of([(0, 20480)], 1e-4, 2e-8), rel=0.02
    )
    assert found.prefill_s(0, 1000) < found.prefill_s(16000, 17000)
    assert found.prefill_s(500, 500) == found.prefill_s(600, 500) == 0


def test_steps_all_alike_are_taken_for_a_cost_of_tokens(clock: Clock) -> None:
    """Were it taken for one of steps, a prefix would seem to save nothing."""
    pace = EnginePace(clock)
    for _ in range(10):
        clock.now_s += REFIT_S
        pace.note_prefill([(0, 2048)], 0.5)
    assert pace.now().prefill_s(0, 20480) == pytest.approx(5, rel=0.05)


def test_steps_of_a_few_tokens_say_nothing_of_prefill(clock: Clock) -> None:
    pace = EnginePace(clock)
    pace.note_prefill([(4000, 8), (0, 8)], 0.5)
    assert not pace.now().is_measured


def test_loads_not_measured_for_long_count_as_not_known(clock: Clock) -> None:
    """Who judged them too slow would never try one again."""
    pace = EnginePace(clock)
    for size in (MIB, 8 * MIB, 2 * MIB):
        pace.note_load(size, 0.01 + size / 1e9)
        clock.now_s += REFIT_S
    found = pace.now()
    assert (found.copy_s, found.copy_byte_s) == pytest.approx((0.01, 1e-9), rel=0.02)
    clock.now_s += COPY_STALE_S + 1
    assert pace.now() == Pace()


@pytest.mark.parametrize("make", [TierPace, EnginePace])
def test_paces_begin_with_nothing(make: Callable[[Clock], object], clock: Clock) -> None:
    found = make(clock)
    if isinstance(found, TierPace):
        assert found.idle_s == float("inf") and found.samples == 0
    else:
        assert isinstance(found, EnginePace) and found.now() == Pace()
