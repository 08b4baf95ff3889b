"""Replay: requests go where the policy says, every token comes once, each time the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from mocker.policies import Deaf, Policy, Worker, policy_named
from mocker.replay import FleetSettings, Replay
from mocker.results import EngineTotals, ReplayResult
from mocker.sequence import Record, Request
from mocker.timing import PRESETS, PS_PER_S
from mocker.trace import TraceEntry, requests
from tests.mocker.builders import TIMING, request, settings

FLEET = FleetSettings(settings(), engines=3, engines_per_node=2)
POLICIES = ("round-robin", "random", "least-loaded", "power-of-two")


def arrivals(count: int, pause_ps: int) -> Iterator[tuple[int, Request]]:
    for number in range(count):
        yield number * pause_ps, request(number, [number % 4, 10, 20 + number % 7], 3 + number % 5)


class Always(Deaf):
    def __init__(self, index: int) -> None:
        self.index = index
        self.first_tokens: list[tuple[int, int, int]] = []
        self.ends: list[Record] = []

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        return self.index

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None:
        self.first_tokens.append((request_id, worker, now_ps))

    def on_end(self, record: Record) -> None:
        self.ends.append(record)


def run(policy: Policy, fleet: FleetSettings = FLEET, count: int = 60) -> ReplayResult:
    return Replay(fleet, policy, arrivals(count, 100)).run()


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_with_all_its_tokens_under_every_policy(name: str) -> None:
    result = run(policy_named(name, 1))
    assert [r.request_id for r in result.records] == list(range(60))
    for number, record in enumerate(result.records):
        assert record.outcome == "finished"
        assert len(record.token_times_ps) == 3 + number % 5
        assert record.token_times_ps[-1] == record.e2e_ps
    assert {r.engine for r in result.records} == {0, 1, 2}


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_seed_gives_the_same_result(name: str) -> None:
    first, second = (run(policy_named(name, 5)) for _ in range(2))
    assert first.requests() == second.requests()
    assert first.figures() == second.figures()


def test_another_seed_places_otherwise() -> None:
    placed = [[r.engine for r in run(policy_named("random", seed)).records] for seed in (1, 2)]
    assert placed[0] != placed[1]


def test_round_robin_takes_turns_and_least_loaded_the_idle() -> None:
    placed = [r.engine for r in run(policy_named("round-robin", 0)).records]
    assert placed == [n % 3 for n in range(60)]
    placed = [r.engine for r in run(policy_named("least-loaded", 0), count=3).records]
    assert placed == [0, 1, 2]


def test_the_policy_is_told_of_first_tokens_and_ends_at_their_times() -> None:
    policy = Always(2)
    result = run(policy)
    assert {r.engine for r in result.records} == {2}
    firsts = sorted((r.request_id, 2, r.arrival_ps + (r.ttft_ps or 0)) for r in result.records)
    assert sorted(policy.first_tokens) == firsts
    assert sorted(r.request_id for r in policy.ends) == list(range(60))
    ends = [r.finished_ps or 0 for r in policy.ends]
    assert ends == sorted(ends)


def test_requests_that_fit_no_engine_are_counted_as_refused() -> None:
    result = run(Always(0), replace(FLEET, engine=settings(num_blocks=4)), count=10)
    assert result.refused == 4  # 12 tokens of prompt, and 5 + 1 or 5 + 2 of answer
    assert len(result.records) == 6


def test_a_request_on_another_engine_of_the_node_finds_the_nodes_host_memory() -> None:
    """Round robin over two nodes of two and one: the prompt is cached per node."""
    fleet = replace(FLEET, g2_blocks=100)
    prompt = [1, 2, 3]
    spaced = ((n * 10**12, request(n, prompt, 1)) for n in range(6))
    result = Replay(fleet, policy_named("round-robin", 0), spaced).run()
    found = [{tier for tier, n in r.cached_tokens.items() if n} for r in result.records]
    assert found == [set(), {"G2"}, set(), {"G1"}, {"G1"}, {"G1"}]


def test_g4_is_shared_by_all_nodes() -> None:
    fleet = replace(FLEET, g4_blocks=100)
    spaced = ((n * 10**12, request(n, [1, 2, 3], 1)) for n in range(3))
    result = Replay(fleet, policy_named("round-robin", 0), spaced).run()
    assert [r.cached_tokens.get("G4", 0) for r in result.records] == [0, 8, 8]


def test_arrivals_out_of_order_are_refused() -> None:
    backwards = iter([(5, request(0, [1], 1)), (4, request(1, [1], 1))])
    with pytest.raises(ValueError, match="order"):
        Replay(FLEET, Always(0), backwards).run()


def test_the_figures_are_those_of_the_records() -> None:
    result = Replay(FLEET, Always(1), iter([(0, request(0, [1, 2], 3))])).run()
    figures = result.figures()
    prefill_ps = TIMING.prefill_ps(8)
    itls_ps = [TIMING.decode_ps(1, 9), TIMING.decode_ps(1, 10)]
    span_s = (prefill_ps + sum(itls_ps)) / PS_PER_S
    assert figures["ttft_s"]["p50"] == figures["ttft_s"]["p99"] == prefill_ps / PS_PER_S
    assert figures["itl_s"]["p50"] == itls_ps[0] / PS_PER_S
    assert figures["itl_s"]["p90"] == itls_ps[1] / PS_PER_S
    assert figures["e2e_s"]["mean"] == figures["span_s"] == span_s
    assert figures["output_tokens_per_s"] == pytest.approx(3 / span_s)
    assert figures["utilisation"] == pytest.approx(1 / 3)
    assert figures["busy_variation"] == pytest.approx(2**0.5)  # one of three did everything
    assert figures["steps"] == 3
    assert result.engines[1] == EngineTotals(prefill_ps + sum(itls_ps), 10, 3, 0)
    json.dumps([figures, result.requests()])


def test_figures_of_nothing_are_empty() -> None:
    figures = Replay(FLEET, Always(0), iter([])).run().figures()
    assert (figures["requests"], figures["ttft_s"], figures["hit_rate"]["G1"]) == (0, {}, 0.0)


def test_a_trace_hits_as_its_ids_say() -> None:
    """Two turns of one conversation: the second begins with the first's two whole blocks."""
    machine = PRESETS["llama-8b-h100"]
    engine = settings(timing=machine.step, block_size=64, num_blocks=500, max_num_batched_tokens=64)
    entries = [TraceEntry(0, 1100, 50, (1, 2, 3)), TraceEntry(60_000, 1600, 9, (1, 2, 4, 5))]
    fleet = FleetSettings(engine, engines=1)
    result = Replay(fleet, policy_named("round-robin", 0), requests(entries, 64)).run()
    assert [r.cached_tokens["G1"] for r in result.records] == [0, 1024]


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'best' is none of round-robin"):
        policy_named("best", 0)
