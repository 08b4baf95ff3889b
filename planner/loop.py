"""The loop: look, decide, act, at a fixed pace, until it is cancelled.

A look or an act that fails is counted and told, and the next tick tries again. Deciding runs on a
thread of its own, because fitting a forecast takes a while and probes must be answered meanwhile;
one tick at a time. While it is paused nothing is looked at; in advisory mode nothing is done.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import structlog

from planner.actuate.base import ActuateError, Actuator, Applied
from planner.events import Events
from planner.fleet import Fleet
from planner.planning import Plan, Planner
from runtime.engine_card import Role

Fault = Literal["desired", "apply", "bug"]

_log = structlog.get_logger("planner")


@dataclass(frozen=True, slots=True)
class Step:
    """One tick and what was done about it; `wall_s` is when, by the wall clock."""

    number: int
    wall_s: float
    plan: Plan
    applied: Applied
    took_s: float


class Loop:
    def __init__(
        self,
        fleet: Fleet,
        planner: Planner,
        actuator: Actuator,
        interval_s: float,
        *,
        advisory: bool,
        history_max: int,
        events: Events | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.actuator = actuator
        self.events = events
        self.advisory = advisory
        self.paused = False
        self.history: deque[Step] = deque(maxlen=history_max)
        self.ticks_total = 0
        self.changes_total: Counter[tuple[Role, Literal["up", "down"]]] = Counter()
        self.faults_total: Counter[Fault] = Counter()
        self.engine_s: Counter[Role] = Counter()
        self.skipped_total = 0
        self._fleet = fleet
        self._planner = planner
        self._interval_s = interval_s
        self._clock = clock
        self._looked_s: float | None = None

    @property
    def latest(self) -> Step | None:
        return self.history[-1] if self.history else None

    def readiness(self) -> dict[str, str | None]:
        """By check what keeps it from being ready."""
        late_s = None if self._looked_s is None else self._clock() - self._looked_s
        late = late_s is not None and late_s > 3 * self._interval_s and not self.paused
        return {
            "discovery": None if self._fleet.is_synced else "engines are not listed yet",
            "loop": f"no look for {late_s:.0f} s" if late else None,
        }

    async def run(self) -> None:
        """Until cancelled."""
        due_s = self._clock()
        while True:
            if not self.paused and self._fleet.is_synced:
                await self._tick_guarded()
            due_s += self._interval_s
            behind_s = self._clock() - due_s
            if behind_s > 0:
                self.skipped_total += 1
                due_s = self._clock()
            await asyncio.sleep(max(due_s - self._clock(), 0))

    async def tick(self) -> Step:
        begun_s = self._clock()
        try:
            desired = await self.actuator.desired()
        except ActuateError as error:
            self._fault("desired", error)
            desired = {}
        snapshot, members = await self._fleet.look(begun_s, desired)
        only_told = self.advisory or not self.actuator.acts
        plan = await asyncio.to_thread(self._planner.tick, snapshot, only_told=only_told)
        applied = Applied(accepted=False, text="advisory: nothing is done")
        if not self.advisory:
            try:
                applied = await self.actuator.apply(plan.decision, members)
            except ActuateError as error:
                self._fault("apply", error)
                applied = Applied(accepted=False, text=str(error))
        if not applied.accepted:
            self._planner.not_done()
        return self._told(plan, applied, begun_s)

    def _told(self, plan: Plan, applied: Applied, begun_s: float) -> Step:
        self.ticks_total += 1
        if self._looked_s is not None:
            for engine in plan.observation.engines:
                self.engine_s[engine.role] += begun_s - self._looked_s  # type: ignore[assignment]
        self._looked_s = begun_s
        took_s = self._clock() - begun_s
        step = Step(self.ticks_total, time.time(), plan, applied, took_s)
        for role, change in plan.decision.changes.items():
            if applied.accepted:
                self.changes_total[role, "up" if change > 0 else "down"] += 1
            reasons = [r.text for r in plan.decision.reasons if r.role == role]
            target = plan.decision.targets[role]
            _log.info("scale", role=role, target=target, change=change, why=reasons)
        self.history.append(step)
        return step

    async def _tick_guarded(self) -> None:
        try:
            await self.tick()
        except Exception:  # noqa: BLE001 (a task border)
            # The fleet must not be left without a planner by what one tick stumbled over.
            self.faults_total["bug"] += 1
            _log.exception("tick_failed")

    def _fault(self, what: Fault, error: ActuateError) -> None:
        self.faults_total[what] += 1
        _log.warning("actuator_failed", step=what, why=str(error))
