"""Replay: requests go where the policy says, every token comes once, each time the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from mocker.events import BlockEvent
from mocker.policies import Policy, Worker
from mocker.replay import FleetSettings, Replay
from mocker.results import EngineTotals, ReplayResult
from mocker.routing import RouterPolicy, Routing
from mocker.sequence import Record, Request
from mocker.timing import PRESETS, PS_PER_S
from mocker.trace import TraceEntry, requests
from router.index import WorkerId
from router.selector import PolicyName
from tests.mocker.builders import TIMING, request, settings

FLEET = FleetSettings(settings(), engines=3, engines_per_node=2)
POLICIES: tuple[PolicyName, ...] = ("round-robin", "random", "least-loaded", "power-of-two")


def routed(name: PolicyName, seed: int = 0, fleet: FleetSettings = FLEET) -> RouterPolicy:
    return RouterPolicy(fleet, Routing(name), seed)


def arrivals(count: int, pause_ps: int) -> Iterator[tuple[int, Request]]:
    for number in range(count):
        yield number * pause_ps, request(number, [number % 4, 10, 20 + number % 7], 3 + number % 5)


class Always:
    def __init__(self, index: int) -> None:
        self.index = index
        self.first_tokens: list[tuple[int, int, int]] = []
        self.ends: list[Record] = []
        self.refused: list[int] = []

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        return self.index

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None:
        self.first_tokens.append((request_id, worker, now_ps))

    def on_event(self, event: BlockEvent) -> None:
        raise AssertionError("it did not ask for events")

    def on_end(self, record: Record) -> None:
        self.ends.append(record)

    def on_refused(self, request_id: int) -> None:
        self.refused.append(request_id)


def run(policy: Policy, fleet: FleetSettings = FLEET, count: int = 60) -> ReplayResult:
    return Replay(fleet, policy, arrivals(count, 100)).run()


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_with_all_its_tokens_under_every_policy(name: PolicyName) -> None:
    result = run(routed(name, 1))
    assert [r.request_id for r in result.records] == list(range(60))
    for number, record in enumerate(result.records):
        assert record.outcome == "finished"
        assert len(record.token_times_ps) == 3 + number % 5
        assert record.token_times_ps[-1] == record.e2e_ps
    assert {r.engine for r in result.records} == {0, 1, 2}


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_seed_gives_the_same_result(name: PolicyName) -> None:
    first, second = (run(routed(name, 5)) for _ in range(2))
    assert first.requests() == second.requests()
    assert first.figures() == second.figures()


def test_another_seed_places_otherwise() -> None:
    placed = [[r.engine for r in run(routed("random", seed)).records] for seed in (1, 2)]
    assert placed[0] != placed[1]


def test_round_robin_takes_turns_and_least_loaded_the_idle() -> None:
    placed = [r.engine for r in run(routed("round-robin")).records]
    assert placed == [n % 3 for n in range(60)]
    placed = [r.engine for r in run(routed("least-loaded"), count=3).records]
    assert sorted(placed) == [0, 1, 2]


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
    policy = Always(0)
    result = run(policy, replace(FLEET, engine=settings(num_blocks=4)), count=10)
    assert result.refused == len(policy.refused) == 4  # 12 tokens, and 5 + 1 or 5 + 2 of answer
    assert len(result.records) == 6


def test_a_request_on_another_engine_of_the_node_finds_the_nodes_host_memory() -> None:
    """Round robin over two nodes of two and one: the prompt is cached per node."""
    fleet = replace(FLEET, g2_blocks=100)
    prompt = [1, 2, 3]
    spaced = ((n * 10**12, request(n, prompt, 1)) for n in range(6))
    result = Replay(fleet, routed("round-robin", fleet=fleet), spaced).run()
    found = [{tier for tier, n in r.cached_tokens.items() if n} for r in result.records]
    assert found == [set(), {"G2"}, set(), {"G1"}, {"G1"}, {"G1"}]


def test_g4_is_shared_by_all_nodes() -> None:
    fleet = replace(FLEET, g4_blocks=100)
    spaced = ((n * 10**12, request(n, [1, 2, 3], 1)) for n in range(3))
    result = Replay(fleet, routed("round-robin", fleet=fleet), spaced).run()
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
    assert figures["busy_peak"] == pytest.approx(3)  # one of three did everything
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
    result = Replay(fleet, routed("round-robin", fleet=fleet), requests(entries, 64)).run()
    assert [r.cached_tokens["G1"] for r in result.records] == [0, 1024]


class Watching(RouterPolicy):
    """Remembers how many blocks the router counted on each engine, after each choice."""

    seen: list[list[float]]

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        chosen = super().choose(request, workers, now_ps)
        count = len(workers)
        loads = [self.router.load_of(WorkerId(number))["blocks"] for number in range(count)]
        self.seen = [*getattr(self, "seen", []), loads]
        return chosen


def test_the_router_is_told_of_output_as_it_grows() -> None:
    """Two long answers on two engines: the third goes where fewer blocks are in use by then."""
    fleet = replace(FLEET, engines=2, engine=settings(num_blocks=200))
    asked = [
        (0, request(0, [1, 2], 2)),
        (1, request(1, [3, 4, 5], 400)),
        (2, request(2, [6], 400)),
        (100_000, request(3, [7], 1)),
    ]
    policy = Watching(fleet, Routing("kv-blocks"), 0)
    result = Replay(fleet, policy, iter(asked)).run()
    generated = [
        len(r.token_times_ps[r.token_times_ps + r.arrival_ps <= 100_000]) for r in result.records
    ]
    wanted = [0.0, 0.0]
    for record, tokens, blocks in zip(result.records[1:], generated[1:], (3, 1, 1), strict=True):
        wanted[record.engine] += blocks + -(-tokens // 4)
    assert min(generated[1:3]) > 40
    assert sorted(policy.seen[-1]) == sorted(wanted)


def test_a_router_that_hears_late_finds_less() -> None:
    spaced = [(n * 1000, request(n, [1, 2, 3, 4], 1)) for n in range(4)]
    fleet = replace(FLEET, engine=settings(num_blocks=200))

    def hits(late_s: float) -> int:
        policy = RouterPolicy(fleet, Routing("kv", events_late_s=late_s), 0)
        found = Replay(fleet, policy, iter(spaced), listen=True).run()
        return sum(record.cached_tokens.get("G1", 0) for record in found.records)

    assert hits(0.0) == 3 * 12  # all but the last token, in whole blocks
    assert hits(1.0) < hits(0.0)


def test_throughput_is_that_of_a_full_fleet() -> None:
    """One engine that serves one request at a time, and all come at once."""
    fleet = FleetSettings(settings(max_num_seqs=1), engines=1)
    asked = [(0, request(n, [100 + n], 1)) for n in range(50)]
    result = Replay(fleet, Always(0), iter(asked)).run()
    assert result.throughput() == pytest.approx(PS_PER_S / TIMING.prefill_ps(4))
