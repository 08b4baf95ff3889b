"""The production router behind replay's seam: its index, costs, load and choice, in virtual time.

What is left out is what needs a clock of its own: replicas, waiting for room, memory of routes.
Workers' speeds are the mock engine's own, as a router that measures would come to know them; how
long an answer will be is guessed from those that have ended. Output is told of as a frontend would,
but only when somebody is about to ask.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from mocker.engine import EngineSettings
from mocker.events import BlockEvent, BlocksStored
from mocker.policies import Worker as MockWorker
from mocker.replay import FleetSettings
from mocker.sequence import Record, Request
from mocker.timing import PS_PER_S, TierTiming
from router.cost import BlocksCost, SecondsCost
from router.index import Hashes, Index, Outcome, Tier, WorkerId
from router.load import ActiveSequences
from router.router import Prompt, Query, Routed, Router
from router.selector import Chosen, PolicyName, Selector
from router.workers import Capacity, Speed, Worker, Workers

ANSWER_MEMORY: Final = 1 / 64  # of the mean answer, the share of the latest


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router under trial is set up; `events_late_s` and the errors make it know less."""

    policy: PolicyName = "kv"
    seconds: SecondsCost | None = None
    blocks: BlocksCost | None = None
    hears_output: bool = True
    waits_pass: bool = True  # no: a prompt is waited for in full until its first token
    events_late_s: float = 0.0  # from what happened to when the router hears of it
    prefill_error: float = 1.0  # times the true seconds of prefill,
    step_error: float = 1.0  # and of a decode step


class AnswerLength:
    """How long an answer will be: a moving mean of those that have ended."""

    def __init__(self) -> None:
        self._tokens = 0.0

    @property
    def expected(self) -> int:
        return round(self._tokens)

    def ended(self, tokens: int) -> None:
        gain = ANSWER_MEMORY if self._tokens else 1.0
        self._tokens += gain * (tokens - self._tokens)


class RouterPolicy:
    """Worker `n` of the fleet is instance `n`."""

    def __init__(self, fleet: FleetSettings, routing: Routing, seed: int) -> None:
        engine = fleet.engine
        blocks = fleet.engines * engine.num_blocks
        blocks += (fleet.g2_blocks + fleet.g3_blocks) * fleet.engines + fleet.g4_blocks
        self._per_node = fleet.engines_per_node
        self._engines = fleet.engines
        self._block_tokens = engine.block_size
        self._hears_output = routing.hears_output
        self._late_ps = round(routing.events_late_s * PS_PER_S)
        self._late: deque[BlockEvent] = deque()
        self._index = Index(blocks)
        self._now_s = 0.0
        workers = Workers(lambda: self._now_s if routing.waits_pass else 0.0)
        self._active = ActiveSequences(workers)
        self.router = Router(
            workers,
            self._index,
            self._active,
            Selector(
                workers,
                routing.policy,
                seconds=routing.seconds,
                blocks=routing.blocks,
                dice=random.Random(seed),
            ),
            block_tokens=engine.block_size,
        )
        capacity = Capacity(engine.num_blocks, engine.max_num_batched_tokens)
        speed = mistaken(speed_of(engine, fleet.tiers), routing)
        self._workers = [
            Worker(WorkerId(number), speed, capacity) for number in range(fleet.engines)
        ]
        for worker in self._workers:
            self.router.add_worker(worker)
        self._answers = AnswerLength()
        self._routed: dict[int, tuple[Routed, int]] = {}  # and the output told of

    @property
    def outcomes(self) -> Counter[Outcome]:
        """What became of block events."""
        return Counter(self._index.outcomes_total)

    def found_blocks(self, request: Request) -> list[int]:
        """Leading blocks of the prompt that the router believes each engine has in G1."""
        decision = self.router.decide(self._query(request))
        assert isinstance(decision, Chosen), decision
        found: list[int] = decision.request.covered[Tier.G1].tolist()
        return found

    def accept(self, worker: int, accepting: bool) -> None:
        """Whether it is sent requests; all are, until this says otherwise."""
        self.router.change_worker(replace(self._workers[worker], accepting=accepting))

    def choose(self, request: Request, workers: Sequence[MockWorker], now_ps: int) -> int:
        self._now_s = now_ps / PS_PER_S
        while self._late and self._late[0].at_ps + self._late_ps <= now_ps:
            self._apply(self._late.popleft())
        for worker in workers if self._hears_output else ():
            for request_id, tokens in worker.engine.outputs():
                self._output(request_id, tokens)
        routed = self.router.send(self._query(request))
        assert isinstance(routed, Routed), routed
        self._routed[request.request_id] = routed, 0
        return routed.worker.instance

    def on_event(self, event: BlockEvent) -> None:
        if self._late_ps:
            self._late.append(event)
        else:
            self._apply(event)

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None:
        self._now_s = now_ps / PS_PER_S
        routed = self._routed.get(request_id)
        if routed is not None:  # an answer of one token has ended by now
            routed[0].first_token()

    def on_end(self, record: Record) -> None:
        if record.finished_ps is not None:
            self._now_s = record.finished_ps / PS_PER_S
        self._routed.pop(record.request_id)[0].end()
        self._answers.ended(record.output_tokens)

    def on_refused(self, request_id: int) -> None:
        self._routed.pop(request_id)[0].end()

    def _output(self, request_id: int, tokens: int) -> None:
        routed, told = self._routed[request_id]
        if tokens > told:
            routed.output(tokens - told)
            self._routed[request_id] = routed, tokens

    def _apply(self, event: BlockEvent) -> None:
        tier = Tier[event.tier]
        names = _words(event.block_hashes)
        for number in self._whose(event):
            worker = WorkerId(number)
            if isinstance(event, BlocksStored):
                tokens = _words(event.tokens_hashes)
                self._index.stored(worker, tier, event.parent_hash, names, tokens)
            else:
                self._index.removed(worker, tier, names)

    def _query(self, request: Request) -> Query:
        blocks = request.prompt_tokens // self._block_tokens
        request.chain.extend(blocks)
        prompt = Prompt(
            request.prompt_tokens,
            _words(request.chain.locals[:blocks]),
            _words(request.chain.hashes[:blocks]),
        )
        return Query(str(request.request_id), prompt, expected_output_tokens=self._answers.expected)

    def _whose(self, event: BlockEvent) -> range:
        """Engines that can use the blocks."""
        if event.tier == "G1":
            return range(event.engine, event.engine + 1)
        if event.tier == "G4":
            return range(self._engines)
        first = event.node * self._per_node
        return range(first, min(first + self._per_node, self._engines))


def speed_of(engine: EngineSettings, tiers: TierTiming, speedup: float = 1.0) -> Speed:
    """What the mock engine's timing says, in the router's terms and by the wall clock."""
    step, links = engine.timing, (tiers.g2, tiers.g3, tiers.g4)
    block_bytes = engine.kv_bytes_per_token * engine.block_size
    g2, g3, g4 = (block_bytes / link.bytes_per_s / speedup for link in links)
    late2, late3, late4 = (link.latency_ps / PS_PER_S / speedup for link in links)
    per_s = PS_PER_S * speedup
    return Speed(
        prefill_s_per_token=step.token_ps / per_s,
        prefill_s_per_token2=step.pair_ps / per_s,
        step_s=(step.overhead_ps + step.weights_ps) / per_s,
        step_s_per_block=step.kv_token_ps * engine.block_size / per_s,
        load_s_per_block=(g2, g3, g4),
        load_latency_s=(late2, late3, late4),
    )


def mistaken(speed: Speed, routing: Routing) -> Speed:
    return replace(
        speed,
        prefill_s_per_token=speed.prefill_s_per_token * routing.prefill_error,
        prefill_s_per_token2=speed.prefill_s_per_token2 * routing.prefill_error,
        step_s=speed.step_s * routing.step_error,
        step_s_per_block=speed.step_s_per_block * routing.step_error,
    )


def _words(hashes: Sequence[int]) -> Hashes:
    return np.array(hashes, dtype=np.uint64)
