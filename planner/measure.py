"""An engine's speed: what a profile or its node says of it, corrected by what engines take.

Each half minute of an engine that was busy is one equation: its mean time between tokens is that
of a decode step of so many sequences and so much KV, plus the prompt tokens computed in that time.
The few unknowns are the least-squares solution of the latest looks (none negative); the profile
stands for `PROFILE_WEIGHT` looks, so that it rules at first and is overruled by what is measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
import numpy as np

from planner.observe import EngineLoad, Observation, Told
from planner.perf import Room, Speed, Work
from runtime.engine_card import Role

PROFILE_WEIGHT: Final = 8
KINDS: Final = 16
"""Looks are kept apart by how many sequences ran and how much was computed, so that the many alike
of a quiet hour do not push out the few that tell what a busy engine takes."""
BUCKET_BASE: Final = 2.0
LOOK_S: Final = 30.0
"""Of a shorter look the prompts that were computed in it are too few to tell what one takes."""

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class ProfileRefused(ValueError):
    """A profile that cannot be used; says what is wrong and what is accepted."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured points: seconds of a prefill of so many tokens, after none; seconds of a decode
    step of so many sequences with so many tokens of KV in all. `load_s_per_token` is by tier."""

    prefill: list[tuple[Positive, Positive]]
    decode: list[tuple[Positive, NotNegative, Positive]]
    load_s_per_token: dict[str, NotNegative] = {}
    kv_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    sequences: Annotated[int, msgspec.Meta(ge=1)] = 256

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of JSON. Raises ProfileRefused, or OSError."""
        try:
            profile = msgspec.json.decode(path.read_bytes(), type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProfileRefused(f"the profile {path}: {error}") from error
        if len(profile.prefill) < 2 or len(profile.decode) < 2:
            raise ProfileRefused(
                f"the profile {path} has {len(profile.prefill)} points of prefill and "
                f"{len(profile.decode)} of decode; at least 2 of each are needed"
            )
        return profile

    def speed(self) -> Speed:
        """The model of `perf` that is nearest to the points, each by its own measure."""
        tokens = np.array([point[0] for point in self.prefill])
        taken = np.array([point[1] for point in self.prefill])
        token_s, pair_s = _least([tokens, tokens**2 / 2], taken)
        rows = np.array(self.decode)
        step_s, sequence_s, kv_token_s = _least(
            [np.ones(len(rows)), rows[:, 0], rows[:, 1]], rows[:, 2]
        )
        return Speed(step_s, token_s, pair_s, sequence_s, kv_token_s, dict(self.load_s_per_token))

    @property
    def room(self) -> Room:
        return Room(self.kv_tokens, self.sequences)


@dataclass(frozen=True, slots=True)
class Look:
    itl_s: float
    running: float
    kv_tokens: float
    computed_in_itl: float  # prompt tokens
    positions: float  # tokens that each of them saw, the mean


class Measurement:
    """The speed of one pool's engines, which are alike."""

    def __init__(self, role: Role, prior: Speed | None, *, looks_max: int, looks_min: int) -> None:
        assert looks_max >= looks_min >= 1
        self._role = role
        self._prior = prior
        self._looks_min = looks_min
        self._per_kind = max(looks_max // KINDS, 1)
        self._looks: dict[tuple[int, int], deque[Look]] = {}
        self._speed: Speed | None = None
        self._stale = False
        self._open: dict[str, _Open] = {}
        self._told = Told()

    @property
    def looks(self) -> int:
        return sum(map(len, self._looks.values()))

    def add(self, seen: Observation, work: Work | None) -> None:
        there = [e for e in seen.engines if e.role == self._role and e.phase != "starting"]
        for engine in there:
            self._add(engine, work)
        for name in self._open.keys() - {engine.name for engine in there}:
            del self._open[name]
        told = _median([engine.told for engine in there])
        if told != self._told:
            self._told, self._stale = told, True

    def speed(self) -> Speed | None:
        """None while there is neither a profile nor enough that was measured."""
        if self.looks < self._looks_min:
            return self._base
        if self._stale:
            self._speed, self._stale = self._fitted(), False
        return self._speed

    @property
    def _base(self) -> Speed | None:
        """The profile, with what nodes measured of the same instead."""
        prior, told = self._prior, self._told
        if prior is None:
            # One that only computes prompts has no time between tokens to learn from.
            known = self._role == "prefill" and told.token_s
            return Speed(0.0, told.token_s, told.pair_s, load_s=told.load_s) if known else None
        if told.token_s:
            prior = replace(prior, token_s=told.token_s, pair_s=told.pair_s)
        return replace(prior, load_s={**prior.load_s, **told.load_s})

    def _add(self, engine: EngineLoad, work: Work | None) -> None:
        if engine.seconds is None:
            self._open.pop(engine.name, None)
            return
        look = self._open.setdefault(engine.name, _Open())
        look.add(engine)
        if look.seconds < LOOK_S:
            return
        del self._open[engine.name]
        if not look.intervals or look.running < 1 or not look.itl_s:
            return
        itl_s = look.itl_s / look.intervals
        positions = 0.0 if work is None else work.cached_tokens + work.computed_tokens / 2
        computed = look.computed_tokens / look.seconds * itl_s
        made = Look(itl_s, look.running, look.kv_tokens, computed, positions)
        kind = _bucket(made.running), _bucket(made.computed_in_itl)
        self._looks.setdefault(kind, deque(maxlen=self._per_kind)).append(made)
        self._stale = True

    def _fitted(self) -> Speed | None:
        """Unknowns: step_s, sequence_s, kv_token_s, token_s. What a pair takes beside a token is
        the node's or the profile's: no look tells them apart."""
        prior, node = self._base, self._told
        known = prior or Speed(0.0, node.token_s, node.pair_s, load_s=node.load_s)
        per_token = known.pair_s / known.token_s if known.token_s else 0.0
        looks = [look for kind in self._looks.values() for look in kind]
        columns = [
            np.ones(len(looks)),
            np.array([look.running for look in looks]),
            np.array([look.kv_tokens for look in looks]),
            np.array([look.computed_in_itl * (1 + per_token * look.positions) for look in looks]),
        ]
        taken = np.array([look.itl_s for look in looks])
        told = [known.step_s, known.sequence_s, known.kv_token_s, known.token_s]
        step_s, sequence_s, kv_token_s, token_s = _least(columns, taken, told)
        if step_s <= 0 or (token_s <= 0 and self._role != "decode"):
            return prior  # nothing was computed that would tell
        return replace(
            known,
            step_s=step_s,
            sequence_s=sequence_s,
            kv_token_s=kv_token_s,
            token_s=token_s,
            pair_s=per_token * token_s,
        )


@dataclass(slots=True)
class _Open:
    """A look that is not over yet; `running` and `kv_tokens` are means over its time."""

    seconds: float = 0.0
    running: float = 0.0
    kv_tokens: float = 0.0
    computed_tokens: float = 0.0
    itl_s: float = 0.0
    intervals: float = 0.0

    def add(self, engine: EngineLoad) -> None:
        assert engine.seconds is not None
        self.seconds += engine.seconds
        gain = engine.seconds / self.seconds
        self.running += gain * (engine.running - self.running)
        self.kv_tokens += gain * (engine.kv_used * engine.kv_tokens - self.kv_tokens)
        self.computed_tokens += engine.computed_tokens
        self.itl_s += engine.itl_s
        self.intervals += engine.intervals


def _median(told: Sequence[Told]) -> Told:
    """Of what was measured of engines that are alike."""
    tiers = {tier for one in told for tier in one.load_s}
    computed = [one for one in told if one.token_s]
    return Told(
        float(np.median([one.token_s for one in computed])) if computed else 0.0,
        float(np.median([one.pair_s for one in computed])) if computed else 0.0,
        {
            tier: float(np.median([one.load_s[tier] for one in told if tier in one.load_s]))
            for tier in sorted(tiers)
        },
    )


def _bucket(value: float) -> int:
    return int(np.log(1 + value) / np.log(BUCKET_BASE))


def _least(
    columns: Sequence[np.ndarray], taken: np.ndarray, told: Sequence[float] = ()
) -> list[float]:
    """No unknown negative; errors count by their share of what was taken, and an unknown that was
    told (not 0) by its share of that."""
    from scipy.optimize import nnls

    rows = np.column_stack(columns) / taken[:, None]
    right = np.ones(len(rows))
    for number, value in enumerate(told):
        if value:
            row = np.zeros(rows.shape[1])
            row[number] = np.sqrt(PROFILE_WEIGHT) / value
            rows = np.vstack([rows, row])
            right = np.append(right, np.sqrt(PROFILE_WEIGHT))
    # Columns of like size: KV tokens are many and each takes nanoseconds.
    size = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    found, _ = nnls(rows / size, right)
    return [float(value) for value in found / size]
