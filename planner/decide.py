"""How many engines there shall be, and why: a pure function of what was seen.

Two rules ask for engines. The floor: enough for the load that is forecast for when an engine that
is started now would serve, within the goals. The load: enough for what waits by then and for what
comes now. The larger wins, at once. Fewer engines come later: only where the load with
a margin, and what is in flight, has fitted into fewer for the whole of `scale_down_delay`. So a
load whose largest and smallest rate differ by less than the margin never makes it go up and down.
Bounds and the budget of GPUs come last. What others set by hand is kept for a while.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from planner.forecast import Forecast
from planner.observe import Observation
from planner.perf import Goals, Needed, Room, Speed, Work, costs, needed, share_max
from planner.settings import ScalingSettings
from runtime.engine_card import Role

RECOMMENDATIONS_MAX: Final = 4096
IN_FLIGHT_KV: Final = 0.8
"""Of their KV, what engines that are left may hold of what is in flight now."""
KV_FULL: Final = 0.95

Kind = Literal[
    "floor",
    "load",
    "unmeasured",
    "in-flight",
    "blind",
    "manual",
    "delay",
    "keep",
    "minimum",
    "maximum",
    "budget",
    "step",
]


@dataclass(frozen=True, slots=True)
class Reason:
    """`engines` is what it asks for or allows."""

    role: Role
    kind: Kind
    engines: int
    text: str


@dataclass(frozen=True, slots=True)
class Perf:
    """What is known of the engines of each pool; a pool that is not in `speeds` is not measured."""

    speeds: Mapping[Role, Speed]
    rooms: Mapping[Role, Room]
    work: Work | None
    rate_now: float  # requests a second lately


@dataclass(frozen=True, slots=True)
class PoolState:
    """What must be remembered of a pool from one decision to the next."""

    asked: int | None = None
    manual_until_s: float = -math.inf
    recommended: tuple[tuple[float, int], ...] = ()  # when, and how few would have done


@dataclass(frozen=True, slots=True)
class State:
    pools: Mapping[Role, PoolState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """`targets` are what shall be; `current` what was asked for or, unasked, what was there."""

    at_s: float
    targets: Mapping[Role, int]
    current: Mapping[Role, int]
    reasons: tuple[Reason, ...]
    needed: Mapping[Role, Needed]
    state: State

    @property
    def changes(self) -> dict[Role, int]:
        return {
            role: target - self.current[role]
            for role, target in self.targets.items()
            if target != self.current[role]
        }


def decide(
    seen: Observation,
    forecast: Forecast | None,
    perf: Perf,
    goals: Goals,
    settings: ScalingSettings,
    state: State,
) -> Decision:
    reasons: list[Reason] = []
    targets: dict[Role, int] = {}
    current: dict[Role, int] = {}
    floors: dict[Role, Needed] = {}
    states: dict[Role, PoolState] = {}
    for role in settings.roles:
        pool = _Pool(role, seen, forecast, perf, goals, settings, state, reasons)
        targets[role] = pool.target()
        current[role] = pool.base
        states[role] = pool.after
        if pool.floor is not None:
            floors[role] = pool.floor
    _keep_budget(targets, current, settings, reasons)
    after = State(
        {
            role: PoolState(targets[role], one.manual_until_s, one.recommended)
            for role, one in states.items()
        }
    )
    return Decision(seen.at_s, targets, current, tuple(reasons), floors, after)


class _Pool:
    """One role's part of one decision."""

    def __init__(
        self,
        role: Role,
        seen: Observation,
        forecast: Forecast | None,
        perf: Perf,
        goals: Goals,
        settings: ScalingSettings,
        state: State,
        reasons: list[Reason],
    ) -> None:
        self.role: Role = role
        self.floor: Needed | None = None
        self.after = state.pools.get(role, PoolState())
        self._seen = seen
        self._forecast = forecast
        self._perf = perf
        self._goals = goals
        self._settings = settings
        self._reasons = reasons
        self._engines = seen.pool(role)
        there = len(self._engines)
        desired = seen.desired.get(role)
        asked = self.after.asked
        self._manual = desired is not None and asked is not None and desired != asked
        self.base = desired if desired is not None else asked if asked is not None else there

    def target(self) -> int:
        at_s, settings = self._seen.at_s, self._settings
        if self._manual:
            until_s = at_s + settings.manual_hold
            self.after = PoolState(self.base, until_s)
        if at_s < self.after.manual_until_s:
            left_s = self.after.manual_until_s - at_s
            self._say("manual", self.base, f"set to {self.base} by others; kept {left_s:.0f} s yet")
            return self._bounded(self.base)
        if self._seen.traffic is None:
            self._say("blind", self.base, "no engine or frontend could be read: nothing is changed")
            return self._bounded(self.base)
        up, down = self._wishes()
        down = max(down, self._in_flight())
        lowest = self._lowest_lately(down)
        if up > self.base:
            return self._bounded(min(up, self._stepped_up(up)))
        if lowest < self.base:
            return self._bounded(max(lowest, self._stepped_down(lowest)))
        if down < self.base:
            self._say("delay", self.base, f"{down} would do now, but not all the time lately")
        else:
            self._say("keep", self.base, f"{self.base} fit the load")
        return self._bounded(self.base)

    # -- what is asked for ----------------------------------------------------------------

    def _wishes(self) -> tuple[int, int]:
        """Engines that are needed, and so few that the load may grow before they are too few."""
        perf, settings = self._perf, self._settings
        speed, work = perf.speeds.get(self.role), perf.work
        if speed is None or work is None:
            return self._unmeasured()
        room = perf.rooms[self.role]
        margin = 1 / settings.scaling_down_sensitivity
        up = down = 0
        if settings.enable_throughput_scaling and self._forecast is not None:
            high = self._forecast.high
            found = self._needed(speed, room, work, high)
            self.floor = found
            up = max(up, found.engines)
            down = max(down, self._needed(speed, room, work, high * margin).engines)
            self._say(
                "floor",
                found.engines,
                f"{high:.2f} requests/s within {self._forecast.ahead_s:.0f} s "
                f"({self._forecast.by}), {work.computed_tokens:.0f} of {work.prompt_tokens:.0f} "
                f"prompt tokens to compute: {found.engines} engines, limited by {found.bound}",
            )
        if settings.enable_load_scaling:
            engines, text = self._load(speed, room, work, 1.0)
            up = max(up, engines)
            down = max(down, self._load(speed, room, work, margin)[0])
            self._say("load", engines, text)
        return up, down

    def _needed(self, speed: Speed, room: Room, work: Work, rate: float) -> Needed:
        most = self._settings.max_endpoint
        return needed(speed, room, work, rate, self._goals, most=most, role=self.role)

    def _load(self, speed: Speed, room: Room, work: Work, margin: float) -> tuple[int, str]:
        """Engines for what comes now and for what will wait yet when a new one serves.

        A queue that is gone before an engine could be started asks for none.
        """
        cost = costs(speed, work, self.role)
        share = share_max(speed, self._goals, self.role)
        busy = self._perf.rate_now * (cost.prefill_s + cost.decode_s) * margin
        waiting = sum(engine.waiting for engine in self._engines)
        queued_s = waiting * (cost.prefill_s if self.role != "decode" else cost.decode_s)
        left_s = max(queued_s + (busy - len(self._engines)) * self._settings.start_delay, 0.0)
        engines = math.ceil((busy + left_s / self._settings.catch_up) / share - 1e-9)
        engines = max(
            engines, self._needed(speed, room, work, margin * self._perf.rate_now).engines
        )
        text = (
            f"{self._perf.rate_now:.2f} requests/s keep {busy:.2f} engines busy, {waiting:.0f} "
            f"wait ({queued_s:.1f} s of work): {engines} engines"
        )
        if waiting and self._is_full():
            engines = max(engines, len(self._engines) + 1)
            text += f", and as KV is full {engines}"
        return engines, text

    def _is_full(self) -> bool:
        serving = [e for e in self._engines if e.phase == "serving"]
        starting = len(self._engines) - len(serving)
        return bool(serving) and not starting and min(e.kv_used for e in serving) > KV_FULL

    def _unmeasured(self) -> tuple[int, int]:
        """Without a speed only a queue tells: one more where more wait than there are engines."""
        waiting = sum(engine.waiting for engine in self._engines)
        starting = any(engine.phase == "starting" for engine in self._engines)
        short = self._settings.enable_load_scaling and waiting > len(self._engines)
        wish = self.base + 1 if short and not starting else self.base
        self._say(
            "unmeasured",
            wish,
            f"the engines' speed is not known yet; {waiting:.0f} requests wait",
        )
        return wish, self.base

    def _in_flight(self) -> int:
        """So many at least, that what is in flight fits into those that stay."""
        serving = [e for e in self._engines if e.phase == "serving"]
        room = self._perf.rooms.get(self.role)
        sequences = sum(e.running + e.waiting for e in serving)
        least = sum(e.kv_used for e in serving) / IN_FLIGHT_KV
        if room is not None:
            least = max(least, sequences / room.sequences)
        engines = math.ceil(least - 1e-9)
        if engines >= self.base > 1:
            self._say(
                "in-flight", engines, f"{sequences:.0f} requests in flight need {engines} engines"
            )
        return engines

    # -- when ------------------------------------------------------------------------------

    def _lowest_lately(self, wish: int) -> int:
        """The most that was needed at any time of the delay; unknown before it has passed once."""
        at_s, delay_s = self._seen.at_s, self._settings.scale_down_delay
        kept = [(when, few) for when, few in self.after.recommended if when > at_s - delay_s]
        # The one just before the window says that it has been watched for so long.
        older = [entry for entry in self.after.recommended if entry[0] <= at_s - delay_s]
        kept = [*older[-1:], *kept, (at_s, wish)][-RECOMMENDATIONS_MAX:]
        self.after = PoolState(self.after.asked, self.after.manual_until_s, tuple(kept))
        watched = delay_s == 0 or bool(older)
        return max(few for _, few in kept) if watched else self.base

    def _stepped_up(self, wish: int) -> int:
        most = self.base + self._settings.scale_up_step
        if wish > most:
            self._say("step", most, f"at most {self._settings.scale_up_step} more at a time")
        return most

    def _stepped_down(self, lowest: int) -> int:
        least = self.base - self._settings.scale_down_step
        self._say(
            "delay",
            max(lowest, least),
            f"{lowest} would have done for {self._settings.scale_down_delay:.0f} s",
        )
        return least

    def _bounded(self, wish: int) -> int:
        settings = self._settings
        if wish < settings.min_endpoint:
            self._say("minimum", settings.min_endpoint, f"{settings.min_endpoint} at least")
            return settings.min_endpoint
        if wish > settings.max_endpoint:
            self._say("maximum", settings.max_endpoint, f"{settings.max_endpoint} at most")
            return settings.max_endpoint
        return wish

    def _say(self, kind: Kind, engines: int, text: str) -> None:
        self._reasons.append(Reason(self.role, kind, engines, text))


def _keep_budget(
    targets: dict[Role, int],
    current: Mapping[Role, int],
    settings: ScalingSettings,
    reasons: list[Reason],
) -> None:
    """Take engines from the pool that would have most GPUs until all fit; none below the least.

    What is there already is not taken for want of budget before what is only wished for.
    """
    gpus = settings.gpus_per_engine
    if settings.max_gpu_budget < 0:
        return

    def spent() -> int:
        return sum(gpus.get(role, 1) * count for role, count in targets.items())

    wished = dict(targets)
    while spent() > settings.max_gpu_budget:
        able = [role for role, count in targets.items() if count > settings.min_endpoint]
        if not able:
            break
        new = [role for role in able if targets[role] > current[role]]
        role = max(new or able, key=lambda r: (gpus.get(r, 1) * targets[r], r))
        targets[role] -= 1
    for role, count in targets.items():
        if count < wished[role]:
            text = f"{settings.max_gpu_budget} GPUs at most: {count} instead of {wished[role]}"
            reasons.append(Reason(role, "budget", count, text))
