"""One decision: of the workers that may serve a request, which one.

In the order of the filters: those the request names, required taints, the healthy ones if any is,
busy limits. Then a pinned worker, a session's, or the policy's choice. The decision keeps what it
was made from, and makes sentences of it only when asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Final, Literal, assert_never

import numpy as np

from router.affinity import owner_of
from router.choice import RoundRobin, any_of, better_of_two, least_loaded, lowest, sampled
from router.cost import BlocksCost, Cost, Costs, Request, SecondsCost
from router.index import Tier, WorkerId
from router.limits import BusyLimits
from router.workers import Bools, Floats, Workers

PolicyName = Literal[
    "kv", "kv-blocks", "round-robin", "random", "power-of-two", "least-loaded", "direct"
]
Reason = Literal["pinned", "session", "policy"]
SessionMode = Literal["soft", "hard", "off"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request asks of its worker beyond being able to serve it."""

    among: frozenset[WorkerId] | None = None  # None: any
    taints: frozenset[str] = frozenset()  # a worker must have all of these
    pinned: WorkerId | None = None  # this one or none
    session: str | None = None  # the same worker as others of this name
    temperature: float | None = None  # instead of the policy's
    preferred: dict[str, float] = field(default_factory=dict)  # taint -> weight; costs fall by it


@dataclass(frozen=True, slots=True)
class NoWorker:
    """None of the workers may serve the request; more of the same will not either."""

    why: str


@dataclass(frozen=True, slots=True)
class AllBusy:
    """Workers could serve it, and all of them are over their limits."""

    workers: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """`names`: the candidates by row, as they were when the decision was made."""

    row: int
    worker: WorkerId
    policy: PolicyName
    reason: Reason
    request: Request
    names: tuple[tuple[int, WorkerId], ...]
    costs: Costs | None

    def covered_blocks(self, row: int | None = None) -> dict[str, int]:
        """Blocks of the prompt that the worker finds in each tier, beyond those of better tiers."""
        column = self.request.covered[:, self.row if row is None else row].tolist()
        better = [0, *column[:-1]]
        return {name: all_ - of for name, all_, of in zip(_TIERS, column, better, strict=True)}

    @property
    def best_found_blocks(self) -> int:
        """The most leading blocks that any candidate has, in whichever tier."""
        return int(self.request.covered[-1, [row for row, _ in self.names]].max())

    def explain(self) -> dict[str, Any]:
        """All candidates with the terms of their costs, the cheapest first."""
        candidates = [self._candidate(row, name) for row, name in self.names]
        candidates.sort(key=lambda one: (one.get("cost", 0.0), one["worker"]))
        return {
            "worker": str(self.worker),
            "policy": self.policy,
            "reason": self.reason,
            "unit": self.costs.unit if self.costs else None,
            "tokens": self.request.tokens,
            "blocks": self.request.blocks,
            "candidates": candidates,
        }

    def _candidate(self, row: int, name: WorkerId) -> dict[str, Any]:
        about: dict[str, Any] = {"worker": str(name), "chosen": row == self.row}
        about["blocks_found"] = self.covered_blocks(row)
        if self.costs is not None:
            about["cost"] = float(self.costs.total[row])
            about["terms"] = {term: float(all_[row]) for term, all_ in self.costs.terms.items()}
        return about


Decision = Chosen | AllBusy | NoWorker
_TIERS: Final = tuple(tier.name.lower() for tier in Tier)


class Selector:
    """One thread calls it. `direct` serves only requests that are pinned."""

    def __init__(
        self,
        workers: Workers,
        policy: PolicyName = "kv",
        *,
        seconds: SecondsCost | None = None,
        blocks: BlocksCost | None = None,
        limits: BusyLimits | None = None,
        temperature: float = 0.0,
        sessions: SessionMode = "soft",
        dice: random.Random | None = None,
    ) -> None:
        """`sessions`: where a session's worker is over its limits, `soft` takes the next one of its
        order and `hard` none; `off` has sessions count for nothing."""
        if temperature < 0.0:
            raise ValueError(f"temperature is {temperature}; it must not be negative")
        self.policy = policy
        self.limits = limits or BusyLimits()
        self._workers = workers
        self.seconds = seconds or SecondsCost()
        self._cost: Cost | None = None
        if policy == "kv":
            self._cost = self.seconds
        elif policy == "kv-blocks":
            self._cost = blocks or BlocksCost()
        self._sessions = sessions
        self._temperature = temperature
        self._dice = dice or random.Random()
        self._round_robin = RoundRobin()

    def select(self, request: Request, wishes: Wishes | None = None) -> Decision:
        """`request.covered` has a column for each of the workers' rows."""
        assert request.covered.shape == (len(Tier), self._workers.rows)
        wishes = wishes or Wishes()
        able = self.able(wishes)
        if isinstance(able, NoWorker):
            return able
        eligible = able & ~self.limits.busy(self._workers)
        if self._sessions == "hard" and wishes.session is not None and wishes.pinned is None:
            only = np.zeros_like(eligible)
            only[self._owner(wishes.session, able)] = True
            able, eligible = only, eligible & only
        if not eligible.any():
            return AllBusy(int(np.count_nonzero(able)))
        costs = None if self._cost is None else self._cost(request, self._workers, eligible)
        if costs is not None and wishes.preferred:
            costs = Costs(costs.total * self._preference(wishes.preferred), costs.terms, costs.unit)
        row, reason = self._choose(costs, eligible, wishes)
        names = tuple((r, self._workers.at(r).id) for r in np.flatnonzero(eligible).tolist())
        worker = self._workers.at(row).id
        return Chosen(row, worker, self.policy, reason, request, names, costs)

    def preview(self, request: Request, wishes: Wishes) -> Decision:
        """What `select` will say next; it leaves no trace."""
        state, turn = self._dice.getstate(), self._round_robin.last
        try:
            return self.select(request, wishes)
        finally:
            self._dice.setstate(state)
            self._round_robin.last = turn

    def why_not(self, wishes: Wishes) -> dict[WorkerId, str]:
        """Those that may not serve the request, each with what keeps it from it."""
        found: dict[WorkerId, str] = {}
        able = self.able(wishes)
        for worker in self._workers:
            row = self._workers.row(worker.id)
            if not worker.accepting:
                found[worker.id] = "draining, or not serving yet"
            elif wishes.among is not None and worker.id not in wishes.among:
                found[worker.id] = "not among those the request allows"
            elif wishes.pinned is not None and worker.id != wishes.pinned:
                found[worker.id] = "the request names another"
            elif not wishes.taints <= worker.taints:
                missing = wishes.taints - worker.taints
                found[worker.id] = f"lacks {', '.join(sorted(missing))}"
            elif not isinstance(able, NoWorker) and not able[row]:
                found[worker.id] = "its health check has not passed, and others' have"
            elif (busy := self.limits.why_busy(self._workers, row)) is not None:
                found[worker.id] = busy
        return found

    def able(self, wishes: Wishes) -> Bools | NoWorker:
        """Rows that may serve the request, however busy they are; at least one.

        Workers whose health check has not passed are among them only if there are no others.
        """
        able = self._workers.mask(wishes.among)
        if not able.any():
            if wishes.among is not None:
                return NoWorker("none of the workers that the request allows is there and serving")
            if not len(self._workers):
                return NoWorker("no worker is registered")
            return NoWorker(f"none of {len(self._workers)} workers takes requests")
        if wishes.pinned is not None:
            able &= self._workers.mask(frozenset([wishes.pinned]))
            if not able.any():
                return NoWorker(
                    f"worker {wishes.pinned}, which was asked for, is not there or not serving"
                )
        elif self.policy == "direct":
            return NoWorker("the policy is direct and the request names no worker")
        if wishes.taints:
            for row in np.flatnonzero(able).tolist():
                able[row] = wishes.taints <= self._workers.at(row).taints
            if not able.any():
                return NoWorker(f"no worker has {', '.join(sorted(wishes.taints))}")
        return self._workers.well(able)

    def _choose(self, costs: Costs | None, eligible: Bools, wishes: Wishes) -> tuple[int, Reason]:
        if wishes.pinned is not None:
            return self._workers.row(wishes.pinned), "pinned"
        if wishes.session is not None and self._sessions != "off":
            return self._owner(wishes.session, eligible), "session"
        return self._by_policy(costs, eligible, wishes.temperature), "policy"

    def _owner(self, session: str, rows: Bools) -> int:
        ids = (self._workers.at(row).id for row in np.flatnonzero(rows).tolist())
        owner = owner_of(session, ids)
        assert owner is not None, "there is a worker to choose"
        return self._workers.row(owner)

    def _by_policy(self, costs: Costs | None, eligible: Bools, temperature: float | None) -> int:
        match self.policy:
            case "kv" | "kv-blocks":
                assert costs is not None
                heat = self._temperature if temperature is None else temperature
                if heat > 0.0:
                    return sampled(costs.total, eligible, heat, self._dice)
                return lowest(costs.total, eligible, self._dice)
            case "round-robin":
                return self._round_robin(self._workers, eligible)
            case "random":
                return any_of(eligible, self._dice)
            case "power-of-two":
                return better_of_two(self._workers, eligible, self._dice)
            case "least-loaded":
                return least_loaded(self._workers, eligible, self._dice)
            case "direct":
                raise AssertionError("a direct request is pinned")
            case _:
                assert_never(self.policy)

    def _preference(self, preferred: dict[str, float]) -> Floats:
        """`exp(-tanh(sum of the weights of a worker's preferred taints))`, as the reference's."""
        weights = np.zeros(self._workers.rows)
        for worker in self._workers:
            weights[self._workers.row(worker.id)] = sum(
                weight for taint, weight in preferred.items() if taint in worker.taints
            )
        factors: Floats = np.exp(-np.tanh(weights))
        return factors
