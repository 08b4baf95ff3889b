"""A fleet of mock engines in virtual time: requests arrive, a policy places them, times come out.

A discrete-event simulation on one thread. At one moment, steps end first, then requests arrive,
then engines begin steps, then others' calls are made; among equals the lower index goes first. So
the same input gives the same result. Nodes share their tiers among their engines; G4 is shared by
all nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from mocker.engine import Engine, EngineSettings
from mocker.policies import Policy, Worker
from mocker.results import EngineTotals, ReplayResult
from mocker.sequence import Record, Request
from mocker.tiers import LruTier, NodeTiers
from mocker.timing import TierTiming

FINISH: Final = 0
ARRIVE: Final = 1
START: Final = 2
CALL: Final = 3


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """Blocks of a tier are per node, those of G4 for all; 0 means that there is no such tier."""

    engine: EngineSettings
    engines: int = 8
    engines_per_node: int = 8
    g2_blocks: int = 0
    g3_blocks: int = 0
    g4_blocks: int = 0
    tiers: TierTiming = field(default_factory=TierTiming)

    def __post_init__(self) -> None:
        if self.engines < 1 or self.engines_per_node < 1:
            raise ValueError("a fleet needs an engine, and a node room for one")


class Replay:
    """One run; `arrivals` are in the order of their times."""

    def __init__(
        self,
        settings: FleetSettings,
        policy: Policy,
        arrivals: Iterable[tuple[int, Request]],
        *,
        listen: bool = False,
    ) -> None:
        """`listen`: the policy wants block events, which cost time."""
        self._policy = policy
        self._arrivals = iter(arrivals)
        self._heap: list[tuple[int, int, int, int]] = []  # time, kind, engine, version
        self._next: tuple[int, Request] | None = None
        emit = policy.on_event if listen else None
        g4 = LruTier("G4", settings.g4_blocks) if settings.g4_blocks else None
        node_count = -(-settings.engines // settings.engines_per_node)
        nodes = [
            NodeTiers(
                node,
                settings.tiers,
                LruTier("G2", settings.g2_blocks) if settings.g2_blocks else None,
                LruTier("G3", settings.g3_blocks) if settings.g3_blocks else None,
                g4,
                emit,
            )
            for node in range(node_count)
        ]
        self.workers = [
            Worker(
                index,
                index // settings.engines_per_node,
                Engine(
                    settings.engine,
                    index=index,
                    tiers=nodes[index // settings.engines_per_node],
                    emit=emit,
                    on_end=self._ended,
                ),
            )
            for index in range(settings.engines)
        ]
        self._versions = [0] * settings.engines  # of what is in the heap for each engine
        self._calls: list[Callable[[int], None]] = []
        self._records: list[Record] = []
        self._refused = 0
        self._now_ps = 0

    def run(self) -> ReplayResult:
        self._arrive_next()
        while self._heap:
            now_ps, kind, index, version = heapq.heappop(self._heap)
            assert now_ps >= self._now_ps
            if kind == ARRIVE:
                self._now_ps = now_ps
                self._arrive(now_ps)
            elif kind == CALL:
                self._now_ps = now_ps
                self._calls[index](now_ps)
            elif version == self._versions[index]:
                self._now_ps = now_ps
                if kind == FINISH:
                    self._finish(index, now_ps)
                else:
                    self._start(index, now_ps)
        for worker in self.workers:
            worker.engine.check_integrity()
            assert worker.engine.waiting_count + worker.engine.running_count == 0
            assert worker.engine.pool.used_count == 0
        totals = [
            EngineTotals(e.busy_ps, e.tokens_computed_total, e.steps_total, e.preemptions_total)
            for e in (worker.engine for worker in self.workers)
        ]
        records = sorted(self._records, key=lambda record: record.request_id)
        return ReplayResult(records, totals, self._refused)

    def call_at(self, at_ps: int, call: Callable[[int], None]) -> None:
        """Have it called with that time, after all else that happens then."""
        assert at_ps >= self._now_ps
        heapq.heappush(self._heap, (at_ps, CALL, len(self._calls), 0))
        self._calls.append(call)

    @property
    def is_busy(self) -> bool:
        """Something is to arrive yet, or is at work."""
        work = (w.engine.waiting_count + w.engine.running_count for w in self.workers)
        return self._next is not None or any(work)

    def _arrive_next(self) -> None:
        self._next = next(self._arrivals, None)
        if self._next:
            if self._next[0] < self._now_ps:
                raise ValueError("arrivals must be in the order of their times")
            heapq.heappush(self._heap, (self._next[0], ARRIVE, 0, 0))

    def _arrive(self, now_ps: int) -> None:
        assert self._next is not None
        self.place(self._next[1], now_ps)
        self._arrive_next()

    def place(self, request: Request, now_ps: int) -> None:
        """Have the policy choose who gets it; in a call, for what does not come from outside."""
        for worker in self.workers:
            worker.engine.sync(now_ps)
        index = self._policy.choose(request, self.workers, now_ps)
        worker = self.workers[index]
        if worker.engine.submit(request, now_ps):
            self._refused += 1
            self._policy.on_refused(request.request_id)
        else:
            self._expect(index, now_ps)

    def _start(self, index: int, now_ps: int) -> None:
        engine = self.workers[index].engine
        end_ps = engine.start(now_ps)
        if end_ps is not None:
            self._push(end_ps, FINISH, index)
        elif (wake_ps := engine.wake_ps) is not None:
            self._push(wake_ps, START, index)

    def _finish(self, index: int, now_ps: int) -> None:
        for output in self.workers[index].engine.finish():
            if output.number == 0:
                self._policy.on_first_token(output.request_id, index, now_ps)
        self._push(now_ps, START, index)

    def _expect(self, index: int, now_ps: int) -> None:
        """A submission may have cut a row of steps short, or woken an idle engine."""
        end_ps = self.workers[index].engine.end_ps
        if end_ps is None:
            self._push(now_ps, START, index)
        else:
            self._push(end_ps, FINISH, index)

    def _push(self, at_ps: int, kind: int, index: int) -> None:
        self._versions[index] += 1
        heapq.heappush(self._heap, (at_ps, kind, index, self._versions[index]))

    def _ended(self, record: Record) -> None:
        self._records.append(record)
        self._policy.on_end(record)
