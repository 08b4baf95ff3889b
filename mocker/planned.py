"""A fleet whose size the planner sets, in virtual time: the same ticks and decisions as live.

Engines are asked for, start after a delay with an empty G1, serve, are drained and go; node tiers
stay. A node's engines share its tiers, and are started node by node. What the planner sees are
counters as engines' metrics pages would tell them, no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from mocker.engine import Engine
from mocker.events import BlockEvent
from mocker.policies import Worker
from mocker.replay import FleetSettings, Replay
from mocker.results import ReplayResult
from mocker.routing import RouterPolicy, Routing
from mocker.sequence import Record, Request
from mocker.timing import PS_PER_S
from planner.observe import Counters, EngineSnapshot, Phase, Snapshot
from planner.planning import Plan, Planner

ROLE: Final = "aggregated"


@dataclass(slots=True)
class _Slot:
    """A place for an engine: which life it is in, and since when it costs."""

    life: int = 0
    phase: Phase | None = None
    since_ps: int = 0
    busy_ps: int = 0  # of the engine, when this life began
    steps: int = 0
    counted: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`sizes` are (time, engines that serve, engines that cost) at each tick; `actions` are starts
    and stops of engines; `engine_s` is what all of them cost."""

    result: ReplayResult
    plans: Sequence[Plan]
    sizes: Sequence[tuple[float, int, int]]
    engine_s: float
    actions: int

    def reversals(self) -> int:
        """How often the fleet's size turned: up after down, or down after up."""
        steps = [
            change
            for plan in self.plans
            if (change := plan.decision.changes.get("aggregated", 0)) != 0
        ]
        return sum(1 for a, b in pairwise(steps) if (a > 0) != (b > 0))


class PlannedFleet:
    """One run. `fleet.engines` is how many there may ever be."""

    def __init__(
        self,
        fleet: FleetSettings,
        planner: Planner,
        arrivals: Iterable[tuple[int, Request]],
        *,
        engines: int,
        start_delay_s: float,
        tick_s: float,
        routing: Routing | None = None,
        seed: int = 1,
    ) -> None:
        assert 1 <= engines <= fleet.engines
        self._planner = planner
        self._start_delay_ps = round(start_delay_s * PS_PER_S)
        self._tick_ps = round(tick_s * PS_PER_S)
        self._policy = RouterPolicy(fleet, routing or Routing(), seed)
        self._replay = Replay(fleet, self, arrivals, listen=True)
        self._slots = [_Slot() for _ in range(fleet.engines)]
        self._wanted = engines
        self._plans: list[Plan] = []
        self._sizes: list[tuple[float, int, int]] = []
        self._engine_ps = 0
        self._actions = 0
        self._arrived: dict[int, int] = {}  # requests whose first token has not come, and when
        for index in range(fleet.engines):
            self._policy.accept(index, index < engines)
            if index < engines:
                self._slots[index].phase = "serving"

    def run(self) -> Outcome:
        self._replay.call_at(0, self._tick)
        result = self._replay.run()
        end_ps = max((r.finished_ps or 0 for r in result.records), default=0)
        for slot in self._slots:
            if slot.phase is not None:
                self._engine_ps += max(end_ps - slot.since_ps, 0)
        engine_s = self._engine_ps / PS_PER_S
        return Outcome(result, self._plans, self._sizes, engine_s, self._actions)

    # -- the policy's seam -----------------------------------------------------------------

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        index = self._policy.choose(request, workers, now_ps)
        self._slots[index].counted["arrived"] += 1
        self._arrived[request.request_id] = now_ps
        return index

    def on_event(self, event: BlockEvent) -> None:
        self._policy.on_event(event)

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None:
        self._policy.on_first_token(request_id, worker, now_ps)
        record = self._engine(worker).record_of(request_id)
        if record is not None:
            self._count_prompt(record, now_ps)

    def on_end(self, record: Record) -> None:
        self._policy.on_end(record)
        if record.ttft_ps is not None:
            self._count_prompt(record, record.arrival_ps + record.ttft_ps)
        self._slots[record.engine].counted["output_tokens"] += len(record.token_times_ps)

    def on_refused(self, request_id: int) -> None:
        self._policy.on_refused(request_id)
        self._arrived.pop(request_id)

    def _count_prompt(self, record: Record, first_ps: int) -> None:
        arrived_ps = self._arrived.pop(record.request_id, None)
        if arrived_ps is None:
            return
        slot = self._slots[record.engine]
        slot.counted["prompts"] += 1
        slot.counted["prompt_tokens"] += record.prompt_tokens
        slot.counted["ttft_ps"] += first_ps - arrived_ps
        slot.cached.update(record.cached_tokens)

    # -- the planner -----------------------------------------------------------------------

    def _tick(self, now_ps: int) -> None:
        self._end_drained(now_ps)
        plan = self._planner.tick(self._snapshot(now_ps))
        self._plans.append(plan)
        there = [slot.phase for slot in self._slots if slot.phase is not None]
        self._sizes.append((now_ps / PS_PER_S, there.count("serving"), len(there)))
        self._scale(plan.decision.targets[ROLE], now_ps)
        if self._replay.is_busy:
            self._replay.call_at(now_ps + self._tick_ps, self._tick)

    def _snapshot(self, now_ps: int) -> Snapshot:
        engines = [
            self._told(index, slot.phase, now_ps)
            for index, slot in enumerate(self._slots)
            if slot.phase is not None
        ]
        return Snapshot(now_ps / PS_PER_S, tuple(engines), desired={ROLE: self._wanted})

    def _told(self, index: int, phase: Phase, now_ps: int) -> EngineSnapshot:
        slot, engine = self._slots[index], self._engine(index)
        name = f"{index}.{slot.life}"
        if phase == "starting":
            return EngineSnapshot(name, ROLE, phase)
        engine.sync(now_ps)
        counted, settings = slot.counted, engine.settings
        return EngineSnapshot(
            *(name, ROLE, phase),
            Counters(
                arrived=counted["arrived"],
                prompts=counted["prompts"],
                prompt_tokens=counted["prompt_tokens"],
                output_tokens=counted["output_tokens"],
                cached_tokens=dict(slot.cached),
                ttft_s=counted["ttft_ps"] / PS_PER_S,
                first_tokens=counted["prompts"],
                itl_s=(engine.busy_ps - slot.busy_ps) / PS_PER_S,  # steps are what tokens wait for
                intervals=engine.steps_total - slot.steps,
            ),
            running=engine.running_count,
            waiting=engine.waiting_count,
            kv_used=engine.pool.used_count / settings.num_blocks,
            kv_tokens=settings.num_blocks * settings.block_size,
        )

    # -- the actuator ----------------------------------------------------------------------

    def _scale(self, wanted: int, now_ps: int) -> None:
        self._wanted = wanted
        there = [i for i, s in enumerate(self._slots) if s.phase in {"starting", "serving"}]
        for _ in range(wanted - len(there)):
            self._begin(now_ps)
        # The last to come go first: those on the way, then the emptiest.
        by_work = sorted(there, key=lambda i: (self._slots[i].phase == "serving", self._work(i)))
        for index in by_work[: max(len(there) - wanted, 0)]:
            self._stop(index, now_ps)

    def _begin(self, now_ps: int) -> None:
        index = next((i for i, s in enumerate(self._slots) if s.phase is None), None)
        if index is None:
            return  # all the places there are; drained engines make room
        self._actions += 1
        engine = self._engine(index)
        before = self._slots[index]
        slot = _Slot(before.life + 1, "starting", now_ps, engine.busy_ps, engine.steps_total)
        self._slots[index] = slot
        life = slot.life

        def serve(_: int) -> None:
            now = self._slots[index]
            if now.life == life and now.phase == "starting":
                now.phase = "serving"
                self._policy.accept(index, accepting=True)

        self._replay.call_at(now_ps + self._start_delay_ps, serve)

    def _stop(self, index: int, now_ps: int) -> None:
        self._actions += 1
        slot = self._slots[index]
        if slot.phase == "starting":
            self._end(index, now_ps)
        else:
            slot.phase = "draining"
            self._policy.accept(index, accepting=False)

    def _end_drained(self, now_ps: int) -> None:
        for index, slot in enumerate(self._slots):
            if slot.phase == "draining" and not self._work(index):
                self._end(index, now_ps)

    def _end(self, index: int, now_ps: int) -> None:
        slot = self._slots[index]
        self._engine_ps += now_ps - slot.since_ps
        slot.phase = None
        self._engine(index).clear(now_ps)

    def _work(self, index: int) -> int:
        engine = self._engine(index)
        return engine.waiting_count + engine.running_count

    def _engine(self, index: int) -> Engine:
        return self._replay.workers[index].engine
