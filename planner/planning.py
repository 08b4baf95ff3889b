"""One tick of the planner: a snapshot in, a decision out. Live loop and replay run this.

It keeps what must last from tick to tick: the last counters, the series, the looks at engines, the
moving means of what requests are like, how long engines took to start. It has no clock: time is the
snapshots'.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Final

from planner.decide import Decision, Perf, State, decide
from planner.forecast import Forecast, Forecaster
from planner.imagined import Imagined
from planner.measure import Measurement, Profile
from planner.observe import Observation, Observer, Snapshot, Traffic
from planner.perf import Goals, Room, Speed, Work
from planner.settings import PlanSettings
from runtime.engine_card import Role

RATE_S: Final = 30.0
RATE_FAST_S: Final = 10.0
CHANCE: Final = 2.0
"""So many standard deviations of a Poisson count must a short time have more to count as more."""
WORK_MEMORY: Final = 200.0  # prompts after which the means have forgotten two thirds
SEQUENCES: Final = 256  # vLLM's default, where no profile says


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision and what it was made of."""

    observation: Observation
    forecast: Forecast | None
    speeds: dict[Role, Speed]
    work: Work
    rate_now: float
    start_delay_s: float
    decision: Decision


class Planner:
    def __init__(self, settings: PlanSettings, profiles: dict[Role, Profile] | None = None) -> None:
        """`profiles` by role; all may be one."""
        forecast, perf = settings.forecast, settings.perf
        profiles = profiles or {}
        self._settings = settings
        self._goals = Goals(settings.goals.ttft, settings.goals.itl, settings.goals.attainment)
        self._observer = Observer()
        self._forecaster = Forecaster(
            forecast.load_predictor,
            forecast.throughput_adjustment_interval,
            points_max=forecast.window,
            season=forecast.season,
            headroom=forecast.headroom,
        )
        self._profiles = profiles
        self._measured = {
            role: Measurement(
                role,
                profiles[role].speed() if role in profiles else None,
                looks_max=perf.looks_max,
                looks_min=perf.load_min_observations,
            )
            for role in settings.scaling.roles
        }
        self._means = _Means(perf.isl, perf.osl, perf.isl_variation)
        self._rate = _Rate()
        self._starts = _Starts(settings.scaling.start_delay)
        self._state = State()
        self._imagined = Imagined()

    def tick(self, snapshot: Snapshot, *, only_told: bool = False) -> Plan:
        """`only_told`: nobody carries it out; it is decided for the fleet there would be by now."""
        seen = self._observer.take(snapshot)
        self._starts.add(seen)
        if seen.traffic is not None:
            self._add_traffic(seen.at_s, seen.traffic)
        work = self._means.work
        for measured in self._measured.values():
            measured.add(seen, work)
        speeds = {r: s for r, m in self._measured.items() if (s := m.speed()) is not None}
        scaling = self._settings.scaling.model_copy(update={"start_delay": self._starts.delay_s})
        ahead_s = scaling.start_delay + scaling.load_adjustment_interval
        forecast = self._forecaster.forecast(ahead_s)
        rooms = {role: self._room(role, seen) for role in scaling.roles}
        perf = Perf(speeds, rooms, work, self._rate.now)
        fleet = seen
        if only_told:
            fleet = self._imagined.see(seen, scaling.roles, scaling.start_delay)
        else:
            self._imagined.forget()
        decision = decide(fleet, forecast, perf, self._goals, scaling, self._state)
        if only_told:
            self._imagined.decided(seen.at_s, decision.targets)
        self._state = decision.state
        return Plan(seen, forecast, speeds, work, self._rate.now, scaling.start_delay, decision)

    def not_done(self) -> None:
        """The last decision was not carried out: the next one begins with what is there."""
        self._state = State(
            {role: replace(pool, asked=None) for role, pool in self._state.pools.items()}
        )

    def _add_traffic(self, at_s: float, traffic: Traffic) -> None:
        self._forecaster.add(at_s, traffic.requests, traffic.seconds)
        self._rate.add(traffic.requests, traffic.seconds)
        self._means.add(traffic)

    def _room(self, role: Role, seen: Observation) -> Room:
        profile = self._profiles.get(role)
        sequences = profile.sequences if profile else SEQUENCES
        told = [e.kv_tokens for e in seen.engines if e.role == role and e.kv_tokens]
        return Room(min(told, default=profile.kv_tokens if profile else 0), sequences)


class _Rate:
    """Requests a second now: the mean of half a minute, or what the last seconds had beyond doubt,
    so that a burst is seen at once and chance is not."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, float]] = deque()  # requests, seconds

    @property
    def now(self) -> float:
        return max(self._mean(RATE_S, 0.0), self._mean(RATE_FAST_S, CHANCE))

    def add(self, requests: float, seconds: float) -> None:
        self._counts.append((requests, seconds))
        while sum(s for _, s in self._counts) - self._counts[0][1] >= RATE_S:
            self._counts.popleft()

    def _mean(self, over_s: float, less: float) -> float:
        requests = seconds = 0.0
        for count, span_s in reversed(self._counts):
            requests += count
            seconds += span_s
            if seconds >= over_s:
                break
        return max(requests - less * math.sqrt(requests), 0.0) / seconds if seconds else 0.0


class _Means:
    """What requests are like, by the latest hundreds of them."""

    def __init__(self, prompt_tokens: float, output_tokens: float, variation: float) -> None:
        self._prompt, self._output = prompt_tokens, output_tokens
        self._variation = variation
        self._hits: dict[str, float] = {}
        self._known = 0.0

    @property
    def work(self) -> Work:
        return Work(self._prompt, self._output, dict(self._hits), self._variation)

    def add(self, traffic: Traffic) -> None:
        if traffic.prompts <= 0:
            return
        self._known += traffic.prompts
        gain = max(1 - math.exp(-traffic.prompts / WORK_MEMORY), traffic.prompts / self._known)
        if traffic.prompt_tokens is not None:
            self._prompt += gain * (traffic.prompt_tokens - self._prompt)
        if traffic.output_tokens is not None:
            self._output += gain * (traffic.output_tokens - self._output)
        for tier in {*self._hits, *traffic.hits}:
            before = self._hits.get(tier, 0.0)
            self._hits[tier] = before + gain * (traffic.hits.get(tier, 0.0) - before)


class _Starts:
    """How long engines take to start: as set, or longer where it was seen to take longer."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._begun: dict[str, float] = {}
        self._longest_s = 0.0

    @property
    def delay_s(self) -> float:
        return max(self._least_s, self._longest_s)

    def add(self, seen: Observation) -> None:
        starting = {engine.name for engine in seen.engines if engine.phase == "starting"}
        for engine in seen.engines:
            begun_s = self._begun.get(engine.name)
            if engine.phase == "serving" and begun_s is not None:
                took_s = seen.at_s - begun_s
                self._longest_s += 0.5 * (took_s - self._longest_s) if self._longest_s else took_s
        self._begun = {name: self._begun.get(name, seen.at_s) for name in starting}
