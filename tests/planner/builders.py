"""Snapshots, observations and what is known of engines, with what a test does not care about
filled in."""

from __future__ import annotations

from collections.abc import Mapping

from planner.decide import Decision, Perf, State, decide
from planner.forecast import Forecast
from planner.observe import Counters, EngineLoad, EngineSnapshot, Observation, Phase, Traffic
from planner.perf import Goals, Room, Speed, Work
from planner.settings import ScalingSettings
from runtime.engine_card import Role

SPEED = Speed(step_s=0.007, token_s=4e-5, kv_token_s=4e-8)
WORK = Work(2000.0, 200.0)
GOALS = Goals(ttft_s=1.0, itl_s=0.05, attainment=0.9)
ROOM = Room(300_000, 256)


def scaling(**given: object) -> ScalingSettings:
    fields: dict[str, object] = {"max_gpu_budget": -1, "start_delay": 60.0, **given}
    return ScalingSettings.model_validate(fields)


def load(
    name: str,
    *,
    role: Role = "aggregated",
    phase: Phase = "serving",
    running: float = 1.0,
    waiting: float = 0.0,
    kv_used: float = 0.1,
) -> EngineLoad:
    return EngineLoad(name, role, phase, running, waiting, kv_used, 300_000)


def seen(
    at_s: float,
    engines: list[EngineLoad],
    *,
    rate: float | None = 1.0,
    desired: Mapping[Role, int] | None = None,
) -> Observation:
    """`rate` None: nobody could be read."""
    traffic = None
    if rate is not None:
        traffic = Traffic(5 * rate, 5.0, 5 * rate, 2000.0, 200.0, {}, 0.1, 0.01)
    return Observation(at_s, traffic, tuple(engines), desired or {})


def forecast(rate: float) -> Forecast:
    return Forecast(rate, rate, rate, 65.0, "constant")


def perf(rate: float, *, speed: Speed | None = SPEED, work: Work = WORK) -> Perf:
    roles: tuple[Role, ...] = ("aggregated", "prefill", "decode")
    speeds = {} if speed is None else dict.fromkeys(roles, speed)
    return Perf(speeds, dict.fromkeys(roles, ROOM), work, rate)


def decided(
    rate: float,
    engines: int,
    state: State | None = None,
    *,
    at_s: float = 0.0,
    settings: ScalingSettings | None = None,
    waiting: float = 0.0,
    kv_used: float = 0.1,
) -> Decision:
    """One decision for so many engines that are alike, and the same rate now and to come."""
    there = [load(f"{n:x}", waiting=waiting, kv_used=kv_used) for n in range(engines)]
    return decide(
        seen(at_s, there, rate=rate),
        forecast(rate),
        perf(rate),
        GOALS,
        settings or scaling(),
        state or State(),
    )


def engine(
    name: str, counters: Counters | None, *, phase: Phase = "serving", running: float = 1.0
) -> EngineSnapshot:
    return EngineSnapshot(name, "aggregated", phase, counters, running, 0.0, 0.1, 300_000)
