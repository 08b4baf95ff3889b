"""What routers learn of workers' speeds: right where all is calm, hard to mislead, always sane."""

from __future__ import annotations

import math
import random

from hypothesis import example, given
from hypothesis import strategies as st

from router.index import WorkerId
from router.pace import CLIP, TOKENS_FULL, Paces, PrefillPace, StepPace
from router.workers import Speed

SECONDS = st.floats(1e-5, 10.0)
TOKENS = st.integers(1, 200_000)
ANYTHING = st.floats(allow_nan=True, allow_infinity=True)


def near(found: float | None, wanted: float, tolerance: float) -> bool:
    return found is not None and abs(found - wanted) <= tolerance * wanted


@given(st.floats(1e-6, 1e-2), st.floats(0.0, 0.2), st.integers(0, 2**32))
def test_calm_samples_of_all_lengths_tell_the_constant_and_the_slope(
    slope: float, constant: float, seed: int
) -> None:
    dice, pace = random.Random(seed), PrefillPace()
    for _ in range(250):
        tokens = dice.choice([50, 200, 1000, 4000, 16000, 64000])
        pace.add(tokens, constant + slope * tokens)
    for tokens in (200, 16000):
        assert near(pace.expected_s(tokens), constant + slope * tokens, 0.1)
    # The slope shows only where it is more than the constant hides.
    if slope * 4000 > constant:
        assert near(pace.per_token_s(), slope, 0.1)


@given(SECONDS, TOKENS)
def test_prompts_of_one_length_give_their_mean_per_token(seconds: float, tokens: int) -> None:
    pace = PrefillPace()
    for _ in range(20):
        pace.add(tokens, seconds)
    assert near(pace.per_token_s(), seconds / tokens, 1e-6)


@given(st.floats(1e-5, 1e-2), st.floats(1e-9, 1e9), st.integers(0, 2**32))
def test_one_outlier_moves_little_and_is_forgotten(slope: float, wild: float, seed: int) -> None:
    dice, pace, step = random.Random(seed), PrefillPace(), StepPace()
    lengths = [dice.randrange(500, 8000) for _ in range(200)]
    for tokens in lengths[:50]:
        pace.add(tokens, slope * tokens)
        step.add(slope)
    pace.add(2000, wild)
    step.add(wild)
    after = pace.per_token_s()
    assert after is not None and slope / 1.5 <= after <= 1.5 * slope
    stepped = step.step_s()
    assert stepped is not None and slope / CLIP ** (1 / 8) <= stepped <= slope * CLIP ** (1 / 8)
    for tokens in lengths[50:]:
        pace.add(tokens, slope * tokens)
        step.add(slope)
    assert near(pace.per_token_s(), slope, 0.05) and near(step.step_s(), slope, 0.05)


@given(
    st.floats(1e-5, 1e-2),
    st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=2),
    st.integers(0, 2**32),
)
def test_two_wild_ones_among_the_first_do_not_mislead(
    slope: float, wild: list[float], seed: int
) -> None:
    dice, pace, step = random.Random(seed), PrefillPace(), StepPace()
    first = [*wild, None, None, None]
    dice.shuffle(first)
    for one in first:
        tokens = dice.randrange(500, 8000)
        pace.add(tokens, slope * tokens if one is None else one)
        step.add(slope if one is None else one)
    assert near(step.step_s(), slope, 1e-6)
    for _ in range(150):
        tokens = dice.randrange(500, 8000)
        pace.add(tokens, slope * tokens)
    assert near(pace.per_token_s(), slope, 0.1)


@given(st.floats(1e-5, 1e-2), st.sampled_from([0.1, 0.5, 2.0, 10.0]), st.integers(0, 2**32))
def test_a_worker_that_becomes_another_is_followed(slope: float, by: float, seed: int) -> None:
    dice, pace, step = random.Random(seed), PrefillPace(), StepPace()
    for n in range(400):
        now = slope if n < 100 else slope * by
        tokens = dice.randrange(500, 8000)
        pace.add(tokens, now * tokens)
        step.add(now)
    assert near(pace.per_token_s(), slope * by, 0.1) and near(step.step_s(), slope * by, 0.1)


@given(st.floats(1e-5, 1e-2), st.integers(0, 2**32))
def test_short_answers_say_little_of_a_step(slope: float, seed: int) -> None:
    """Each waited for somebody's prompt in its only step."""
    dice, step = random.Random(seed), StepPace()
    kinds = [True] * 200 + [False] * 40
    dice.shuffle(kinds)
    for is_short in kinds:
        if is_short:
            step.add(slope * dice.uniform(10, 1000), 1)
        else:
            step.add(slope, 100)
    found = step.step_s()
    assert found is not None and slope <= found <= slope * CLIP ** (1 / 2)


def test_a_step_is_not_known_from_a_few_tokens() -> None:
    step = StepPace()
    for _ in range(TOKENS_FULL):
        assert step.step_s() is None
        step.add(0.01, 1)
    assert near(step.step_s(), 0.01, 1e-9)
    for wrong in (0.0, -1.0, math.nan):
        step.add(wrong, 1)
    step.add(1.0, 0)
    assert near(step.step_s(), 0.01, 1e-9)


@given(st.lists(st.tuples(ANYTHING, ANYTHING, ANYTHING), max_size=60))
@example(samples=[(2.2e-309, 1.0, 1.0)])
def test_whatever_is_told_estimates_are_positive_numbers(
    samples: list[tuple[float, float, float]],
) -> None:
    pace, step = PrefillPace(), StepPace()
    for tokens, seconds, weight in samples:
        pace.add(tokens, seconds, weight)
        step.add(seconds)
        for found in (pace.per_token_s(), pace.expected_s(1000), step.step_s()):
            assert found is None or (math.isfinite(found) and found > 0)


def test_what_a_request_adds_to_a_step_stays_its_part() -> None:
    paces, worker = Paces(), WorkerId(1)
    paces.add(worker, Speed(step_s=0.01, step_s_per_request=0.001, step_s_per_block=1e-5))
    assert paces.learnt(worker) == (False, False)
    assert paces.decoded(worker, 40, 0.8)
    speed = paces.of(worker)
    assert near(speed.step_s, 0.02, 1e-9) and near(speed.step_s_per_request, 0.002, 1e-9)
    assert not paces.decoded(worker, 40, 0.8)  # nothing new
    assert paces.prefilled(worker, 100, 0, 0.5)
    assert near(paces.of(worker).prefill_s_per_token, 0.005, 1e-9)
    paces.forget(worker)
    assert not paces.prefilled(worker, 100, 0, 0.5) and paces.learnt(worker) == (False, False)
