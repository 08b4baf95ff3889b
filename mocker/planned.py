"""A fleet whose size the planner sets, in virtual time: the same ticks and decisions as live.

Engines are asked for, start after a delay with an empty G1, serve, are drained and go; node tiers
stay. A node's engines share its tiers, and are started node by node. What the planner sees are
counters as engines' metrics pages would tell them, no more.

With prefill and decode apart a request is two: one that computes the prompt and one token, and when
that has ended one for the rest of the answer, at an engine of the other pool, which loads the
prompt's KV from the tiers that the two share. Then nodes also tell how fast they compute, because
an engine that gives one token shows no time between tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mocker.engine import Engine
from mocker.events import BlockEvent
from mocker.policies import Worker
from mocker.replay import FleetSettings, Replay
from mocker.results import ReplayResult
from mocker.routing import RouterPolicy, Routing, speed_of
from mocker.sequence import Record, Request
from mocker.timing import PS_PER_S
from planner.observe import Counters, EngineSnapshot, Phase, Snapshot, Told
from planner.planning import Plan, Planner
from runtime.engine_card import Role


@dataclass(slots=True)
class _Slot:
    """A place for an engine: which life it is in, and since when it costs."""

    role: Role
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

    def reversals(self, role: Role = "aggregated") -> int:
        """How often a pool's size turned: up after down, or down after up."""
        steps = [
            change for plan in self.plans if (change := plan.decision.changes.get(role, 0)) != 0
        ]
        return sum(1 for a, b in pairwise(steps) if (a > 0) != (b > 0))


class PlannedFleet:
    """One run. `fleet.engines` is how many there may ever be, in all pools; `engines` of each pool
    are there at first. With `prefill` so many places are for prefill engines, and the others for
    decode engines; request `n` has the records `2n` and `2n + 1` then."""

    def __init__(
        self,
        fleet: FleetSettings,
        planner: Planner,
        arrivals: Iterable[tuple[int, Request]],
        *,
        engines: int,
        start_delay_s: float,
        tick_s: float,
        prefill: int = 0,
        routing: Routing | None = None,
        seed: int = 1,
    ) -> None:
        assert 1 <= engines <= fleet.engines and 0 <= prefill < fleet.engines
        self._planner = planner
        self._start_delay_ps = round(start_delay_s * PS_PER_S)
        self._tick_ps = round(tick_s * PS_PER_S)
        roles: tuple[Role, ...] = ("prefill", "decode") if prefill else ("aggregated",)
        self._policies = {role: RouterPolicy(fleet, routing or Routing(), seed) for role in roles}
        given = self._halves(arrivals) if prefill else arrivals
        self._replay = Replay(fleet, self, given, listen=True)
        places = fleet.engines - prefill
        self._slots = [_Slot(roles[0]) for _ in range(prefill)]
        self._slots += [_Slot(roles[-1]) for _ in range(places)]
        self._wanted = dict.fromkeys(roles, engines)
        self._told_speed = _told_speed(fleet) if prefill else Told()
        self._answers: dict[int, Request] = {}  # to come after the prompt with the number before
        self._plans: list[Plan] = []
        self._sizes: list[tuple[float, int, int]] = []
        self._engine_ps = 0
        self._actions = 0
        self._arrived: dict[int, int] = {}  # requests whose first token has not come, and when
        for role, policy in self._policies.items():
            own = [index for index, slot in enumerate(self._slots) if slot.role == role]
            for index in range(fleet.engines):
                policy.accept(index, index in own[:engines])
            for index in own[:engines]:
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

    def _halves(self, arrivals: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Request]]:
        for at_ps, whole in arrivals:
            number, prompt, content = 2 * whole.request_id, whole.prompt_tokens, whole.content
            if whole.output_tokens > 1:
                rest = Request(number + 1, prompt + 1, whole.output_tokens - 1, content)
                self._answers[number] = rest
            yield at_ps, Request(number, prompt, 1, content)

    def _hand_over(self, prompt: Record) -> None:
        answer = self._answers.pop(prompt.request_id, None)
        if answer is not None and prompt.finished_ps is not None:
            self._replay.call_at(
                prompt.finished_ps, lambda now_ps: self._replay.place(answer, now_ps)
            )

    # -- the policy's seam -----------------------------------------------------------------

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        role = self._role_of(request.request_id)
        own = [worker for worker in workers if self._slots[worker.index].role == role]
        index = self._policies[role].choose(request, own, now_ps)
        self._slots[index].counted["arrived"] += 1
        self._arrived[request.request_id] = now_ps
        return index

    def on_event(self, event: BlockEvent) -> None:
        for policy in self._policies.values():
            policy.on_event(event)

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None:
        self._policies[self._role_of(request_id)].on_first_token(request_id, worker, now_ps)
        record = self._engine(worker).record_of(request_id)
        if record is not None:
            self._count_prompt(record, now_ps)

    def on_end(self, record: Record) -> None:
        self._policies[self._role_of(record.request_id)].on_end(record)
        if record.ttft_ps is not None:
            self._count_prompt(record, record.arrival_ps + record.ttft_ps)
        self._slots[record.engine].counted["output_tokens"] += len(record.token_times_ps)
        self._hand_over(record)

    def on_refused(self, request_id: int) -> None:
        self._policies[self._role_of(request_id)].on_refused(request_id)
        self._arrived.pop(request_id)
        self._answers.pop(request_id, None)

    def _role_of(self, request_id: int) -> Role:
        if "decode" not in self._policies:
            return "aggregated"
        return "decode" if request_id % 2 else "prefill"

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
        for role in self._policies:
            self._scale(role, plan.decision.targets[role], now_ps)
        if self._replay.is_busy:
            self._replay.call_at(now_ps + self._tick_ps, self._tick)

    def _snapshot(self, now_ps: int) -> Snapshot:
        engines = [
            self._told(index, slot.phase, now_ps)
            for index, slot in enumerate(self._slots)
            if slot.phase is not None
        ]
        return Snapshot(now_ps / PS_PER_S, tuple(engines), desired=dict(self._wanted))

    def _told(self, index: int, phase: Phase, now_ps: int) -> EngineSnapshot:
        slot, engine = self._slots[index], self._engine(index)
        name = f"{index}.{slot.life}"
        if phase == "starting":
            return EngineSnapshot(name, slot.role, phase)
        engine.sync(now_ps)
        counted, settings = slot.counted, engine.settings
        return EngineSnapshot(
            *(name, slot.role, phase),
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
            told=self._told_speed,
        )

    # -- the actuator ----------------------------------------------------------------------

    def _scale(self, role: Role, wanted: int, now_ps: int) -> None:
        self._wanted[role] = wanted
        own = [(i, s.phase) for i, s in enumerate(self._slots) if s.role == role]
        there = [i for i, phase in own if phase in {"starting", "serving"}]
        for _ in range(wanted - len(there)):
            self._begin(role, now_ps)
        # The last to come go first: those on the way, then the emptiest.
        by_work = sorted(there, key=lambda i: (self._slots[i].phase == "serving", self._work(i)))
        for index in by_work[: max(len(there) - wanted, 0)]:
            self._stop(index, now_ps)

    def _begin(self, role: Role, now_ps: int) -> None:
        free = (i for i, s in enumerate(self._slots) if s.role == role and s.phase is None)
        index = next(free, None)
        if index is None:
            return  # all the places there are; drained engines make room
        self._actions += 1
        engine = self._engine(index)
        before = self._slots[index]
        slot = _Slot(role, before.life + 1, "starting", now_ps, engine.busy_ps, engine.steps_total)
        self._slots[index] = slot
        life = slot.life

        def serve(_: int) -> None:
            now = self._slots[index]
            if now.life == life and now.phase == "starting":
                now.phase = "serving"
                self._policies[role].accept(index, accepting=True)

        self._replay.call_at(now_ps + self._start_delay_ps, serve)

    def _stop(self, index: int, now_ps: int) -> None:
        self._actions += 1
        slot = self._slots[index]
        if slot.phase == "starting":
            self._end(index, now_ps)
        else:
            slot.phase = "draining"
            self._policies[slot.role].accept(index, accepting=False)

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


def _told_speed(fleet: FleetSettings) -> Told:
    speed = speed_of(fleet.engine, fleet.tiers)
    each = zip(("G2", "G3", "G4"), speed.load_s_per_block, strict=True)
    load_s = {tier: seconds / fleet.engine.block_size for tier, seconds in each}
    return Told(speed.prefill_s_per_token, speed.prefill_s_per_token2, load_s)
