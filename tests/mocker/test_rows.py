"""Rows of decode steps taken at once, against single steps: everything must be the same.

Fleets of small engines with scarce blocks and shared tiers; a policy notes all that it is told and
sees. Nothing may differ: times, events, what was cached, the order of preemptions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mocker.engine import EngineSettings
from mocker.events import BlockEvent, BlocksStored
from mocker.plan import Plan
from mocker.policies import Worker
from mocker.replay import FleetSettings, Replay
from mocker.sequence import Record, Request
from mocker.timing import PS_PER_S, LinkTiming, StepTiming, TierTiming
from tests.mocker.builders import BLOCK, request

LINKS = TierTiming(
    LinkTiming(PS_PER_S, 7), LinkTiming(PS_PER_S // 50, 400), LinkTiming(PS_PER_S // 99, 2000)
)


class Witness:
    """Places requests by what it sees of the engines, and writes everything down."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.events: dict[Any, list[BlockEvent]] = defaultdict(list)
        self.kept: dict[Any, set[int]] = defaultdict(set)

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        views = [
            (
                *(sorted(w.engine.outputs()), w.engine.waiting_count, w.engine.running_count),
                *(w.engine.pool.used_count, w.engine.queued_tokens),
            )
            for w in workers
        ]
        told = sorted((source, len(events)) for source, events in self.events.items())
        self.seen.append((now_ps, views, told))
        assert all(e.at_ps <= now_ps for events in self.events.values() for e in events[-1:])
        return min(workers, key=lambda w: (views[w.index][3], -w.index)).index

    def on_event(self, event: BlockEvent) -> None:
        owner = {"G1": event.engine, "G4": -1}.get(event.tier, event.node)
        source = (event.tier, owner)
        self.events[source].append(event)
        if isinstance(event, BlocksStored):
            assert not self.kept[source] & set(event.block_hashes)
            self.kept[source] |= set(event.block_hashes)
        else:
            assert self.kept[source] >= set(event.block_hashes)
            self.kept[source] -= set(event.block_hashes)

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None:
        self.seen.append(("first", request_id, worker, now_ps))

    def on_refused(self, request_id: int) -> None:
        self.seen.append(("refused", request_id))

    def on_end(self, record: Record) -> None:
        self.seen.append(("end", record.request_id, record.engine, record.finished_ps))


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 3000),  # since the one before
        st.integers(0, 3),  # of which prompts it is a prefix
        st.integers(1, 6 * BLOCK),  # tokens
        st.integers(1, 30),  # of answer
    ),
    min_size=1,
    max_size=14,
)
TIMINGS = st.builds(
    StepTiming,
    overhead_ps=st.integers(1, 50),
    weights_ps=st.integers(0, 200),
    token_ps=st.integers(0, 30),
    pair_ps=st.integers(0, 5),
    kv_token_ps=st.integers(0, 5),
)
FLEETS = st.builds(
    FleetSettings,
    engine=st.builds(
        EngineSettings,
        timing=TIMINGS,
        num_blocks=st.integers(14, 24),
        block_size=st.just(BLOCK),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(5, 40),
        kv_bytes_per_token=st.integers(1, 20),
    ),
    engines=st.integers(1, 4),
    engines_per_node=st.integers(1, 3),
    g2_blocks=st.integers(0, 20),
    g3_blocks=st.integers(0, 40),
    g4_blocks=st.integers(0, 40),
    tiers=st.just(LINKS),
)


def play(
    fleet: FleetSettings, arrivals: list[tuple[int, int, int, int]], *, bulk: bool
) -> tuple[list[Any], Witness]:
    witness = Witness()
    replay = Replay(
        replace(fleet, engine=replace(fleet.engine, bulk=bulk)),
        witness,
        _requests(arrivals),
        listen=True,
    )
    result = replay.run()
    told = [
        (r.request_id, r.engine, r.scheduled_ps, r.finished_ps, r.cached_tokens, r.preemptions)
        for r in result.records
    ]
    times = [r.token_times_ps.tolist() for r in result.records]
    assert [len(each) for each in times] == [outputs for *_, outputs in arrivals]
    assert all(sorted(set(each)) == each for each in times)
    return [told, times, result.engines], witness


@settings(max_examples=300, deadline=None)
@given(FLEETS, ARRIVALS)
def test_rows_of_steps_are_exactly_single_steps(
    fleet: FleetSettings, arrivals: list[tuple[int, int, int, int]]
) -> None:
    rows, seen_in_rows = play(fleet, arrivals, bulk=True)
    single, seen_in_single = play(fleet, arrivals, bulk=False)
    assert rows == single
    assert seen_in_rows.seen == seen_in_single.seen
    assert seen_in_rows.events == seen_in_single.events


@given(
    st.integers(1, 10**14), st.integers(0, 10**10), st.integers(0, 10**7), st.integers(-2, 10**14)
)
def test_the_steps_that_have_ended_are_counted_exactly(
    first_ps: int, growth_ps: int, step: int, offset: int
) -> None:
    plan = Plan(1000, 1, first_ps + growth_ps, growth_ps, [], [])
    now_ps = plan.begin_of(step) + offset
    ended = plan.ended_by(now_ps)
    assert ended == 0 or plan.begin_of(ended) <= now_ps
    assert plan.begin_of(ended + 1) > now_ps
    begun = plan.begun_before(now_ps)
    assert begun == 0 or plan.begin_of(begun - 1) < now_ps
    assert plan.begin_of(begun) >= now_ps


def _requests(arrivals: list[tuple[int, int, int, int]]) -> Any:
    now_ps = 0
    for number, (pause_ps, prompt, tokens, outputs) in enumerate(arrivals):
        now_ps += pause_ps
        blocks = range(-(-tokens // BLOCK))
        ids = [(prompt // 2 if i < 2 else prompt) * 10 + i for i in blocks]
        yield now_ps, request(number, ids, outputs, tokens)
