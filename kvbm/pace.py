"""How fast things are, learnt from what they took: tiers, copies into the engine, prefill.

Every estimate is a sum of costs, such as seconds per batch plus seconds per byte, fitted to recent
samples so that the median of the relative errors counts and single hiccups do not. Samples fade
with their number and with time: after a pause the first new one outweighs all old ones.
The engine keeps an `EnginePace` and tells it with each lookup; the daemon a `TierPace` per tier.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.protocol import Pace

SAMPLES_MAX: Final = 48
REFIT_S: Final = 0.5
"""Estimates are made anew at most this often: a fit takes up to a millisecond."""

TIER_HALF_LIFE: Final = (3.0, 5.0)
ENGINE_HALF_LIFE: Final = (8.0, 60.0)
"""A sample counts half after so many others, or so many seconds."""

SEGMENT_BATCHES: Final = 4
COPY_STALE_S: Final = 30.0
PREFILL_TOKENS_MIN: Final = 32

_ROUNDS: Final = 8
_ERROR_MIN: Final = 0.01
_PREDICTED_MIN: Final = 1e-4
_SECONDS_MIN: Final = 1e-7

Floats = npt.NDArray[np.float64]
Clock = Callable[[], float]


class Costs:
    """Fits seconds = sum of cost x amount over the samples, with no cost below 0.

    `doubts` has one number per cost: how much evidence it takes to believe in it. Amounts that
    always occur together cannot be told apart; the less doubted cost then gets the blame.
    """

    def __init__(
        self,
        doubts: Sequence[float],
        half_life: tuple[float, float],
        clock: Clock = time.monotonic,
    ) -> None:
        self._doubts = np.asarray(doubts, dtype=np.float64)
        self._half_life = half_life
        self._clock = clock
        self._samples: deque[tuple[float, tuple[float, ...], float]] = deque(maxlen=SAMPLES_MAX)
        self._fitted: tuple[float, ...] | None = None
        self._fitted_at = -math.inf
        self._is_current = True

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def measured_at(self) -> float:
        """When the latest sample came, by the clock; minus infinity before the first."""
        return self._samples[-1][0] if self._samples else -math.inf

    def add(self, amounts: Sequence[float], seconds: float) -> None:
        if seconds >= _SECONDS_MIN:
            self._samples.append((self._clock(), tuple(amounts), seconds))
            self._is_current = False

    def now(self) -> tuple[float, ...] | None:
        """Each cost in seconds per unit of its amount; None before the first sample."""
        if not self._is_current and self._clock() - self._fitted_at >= REFIT_S:
            self._fitted = self._fit()
            self._fitted_at = self._clock()
            self._is_current = True
        return self._fitted

    def _fit(self) -> tuple[float, ...]:
        at, amounts, seconds = (np.asarray(part) for part in zip(*self._samples, strict=True))
        newer = np.arange(len(at))[::-1]
        half_samples, half_s = self._half_life
        weights = 0.5 ** (newer / half_samples + (at[-1] - at) / half_s)
        # Seen from its own seconds a sample much slower than the rest hardly counts, from common
        # ones it outweighs them: a fit from either side, and the nearer one is taken.
        units = (seconds, seconds.mean())
        fits = [self._fit_from(amounts, seconds, weights, unit) for unit in units]
        return min(fits, key=lambda fit: fit[0])[1]

    def _fit_from(
        self, amounts: Floats, seconds: Floats, weights: Floats, unit: Floats | np.float64
    ) -> tuple[float, tuple[float, ...]]:
        """How far off the fit is that begins with errors told in `unit`, and its costs."""
        rows = amounts / seconds[:, None]
        worth = weights * (seconds / unit) ** 2
        scale = worth @ rows / worth.sum()
        costs = np.zeros(len(scale))
        used = np.flatnonzero(scale > 0)
        while used.size:
            shares = _median_fit(rows[:, used] / scale[used], weights, worth, self._doubts[used])
            if (shares >= 0).all():
                costs[used] = shares / scale[used]
                break
            used = np.delete(used, shares.argmin())
        errors = np.log(np.maximum(rows @ costs, _PREDICTED_MIN))
        return float(weights @ np.abs(errors)), tuple(costs.tolist())


def _median_fit(rows: Floats, weights: Floats, worth: Floats, doubts: Floats) -> Floats:
    """Coefficients for which rows @ coefficients is nearest to 1, by the sum of log errors:
    twice as long is as wrong as half as long.

    Iteratively reweighted least squares, `worth` being the first weights; `doubts` pull their
    coefficient toward 0.
    """
    found = np.zeros(len(doubts))
    for _ in range(_ROUNDS):
        weighted = rows.T * worth
        pull = np.diag(doubts * worth.sum())
        found = np.linalg.lstsq(weighted @ rows + pull, weighted.sum(axis=1), rcond=None)[0]
        predicted = np.maximum(rows @ found, _PREDICTED_MIN)
        # So weighted, squares change with the coefficients as the log errors do.
        worth = weights / (predicted * np.maximum(np.abs(1 - predicted), _ERROR_MIN))
    return found


class TierPace:
    """What batches brought up from one tier took: seconds per start, seconds per byte.

    Batches overlap and share the medium, so what is measured are segments of the time in which
    any is on its way: until none is, or a few have ended.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._costs = Costs((1e-3, 1e-6), TIER_HALF_LIFE, clock)
        self._running: dict[int, tuple[float, int]] = {}  # batch -> when it began, its bytes
        self._next = 0
        self._segment_at = 0.0
        self._segment_starts = 0
        self._segment_bytes = self._segment_asked_bytes = 0
        self._segment_batches = 0

    @property
    def samples(self) -> int:
        return len(self._costs)

    @property
    def idle_s(self) -> float:
        """Since the latest measurement; infinite before the first."""
        return self._clock() - self._costs.measured_at

    @property
    def stuck_s(self) -> float:
        """How long the oldest batch has been on its way; 0 if none is."""
        return self._clock() - min(self._running.values())[0] if self._running else 0.0

    @property
    def costs(self) -> tuple[float, float] | None:
        """(seconds to begin, seconds per byte), None before the first measurement."""
        found = self._costs.now()
        return None if found is None else (found[0], found[1])

    def begin(self, size: int) -> int:
        """A batch of so many bytes starts; the number to end it with."""
        if not self._running:
            self._cut_segment(starts=1)
        self._next += 1
        self._running[self._next] = self._clock(), size
        return self._next

    def end(self, batch: int, loaded_bytes: int) -> None:
        """It ended and brought so many bytes of what was asked."""
        _, size = self._running.pop(batch)
        self._segment_bytes += loaded_bytes
        self._segment_asked_bytes += size
        self._segment_batches += 1
        if self._running and self._segment_batches < SEGMENT_BATCHES:
            return
        seconds = self._clock() - self._segment_at
        size = self._segment_bytes or self._slow_failure_bytes(seconds)
        if size:
            self._costs.add((self._segment_starts, size), seconds)
        self._cut_segment(starts=0)

    def _slow_failure_bytes(self, seconds: float) -> int:
        """What failed says nothing about speed, unless it took longer than success would have."""
        begin_s, byte_s = self.costs or (0.0, 0.0)
        is_slow = seconds > begin_s + self._segment_asked_bytes * byte_s
        return self._segment_asked_bytes if is_slow else 0

    def _cut_segment(self, starts: int) -> None:
        self._segment_at = self._clock()
        self._segment_starts = starts
        self._segment_bytes = self._segment_asked_bytes = self._segment_batches = 0


class EnginePace:
    """What an engine's prefill steps and loads took."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        # A step's fixed part is paid whether or not there is a prefix to load: it is fitted so
        # that it is not taken for a cost of tokens, and not told.
        self._prefill = Costs((1e-2, 1e-6, 1e-3), ENGINE_HALF_LIFE, clock)
        self._copies = Costs((1e-3, 1e-6), TIER_HALF_LIFE, clock)

    def note_prefill(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step computed these (position, tokens) of prompts, and next to nothing else."""
        tokens = sum(count for _, count in spans)
        pairs = sum(count * position + count * count / 2 for position, count in spans)
        if tokens >= PREFILL_TOKENS_MIN:
            self._prefill.add((1.0, tokens, pairs), seconds)

    def note_load(self, size: int, seconds: float) -> None:
        """So many bytes came from host memory into the engine, from asking for it to its end."""
        if size > 0:
            self._copies.add((1.0, size), seconds)

    def now(self) -> Pace:
        """What is known; 0 for what is not.

        Loads that were not measured for a while count as not known: whoever judged them too slow
        would otherwise never try again.
        """
        prefill = self._prefill.now() or (0.0, 0.0, 0.0)
        is_stale = self._clock() - self._copies.measured_at > COPY_STALE_S
        copies = (0.0, 0.0) if is_stale else self._copies.now() or (0.0, 0.0)
        return Pace(prefill[1], prefill[2], copies[0], copies[1])
