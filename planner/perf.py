"""How fast an engine is, and how many engines a load needs.

An engine that batches continuously takes `step_s + sequence_s x R + kv_token_s x KV` for a decode
step of R sequences with KV tokens of context, and what prefill it does besides makes its steps
longer. With `rate` requests a second, of which prefill takes the share `p` of its time and the
growing part of decode steps the share `d`, Little's law (R = rate x output tokens x ITL) gives

    ITL = step_s / (1 - p - d)

so that a goal for the ITL is a limit for the share of time that load may take. A prompt waits for
those before it: M/G/m, with Sakasegawa's approximation of the wait and an exponential tail. A
router that sends it where its KV is makes neither one queue of n engines' nor n of their own: m is
taken for the root of n. Prompts are of different lengths, lognormal about their mean, so that some
are late on an idle engine, too: no number of engines helps those, and the goal is a share of the
others. Cached tokens are not computed, so they take no share; those in lower tiers take their load
time, which makes their own first token later and nobody else's. Sources: Little 1961; Sakasegawa,
"An approximation formula L_q = alpha rho^beta / (1 - rho)", 1977.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from runtime.engine_card import Role

UTILISATION_MAX: Final = 0.85
KV_SHARE_MAX: Final = 0.9
BASE_SHARE_MAX: Final = 0.8
"""A goal for the ITL that is next to what an idle engine takes, or less, allows this much load
still: no number of engines would keep it, and asking for ever more would keep nothing else."""
_NODES, _WEIGHTS = (column.tolist() for column in np.polynomial.hermite_e.hermegauss(7))
_WEIGHTS_SUM: Final = sum(_WEIGHTS)

Bound = Literal["nothing", "compute", "itl", "ttft", "kv", "sequences", "most"]


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds, and for prefill those of each token computed and of each (token, token before)."""

    step_s: float
    token_s: float
    pair_s: float = 0.0
    sequence_s: float = 0.0
    kv_token_s: float = 0.0
    load_s: Mapping[str, float] = field(default_factory=dict)  # of a token from each tier


@dataclass(frozen=True, slots=True)
class Room:
    """What fits into one engine."""

    kv_tokens: int  # 0: not known, and not a limit
    sequences: int


@dataclass(frozen=True, slots=True)
class Goals:
    ttft_s: float
    itl_s: float
    attainment: float  # share of the first tokens that can be in time, which shall be


@dataclass(frozen=True, slots=True)
class Work:
    """What requests are like: mean tokens, and the share of a prompt that each tier has."""

    prompt_tokens: float
    output_tokens: float
    hits: Mapping[str, float] = field(default_factory=dict)
    variation: float = 1.0  # of the tokens to compute: standard deviation over mean

    @property
    def cached_tokens(self) -> float:
        return self.prompt_tokens * min(sum(self.hits.values()), 1.0)

    @property
    def computed_tokens(self) -> float:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Expected:
    """Of one of so many engines under a load."""

    utilisation: float  # share of its time that grows with load; 1 and more: it cannot keep up
    itl_s: float
    ttft_s: float  # the mean
    in_time: float  # share of first tokens
    running: float
    kv_tokens: float


@dataclass(frozen=True, slots=True)
class Needed:
    engines: int
    bound: Bound  # what one engine less would not keep
    expected: Expected


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of an engine's time that one request takes."""

    prefill_s: float
    decode_s: float
    load_s: float  # nobody's time, but this request's


def costs(speed: Speed, work: Work, role: Role) -> Costs:
    """A prefill engine computes no answer, a decode engine no prompt."""
    context = work.prompt_tokens + work.output_tokens / 2
    decode_s = work.output_tokens * (speed.sequence_s + speed.kv_token_s * context)
    load_s = work.prompt_tokens * sum(
        share * speed.load_s.get(tier, 0.0) for tier, share in work.hits.items()
    )
    return Costs(
        0.0 if role == "decode" else _prefill_s(speed, work, 1.0),
        0.0 if role == "prefill" else decode_s,
        load_s,
    )


def _prefill_s(speed: Speed, work: Work, times: float) -> float:
    """Of a prompt with so many times the tokens to compute that the mean one has."""
    new = work.computed_tokens * times
    return speed.token_s * new + speed.pair_s * (new * work.cached_tokens + new * new / 2)


def expect(
    speed: Speed, work: Work, requests_per_s: float, engines: int, goals: Goals, role: Role
) -> Expected:
    cost = costs(speed, work, role)
    rate = requests_per_s / engines
    decode = rate * cost.decode_s
    utilisation = rate * cost.prefill_s + decode
    if utilisation >= 1:
        return Expected(utilisation, math.inf, math.inf, 0.0, math.inf, math.inf)
    itl_s = 0.0 if role == "prefill" else speed.step_s / (1 - utilisation)
    running = rate * work.output_tokens * itl_s
    left = 1 - decode  # of the time, for prefill
    busy = rate * cost.prefill_s / left
    variability = (1 + work.variation**2) / 2
    pooled = math.sqrt(engines)
    delayed = busy ** (math.sqrt(2 * (pooled + 1)) - 1)
    wait_s = variability * cost.prefill_s / left / (pooled * (1 - busy))  # of those that wait
    own_s = cost.load_s + speed.step_s
    in_time = 1.0
    if role != "decode":
        sigma = math.sqrt(math.log1p(work.variation**2))
        in_time = 0.0
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            times = math.exp(sigma * node - sigma * sigma / 2)
            spare_s = goals.ttft_s - own_s - _prefill_s(speed, work, times) / left
            in_time += weight * _within(spare_s, delayed, wait_s)
        in_time /= _WEIGHTS_SUM
    ttft_s = own_s + cost.prefill_s / left + delayed * wait_s
    context = work.prompt_tokens + work.output_tokens / 2
    return Expected(utilisation, itl_s, ttft_s, in_time, running, running * context)


def _within(spare_s: float, delayed: float, wait_s: float) -> float:
    """The chance that a prompt waits no longer than it can spare."""
    if spare_s < 0:
        return 0.0
    return 1.0 if wait_s <= 0 else 1 - delayed * math.exp(-spare_s / wait_s)


def _limit(expected: Expected, speed: Speed, room: Room, goals: Goals, role: Role) -> Bound:
    """What this load would break, but for the time to the first token."""
    if expected.utilisation > UTILISATION_MAX:
        return "compute"
    if role != "prefill" and expected.itl_s > max(goals.itl_s, speed.step_s / BASE_SHARE_MAX):
        return "itl"
    if room.kv_tokens and expected.kv_tokens > KV_SHARE_MAX * room.kv_tokens:
        return "kv"
    if expected.running > room.sequences:
        return "sequences"
    return "nothing"


def needed(
    speed: Speed,
    room: Room,
    work: Work,
    requests_per_s: float,
    goals: Goals,
    *,
    most: int,
    role: Role = "aggregated",
) -> Needed:
    """The fewest engines that keep the goals, at most `most`; never falls as the load grows."""
    assert most >= 1
    share = goals.attainment * expect(speed, work, 0.0, 1, goals, role).in_time

    def bound_of(engines: int) -> tuple[Bound, Expected]:
        found = expect(speed, work, requests_per_s, engines, goals, role)
        bound = _limit(found, speed, room, goals, role)
        if bound == "nothing" and found.in_time < share:
            bound = "ttft"
        return bound, found

    low, high = 1, most  # `high` is enough, or all there may be
    why: Bound = "nothing"
    while low < high:
        middle = (low + high) // 2
        bound, _ = bound_of(middle)
        if bound == "nothing":
            high = middle
        else:
            low, why = middle + 1, bound
    bound, found = bound_of(low)
    return Needed(low, why if bound == "nothing" else "most", found)


def share_max(speed: Speed, goals: Goals, role: Role) -> float:
    """How much of an engine's time load may take."""
    if role == "prefill":
        return UTILISATION_MAX
    return min(UTILISATION_MAX, 1 - min(speed.step_s / goals.itl_s, BASE_SHARE_MAX))
