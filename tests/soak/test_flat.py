"""What the soak calls growth, on series whose truth is known."""

from __future__ import annotations

import random

import pytest

from tests.soak.flat import SAMPLES_MIN, trend_of

COUNT = 60


def noise(seed: int, spread: float = 4.0) -> list[float]:
    dice = random.Random(seed)
    return [100 + dice.gauss(0, spread) for _ in range(COUNT)]


def test_noise_alone_is_flat() -> None:
    assert not any(trend_of(noise(seed)).grows(0.05) for seed in range(200))


def test_a_leak_within_the_noise_is_found() -> None:
    for seed in range(200):
        leaking = [value + 0.25 * at for at, value in enumerate(noise(seed))]
        trend = trend_of(leaking)
        assert trend.grows(0.05), trend
        assert trend.growth == pytest.approx(0.25 * (COUNT - 1), rel=0.5)


def test_bursts_are_no_growth() -> None:
    values = noise(1)
    for at in (30, 41, 42, 57, 58, 59):
        values[at] *= 20
    assert not trend_of(values).grows(0.05)


def test_what_grows_less_than_it_may_is_flat() -> None:
    rising = [100 + 0.1 * at for at in range(COUNT)]  # without doubt, and by 6 %
    assert trend_of(rising).grows(0.03)
    assert not trend_of(rising).grows(0.10)
    assert not trend_of(rising).grows(0.03, floor=7)


def test_what_falls_is_flat_and_so_is_a_constant() -> None:
    assert not trend_of([100.0 - at for at in range(COUNT)]).grows(0.05)
    assert trend_of([7.0] * COUNT).z == 0


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=str(SAMPLES_MIN)):
        trend_of([1.0] * (SAMPLES_MIN - 1))
