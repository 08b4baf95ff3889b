"""What a routing decision takes, from tokens to worker.

A fleet of 64 workers that hold the beginnings of prompts of 8,192 tokens in four tiers, and run a
few sequences. Each decision gets another prompt, as tokens: its blocks are
hashed, looked up and costed for all workers. Against: the same decision with nothing to find, which
stops at the first block.

    python -m benchmarks.router [--workers 64] [--tokens 8192] [--block-tokens 16]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.cli.figures import Row, tell
from router.index import Hashes, Index, Tier, WorkerId
from router.load import ActiveSequences
from router.router import Prompt, Query, Router
from router.selector import Chosen, PolicyName, Selector
from router.workers import Worker, Workers
from runtime.hashing import block_hashes, sequence_hashes

MEDIAN_US_MAX = 150.0
P99_US_MAX = 500.0
PROMPTS = 64
HOLDERS = 8  # workers that hold a part of a prompt
RUNNING = 256  # sequences on the fleet
DECISIONS = 4000
VOCABULARY = 1 << 17

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Scale:
    workers: int
    tokens: int
    block_tokens: int


def query(name: str, tokens: Tokens, scale: Scale) -> Query:
    local = block_hashes(tokens, scale.block_tokens)
    return Query(name, Prompt(len(tokens), local, sequence_hashes(local)))


class Fleet:
    def __init__(self, scale: Scale, policy: PolicyName) -> None:
        self._dice = random.Random(1)
        self._generator = np.random.default_rng(1)
        self._scale = scale
        workers = Workers()
        self._index = Index(capacity=1 << 21)
        self.active = ActiveSequences(workers)
        self.router = Router(
            workers,
            self._index,
            self.active,
            Selector(workers, policy, dice=self._dice),
            block_tokens=scale.block_tokens,
        )
        for instance in range(scale.workers):
            self.router.add_worker(Worker(WorkerId(instance)))
        self.holdings: list[tuple[WorkerId, Tier, Hashes, Hashes]] = []
        self.prompts = [self.new_prompt() for _ in range(PROMPTS)]
        for tokens in self.prompts:
            self._store(tokens)

    def new_prompt(self) -> Tokens:
        return self._generator.integers(0, VOCABULARY, self._scale.tokens, dtype=np.uint32)

    def _store(self, tokens: Tokens) -> None:
        local = block_hashes(tokens, self._scale.block_tokens)
        names = sequence_hashes(local)
        holders = self._dice.sample(range(self._scale.workers), min(HOLDERS, self._scale.workers))
        for instance in holders:
            for tier in Tier:
                end = self._dice.randrange(len(local) + 1)
                self.holdings.append((WorkerId(instance), tier, names[:end], local[:end]))
                self._index.stored(WorkerId(instance), tier, None, names[:end], local[:end])


def timed_us(router: Router, prompts: list[Tokens], scale: Scale, count: int) -> list[float]:
    """Of each decision, hashing included."""
    taken: list[float] = []
    for number in range(count):
        tokens = prompts[number % len(prompts)]
        start = time.perf_counter_ns()
        decision = router.decide(query("q", tokens, scale))
        taken.append((time.perf_counter_ns() - start) / 1000)
        assert isinstance(decision, Chosen)
    return taken


def row(name: str, taken: list[float], quantile: float, base: list[float], most: float) -> Row:
    cut = int(quantile * 100) - 1
    value = statistics.quantiles(taken, n=100)[cut]
    against = statistics.quantiles(base, n=100)[cut]
    return {
        "name": name,
        "value": round(value, 1),
        "min": round(min(taken), 1),
        "max": round(max(taken), 1),
        "unit": "us",
        "against": "nothing to find",
        "against_value": round(against, 1),
        "ratio": round(value / against, 3),
        "target": most,
        "ok": value <= most,
    }


def run(scale: Scale) -> list[Row]:
    rows: list[Row] = []
    policies: tuple[PolicyName, ...] = ("kv", "kv-blocks")
    for policy in policies:
        fleet = Fleet(scale, policy)
        for number in range(RUNNING):
            decision = fleet.router.decide(query("r", fleet.new_prompt(), scale))
            assert isinstance(decision, Chosen)
            chosen = query(f"r{number}", fleet.new_prompt(), scale)
            fleet.active.begin(f"r{number}", fleet.router.active_of(chosen, decision))
        new = [fleet.new_prompt() for _ in range(PROMPTS)]
        found: list[float] = []
        nothing: list[float] = []
        for _ in range(10):  # in turns, so that both see the same machine
            found += timed_us(fleet.router, fleet.prompts, scale, DECISIONS // 10)
            nothing += timed_us(fleet.router, new, scale, DECISIONS // 10)
        what = f"{policy}: {scale.tokens} tokens, {scale.workers} workers"
        rows.append(row(f"{what}, median", found, 0.5, nothing, MEDIAN_US_MAX))
        rows.append(row(f"{what}, p99", found, 0.99, nothing, P99_US_MAX))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block-tokens", type=int, default=16)
    given = parser.parse_args()
    tell("router", run(Scale(given.workers, given.tokens, given.block_tokens)))


if __name__ == "__main__":
    main()
