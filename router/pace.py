"""How fast workers are, learnt from what a router is told of its requests.

It knows when a request was sent, hears when its first token came and how its output went on. From
that come seconds per prompt token and per output token, for workers whose node measures nothing.
Both estimates forget exponentially, take a few numbers a worker, and let no single sample move
them far: one counts as at most `CLIP` times, and at least a `CLIP`-th of, what was expected.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import Final

from router.index import WorkerId
from router.workers import Speed

CLIP: Final = 4.0
KEEP: Final = 1 - 1 / 32  # of the past, with each sample
FIRST: Final = 5  # samples before one can be told to be unlikely
TOKENS_MAX: Final = 1e9
TOKENS_FULL: Final = 32
SLOPE_PART_MIN: Final = 20.0
SECONDS_MIN: Final = 1e-6
SECONDS_MAX: Final = 3600.0
CHANGE: Final = 0.02  # less is not worth a change of the workers' table
_RIDGE: Final = 0.02


class PrefillPace:
    """Seconds to the first token as a constant and so many for each token to be computed before it.

    Least squares of the relative error, the constant held towards 0: where all prompts are of one
    length the two cannot be told apart, and all is the tokens'. It begins with the median of the
    first samples, so that none of those misleads it either.
    """

    __slots__ = ("_first", "_ones", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._first: list[tuple[float, float]] = []
        self._ones = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: float, seconds: float, weight: float = 1.0) -> None:
        """A first token came `seconds` after the request was sent; 0 < weight <= 1."""
        if not (1 <= tokens <= TOKENS_MAX and 0 < weight <= 1 and seconds > 0):
            return
        seconds = min(max(seconds, SECONDS_MIN), SECONDS_MAX)
        if len(self._first) < FIRST:
            self._first.append((tokens, seconds))
            if len(self._first) == FIRST:
                ratio = self._first_ratio()
                for tokens_, seconds_ in self._first:
                    likely = _likely(seconds_, ratio * tokens_)
                    self._add(tokens_, likely, 1 / max(likely, seconds_) ** 2)
            return
        constant, slope = self._fit()
        expected = constant + slope * tokens
        self._add(tokens, _likely(seconds, expected), weight / expected**2)

    def per_token_s(self) -> float | None:
        """None before the first sample; else more than 0."""
        if len(self._first) < FIRST:
            return self._first_ratio() if self._first else None
        return self._fit()[1]

    def expected_s(self, tokens: float) -> float | None:
        """None before there are enough samples."""
        if len(self._first) < FIRST:
            return None
        constant, slope = self._fit()
        return constant + slope * tokens

    def _first_ratio(self) -> float:
        return statistics.median(seconds / tokens for tokens, seconds in self._first)

    def _add(self, tokens: float, seconds: float, scale: float) -> None:
        self._ones = self._ones * KEEP + scale
        self._x = self._x * KEEP + scale * tokens
        self._y = self._y * KEEP + scale * seconds
        self._xx = self._xx * KEEP + scale * tokens * tokens
        self._xy = self._xy * KEEP + scale * tokens * seconds

    def _fit(self) -> tuple[float, float]:
        """The constant, and the seconds per token."""
        ratio = self._y / self._x
        ones = self._ones * (1 + _RIDGE)
        determinant = ones * self._xx - self._x * self._x
        slope = (ones * self._xy - self._x * self._y) / determinant if determinant > 0 else ratio
        # Noise may tip the line; computing is never free, and the constant never negative.
        slope = min(max(slope, ratio / SLOPE_PART_MIN), ratio)
        return max(self._y - slope * self._x, 0.0) / ones, slope


class StepPace:
    """Seconds of a decode step: a moving average of logarithms, begun with a median.

    An answer of `TOKENS_FULL` counts in full, a shorter one as the part of them that it has: the
    only gap of an answer of two tokens may be the time that somebody's prompt took.
    """

    __slots__ = ("_first", "_heard", "_log")

    def __init__(self) -> None:
        self._first: list[tuple[float, float]] = []  # logarithms, and how much each counts
        self._heard = 0.0
        self._log = 0.0

    def add(self, seconds: float, tokens: int = TOKENS_FULL) -> None:
        """So many tokens came `seconds` after the one before, on average."""
        if not (seconds > 0 and tokens > 0):
            return
        weight = min(tokens / TOKENS_FULL, 1.0)
        seconds = min(max(seconds, SECONDS_MIN), SECONDS_MAX)
        if self._heard < FIRST:
            self._first.append((math.log(seconds), weight))
            self._heard += weight
            self._log = _median(self._first)
            return
        likely = _likely(seconds, math.exp(self._log))
        self._log += weight * (1 - KEEP) * (math.log(likely) - self._log)

    def step_s(self) -> float | None:
        """None before one answer's worth of samples; else more than 0."""
        return math.exp(self._log) if self._heard >= 1.0 else None


@dataclass(slots=True)
class _Known:
    assumed: Speed
    current: Speed
    prefill: PrefillPace = field(default_factory=PrefillPace)
    step: StepPace = field(default_factory=StepPace)


class Paces:
    """Of all workers of one router. One thread calls it."""

    def __init__(self) -> None:
        self._known: dict[WorkerId, _Known] = {}

    def add(self, worker: WorkerId, assumed: Speed) -> None:
        self._known[worker] = _Known(assumed, assumed)

    def forget(self, worker: WorkerId) -> None:
        self._known.pop(worker, None)

    def of(self, worker: WorkerId) -> Speed:
        """What was assumed, with what has been learnt in its place. The worker was added."""
        return self._known[worker].current

    def learnt(self, worker: WorkerId) -> tuple[bool, bool]:
        """Whether its prefill, and its decode step, are no assumptions any more."""
        known = self._known.get(worker)
        if known is None:
            return False, False
        return known.prefill.per_token_s() is not None, known.step.step_s() is not None

    def prefilled(
        self, worker: WorkerId, new_tokens: float, waiting_tokens: float, seconds: float
    ) -> bool:
        """The worker took so long for what was before it and its own. Whether that changes `of`.

        What was before it may have been computed in part already, so that the more there was the
        less it says.
        """
        known = self._known.get(worker)
        if known is None or new_tokens <= 0:
            return False
        tokens = new_tokens + max(waiting_tokens, 0.0)
        known.prefill.add(tokens, seconds, new_tokens / tokens)
        return _has_changed(known)

    def decoded(self, worker: WorkerId, tokens: int, seconds: float) -> bool:
        """So many tokens came in so long, after the first one. Whether that changes `of`."""
        known = self._known.get(worker)
        if known is None or tokens < 1:
            return False
        known.step.add(seconds / tokens, tokens)
        return _has_changed(known)


def with_step(speed: Speed, step_s: float) -> Speed:
    """What a request or a block adds was assumed as a part of a step, and stays that part."""
    scale = step_s / speed.step_s
    return replace(
        speed,
        step_s=step_s,
        step_s_per_request=speed.step_s_per_request * scale,
        step_s_per_block=speed.step_s_per_block * scale,
    )


def _likely(seconds: float, expected: float) -> float:
    return min(max(seconds, expected / CLIP), expected * CLIP)


def _median(weighted: list[tuple[float, float]]) -> float:
    """The least value that half of the weight is not above; of equal halves, between the two."""
    ordered = sorted(weighted)
    half, below = sum(weight for _, weight in ordered) / 2, 0.0
    for index, (value, weight) in enumerate(ordered):
        below += weight
        if below > half:
            return value
        if below == half:
            return (value + ordered[index + 1][0]) / 2
    return ordered[-1][0]


def _has_changed(known: _Known) -> bool:
    before, speed = known.current, known.assumed
    if (step := known.step.step_s()) is not None:
        speed = with_step(speed, step)
    if (per_token := known.prefill.per_token_s()) is not None:
        speed = replace(speed, prefill_s_per_token=per_token)
    if _is_near(speed.prefill_s_per_token, before.prefill_s_per_token) and _is_near(
        speed.step_s, before.step_s
    ):
        return False
    known.current = speed
    return True


def _is_near(now: float, before: float) -> bool:
    return abs(now - before) <= CHANGE * before
