"""Forecasts: of what is known exactly, within bounds, and honest about who spoke."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.forecast import Forecaster, Predictor

PREDICTORS = get_args(Predictor)


def fed(predictor: Predictor, values: list[float], **given: int) -> Forecaster:
    forecaster = Forecaster(predictor, 60.0, points_max=60, **given)
    for number, value in enumerate(values, 1):
        forecaster.add(60.0 * number, 60 * value, 60.0)
    return forecaster


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_load_that_does_not_change_is_forecast_as_it_is(predictor: Predictor) -> None:
    found = fed(predictor, [3.0] * 12).forecast(120)
    assert found is not None
    assert found.requests_per_s == pytest.approx(3.0)


@pytest.mark.parametrize("predictor", ["holt-winters", "arima", "kalman"])
def test_a_load_that_rises_is_forecast_to_rise_on(predictor: Predictor) -> None:
    # A ramp on which nothing is exact, for then there would be no noise to fit.
    values = [1 + 0.2 * n + 0.02 * (n % 3) for n in range(30)]
    found = fed(predictor, values).forecast(300)
    assert found is not None
    assert found.by == predictor
    assert found.requests_per_s > values[-1] + 0.3


def test_what_repeats_is_seen_coming() -> None:
    day = [1.0, 1.0, 1.0, 5.0, 5.0, 1.0]
    found = fed("holt-winters", [*(day * 6), 1.0, 1.0, 1.0], season=6).forecast(60)
    assert found is not None
    assert found.requests_per_s == pytest.approx(5.0, rel=0.2)


def test_hours_without_a_request_before_the_first_are_no_series() -> None:
    forecaster = fed("ewma", [0.0] * 30)
    assert forecaster.forecast(60) is None
    forecaster.add(31 * 60.0, 120.0, 60.0)
    assert forecaster.points == (2.0,)


def test_ticks_that_do_not_divide_a_point_make_rates_all_the_same() -> None:
    forecaster = Forecaster("constant", 60.0, points_max=10)
    for tick in range(1, 30):
        forecaster.add(7.0 * tick, 14.0, 7.0)
    assert forecaster.points == pytest.approx([2.0] * len(forecaster.points))
    assert len(forecaster.points) == 3


def test_the_band_is_as_wide_as_forecasts_were_off() -> None:
    steady = fed("ewma", [3.0] * 20)
    jumpy = Forecaster("ewma", 60.0, points_max=60)
    steady_found = steady.forecast(60)
    found = None
    for number in range(1, 41):
        jumpy.add(60.0 * number, 60 * (2.0 + 2 * (number % 2)), 60.0)
        found = jumpy.forecast(60)
    assert steady_found is not None
    assert found is not None
    assert steady_found.high == pytest.approx(steady_found.requests_per_s)
    assert found.high > found.requests_per_s + 0.5


def test_too_few_points_for_a_model_are_told_by_the_mean() -> None:
    found = fed("arima", [1.0, 2.0]).forecast(60)
    assert found is not None
    assert found.by == "ewma"


@settings(deadline=None, max_examples=10)
@given(
    predictor=st.sampled_from(PREDICTORS),
    values=st.lists(st.floats(0, 1000), min_size=1, max_size=14),
)
def test_no_series_makes_a_forecast_run_away(predictor: Predictor, values: list[float]) -> None:
    found = fed(predictor, values).forecast(180)
    if found is None:
        assert not any(values)
    else:
        assert 0 <= found.low <= found.requests_per_s <= found.high
        assert found.requests_per_s <= 2 * max(values) + 1e-9
