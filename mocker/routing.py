"""The production router behind replay's seam: its index, costs, load and choice, in virtual time.

What is left out is what needs a clock of its own: replicas, waiting for room, memory of routes.
Workers' speeds are the mock engine's own, as a router that measures would come to know them; how
long an answer will be is guessed from those that have ended.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mocker.events import BlockEvent, BlocksStored
from mocker.policies import Worker as MockWorker
from mocker.replay import FleetSettings
from mocker.sequence import Record, Request
from mocker.timing import PS_PER_S
from router.index import Hashes, Index, Outcome, Tier, WorkerId
from router.load import ActiveSequences
from router.router import Prompt, Query, Router
from router.selector import Chosen, PolicyName, Selector
from router.workers import Capacity, Speed, Worker, Workers

ANSWER_MEMORY = 1 / 64  # of the mean answer, the share of the latest


class RouterPolicy:
    """Worker `n` of the fleet is instance `n`."""

    def __init__(self, fleet: FleetSettings, policy: PolicyName, seed: int) -> None:
        engine = fleet.engine
        blocks = fleet.engines * engine.num_blocks
        blocks += (fleet.g2_blocks + fleet.g3_blocks) * fleet.engines + fleet.g4_blocks
        self._per_node = fleet.engines_per_node
        self._engines = fleet.engines
        self._block_tokens = engine.block_size
        self._index = Index(blocks)
        workers = Workers()
        self._active = ActiveSequences(workers)
        self.router = Router(
            workers,
            self._index,
            self._active,
            Selector(workers, policy, dice=random.Random(seed)),
            block_tokens=engine.block_size,
        )
        capacity = Capacity(engine.num_blocks, engine.max_num_batched_tokens)
        for number in range(fleet.engines):
            self.router.add_worker(Worker(WorkerId(number), speed_of(fleet), capacity))
        self._answer_tokens = 0.0

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

    def choose(self, request: Request, workers: Sequence[MockWorker], now_ps: int) -> int:
        query = self._query(request)
        decision = self.router.decide(query)
        assert isinstance(decision, Chosen), decision
        begun = self._active.begin(query.request, self.router.active_of(query, decision))
        assert begun, query.request
        return decision.worker.instance

    def on_event(self, event: BlockEvent) -> None:
        tier = Tier[event.tier]
        names = _words(event.block_hashes)
        for number in self._whose(event):
            worker = WorkerId(number)
            if isinstance(event, BlocksStored):
                tokens = _words(event.tokens_hashes)
                self._index.stored(worker, tier, event.parent_hash, names, tokens)
            else:
                self._index.removed(worker, tier, names)

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None:
        self._active.prefilled(str(request_id))

    def on_end(self, record: Record) -> None:
        self._active.end(str(record.request_id))
        gain = ANSWER_MEMORY if self._answer_tokens else 1.0
        self._answer_tokens += gain * (record.output_tokens - self._answer_tokens)

    def _query(self, request: Request) -> Query:
        blocks = request.prompt_tokens // self._block_tokens
        request.chain.extend(blocks)
        prompt = Prompt(
            request.prompt_tokens,
            _words(request.chain.locals[:blocks]),
            _words(request.chain.hashes[:blocks]),
        )
        expected = round(self._answer_tokens)
        return Query(str(request.request_id), prompt, expected_output_tokens=expected)

    def _whose(self, event: BlockEvent) -> range:
        """Engines that can use the blocks."""
        if event.tier == "G1":
            return range(event.engine, event.engine + 1)
        if event.tier == "G4":
            return range(self._engines)
        first = event.node * self._per_node
        return range(first, min(first + self._per_node, self._engines))


def speed_of(fleet: FleetSettings) -> Speed:
    """What the mock engine's timing says, in the router's terms."""
    step, links = fleet.engine.timing, (fleet.tiers.g2, fleet.tiers.g3, fleet.tiers.g4)
    block_bytes = fleet.engine.kv_bytes_per_token * fleet.engine.block_size
    g2, g3, g4 = (block_bytes / link.bytes_per_s for link in links)
    late2, late3, late4 = (link.latency_ps / PS_PER_S for link in links)
    return Speed(
        prefill_s_per_token=step.token_ps / PS_PER_S,
        prefill_s_per_token2=step.pair_ps / PS_PER_S,
        step_s=(step.overhead_ps + step.weights_ps) / PS_PER_S,
        step_s_per_block=step.kv_token_ps * fleet.engine.block_size / PS_PER_S,
        load_s_per_block=(g2, g3, g4),
        load_latency_s=(late2, late3, late4),
    )


def _words(hashes: Sequence[int]) -> Hashes:
    return np.array(hashes, dtype=np.uint64)
