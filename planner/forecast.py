"""What load is coming: requests a second some time ahead, and how far off such forecasts were.

The series is of whole buckets of time. `constant` and `ewma` are arithmetic; Holt-Winters, ARIMA
and the Kalman filter (a local linear trend) are statsmodels', imported when they are first asked.
A model that cannot be fitted falls back to the moving mean, and the forecast says which one spoke.
The band comes of the errors that earlier forecasts for as far ahead turned out to have.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Predictor = Literal["constant", "ewma", "holt-winters", "arima", "kalman"]

POINTS_MIN: Final = 5  # fewer are no series; the reference's, too
EWMA_GAIN: Final = 0.4
ERRORS_KEPT: Final = 30
ARIMA_ORDER: Final = (1, 1, 1)  # a random walk with a trend that lasts for a while


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests a second: the most that is expected at any time up to `ahead_s` from now."""

    requests_per_s: float
    high: float
    low: float
    ahead_s: float
    by: str  # the model that spoke; another than asked for where that could not

    def __post_init__(self) -> None:
        assert 0 <= self.low <= self.requests_per_s <= self.high


class Forecaster:
    """One series; `add` as time goes on, `forecast` at any time."""

    def __init__(
        self,
        predictor: Predictor,
        bucket_s: float,
        *,
        points_max: int,
        season: int = 0,
        headroom: float = 1.0,
    ) -> None:
        """`season`: points after which the load repeats, for Holt-Winters; 0: it does not.

        `headroom`: how many mean errors above the forecast `high` is.
        """
        assert points_max >= POINTS_MIN
        self._predictor = predictor
        self._bucket_s = bucket_s
        self._season = season
        self._headroom = headroom
        self._points: deque[float] = deque(maxlen=points_max)
        self._points_total = 0
        self._begun_s: float | None = None
        self._requests = 0.0
        self._made: tuple[int, int, float, str] | None = None  # points, steps, value, by
        self._awaited: deque[tuple[int, float]] = deque(maxlen=points_max)  # point, what was said
        self._errors: deque[float] = deque(maxlen=ERRORS_KEPT)

    @property
    def points(self) -> tuple[float, ...]:
        return tuple(self._points)

    def add(self, at_s: float, requests: float, seconds: float) -> None:
        """So many requests came in the seconds before `at_s`."""
        if self._begun_s is None:
            self._begun_s = at_s - seconds
        self._requests += requests
        elapsed_s = at_s - self._begun_s
        if elapsed_s < self._bucket_s * 0.999:
            return
        point = self._requests / elapsed_s
        self._begun_s, self._requests = at_s, 0.0
        if not self._points and point == 0:
            return  # before the first request there is no series
        while self._awaited and self._awaited[0][0] <= self._points_total:
            due, said = self._awaited.popleft()
            if due == self._points_total:
                self._errors.append(point - said)
        self._points.append(point)
        self._points_total += 1

    def forecast(self, ahead_s: float) -> Forecast | None:
        """None until there is a point."""
        if not self._points:
            return None
        steps = max(math.ceil(ahead_s / self._bucket_s), 1)
        if self._made is None or self._made[:2] != (self._points_total, steps):
            path, by = self._path(steps)
            if self._made is None or self._made[0] != self._points_total:
                self._awaited.append((self._points_total + steps - 1, path[-1]))
            self._made = self._points_total, steps, max(path), by
        value, by = self._made[2], self._made[3]
        off = self._headroom * self._error()
        return Forecast(value, value + off, max(value - off, 0.0), ahead_s, by)

    def _error(self) -> float:
        """The root mean square of what the latest forecasts were off by."""
        if not self._errors:
            return 0.0
        return math.sqrt(sum(e * e for e in self._errors) / len(self._errors))

    def _path(self, steps: int) -> tuple[list[float], str]:
        points = list(self._points)
        fit = _FITS.get(self._predictor)
        by: str = self._predictor
        path: Sequence[float] | None = None
        if fit is not None and len(points) >= POINTS_MIN and max(points) > min(points):
            path = _fitted(fit, points, steps, self._season)
        if path is None:
            by = "constant" if self._predictor == "constant" else "ewma"
            path = [points[-1] if by == "constant" else _ewma(points)] * steps
        # No model may run away: twice the most that was ever seen is as far as it is believed.
        most = 2 * max(points)
        return [min(max(float(value), 0.0), most) for value in path], by


def _ewma(points: Sequence[float]) -> float:
    level = points[0]
    for point in points[1:]:
        level += EWMA_GAIN * (point - level)
    return level


Fit = Callable[[list[float], int, int], Sequence[float]]


def _fitted(fit: Fit, points: list[float], steps: int, season: int) -> Sequence[float] | None:
    """None where the model cannot be fitted to these points."""
    import statsmodels.tools.sm_exceptions  # noqa: F401 (which has all its warnings shown)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: the path is checked instead
        try:
            path = [float(value) for value in fit(points, steps, season)]
        except (ValueError, ArithmeticError, IndexError):  # LinAlgError is a ValueError
            return None
    return path if all(math.isfinite(value) for value in path) else None


def _holt_winters(points: list[float], steps: int, season: int) -> Sequence[float]:
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    seasonal = season > 1 and len(points) >= 2 * season
    model = ExponentialSmoothing(
        points,
        trend="add",
        damped_trend=True,
        seasonal="add" if seasonal else None,
        seasonal_periods=season if seasonal else None,
        initialization_method="estimated",
    )
    path: Sequence[float] = model.fit().forecast(steps)
    return path


def _arima(points: list[float], steps: int, _season: int) -> Sequence[float]:
    from statsmodels.tsa.arima.model import ARIMA

    path: Sequence[float] = ARIMA(points, order=ARIMA_ORDER).fit().forecast(steps)
    return path


def _kalman(points: list[float], steps: int, _season: int) -> Sequence[float]:
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    model = UnobservedComponents(points, level="local linear trend")
    path: Sequence[float] = model.fit(disp=0).forecast(steps)
    return path


_FITS: Final[dict[str, Fit]] = {
    "holt-winters": _holt_winters,
    "arima": _arima,
    "kalman": _kalman,
}
