"""The same loop in virtual time: a fleet that follows its load, and does so the same every time."""

from __future__ import annotations

import pytest

from mocker.compare import Scene
from mocker.planned import Outcome, PlannedFleet
from mocker.planned_plot import picture
from mocker.trace import TraceEntry, requests
from planner.planning import Planner
from planner.settings import ForecastSettings, GoalSettings, PlanSettings, ScalingSettings

SCENE = Scene(engines=6, engines_per_node=3, g2_gb=32.0)
START_S = 20.0


def entries(
    begin_ms: float = 120_000, end_ms: float = 300_000, span_ms: float = 480_000
) -> list[TraceEntry]:
    """Two requests a second, and for three of eight minutes sixteen; each with its own prompt."""
    made, at_ms, block = [], 0.0, 0
    while at_ms < span_ms:
        at_ms += 62.5 if begin_ms <= at_ms < end_ms else 500.0
        made.append(TraceEntry(at_ms, 4096, 60, tuple(range(block, block + 8))))
        block += 8
    return made


def planned() -> Outcome:
    settings = PlanSettings(
        goals=GoalSettings(ttft=1.0),
        forecast=ForecastSettings(load_predictor="ewma", throughput_adjustment_interval=20.0),
        scaling=ScalingSettings(
            start_delay=START_S, scale_down_delay=60.0, load_adjustment_interval=5.0
        ),
    )
    fleet = PlannedFleet(
        SCENE.fleet(),
        Planner(settings),
        requests(entries(), SCENE.block_tokens),
        engines=1,
        start_delay_s=START_S,
        tick_s=5.0,
    )
    return fleet.run()


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return planned()


def test_every_request_is_answered_although_engines_come_and_go(outcome: Outcome) -> None:
    assert len(outcome.result.records) == len(entries())
    assert all(record.outcome == "finished" for record in outcome.result.records)
    assert outcome.result.refused == 0
    assert outcome.actions > 4


def test_the_fleet_grows_with_the_load_and_shrinks_after_it(outcome: Outcome) -> None:
    def serving(at_s: float) -> int:
        return next(size for when, size, _ in outcome.sizes if when >= at_s)

    assert serving(100) <= 2
    assert serving(250) >= 4
    assert serving(475) < serving(250)
    assert outcome.reversals() == 1
    longest = max(engines for _, _, engines in outcome.sizes)
    assert outcome.engine_s < 0.8 * longest * outcome.sizes[-1][0]


def test_an_engine_serves_no_sooner_than_it_can_have_started(outcome: Outcome) -> None:
    first = next(p for p in outcome.plans if p.decision.changes)
    grown = next(at_s for at_s, serving, _ in outcome.sizes if serving > 1)
    assert grown >= first.observation.at_s + START_S


def test_the_same_load_makes_the_same_decisions(outcome: Outcome) -> None:
    again = planned()
    assert [p.decision.targets for p in again.plans] == [p.decision.targets for p in outcome.plans]
    assert again.engine_s == outcome.engine_s


def test_every_decision_says_why(outcome: Outcome) -> None:
    assert all(plan.decision.reasons for plan in outcome.plans)


def test_a_run_is_drawn(outcome: Outcome) -> None:
    curve = [(at_s, 1.0, serving, serving) for at_s, serving, _ in outcome.sizes]
    drawn = picture([("a & b", curve)])
    assert drawn.count("<polyline") == 3
    assert "a &amp; b" in drawn


def test_prefill_and_decode_apart_each_follow_their_half_of_the_load() -> None:
    """More prompts come for a while, with answers of few tokens: that is work for prefill."""
    made = entries(60_000, 130_000, 260_000)
    settings = PlanSettings(
        goals=GoalSettings(ttft=1.0),
        forecast=ForecastSettings(load_predictor="ewma", throughput_adjustment_interval=20.0),
        scaling=ScalingSettings(
            mode="disagg",
            start_delay=START_S,
            scale_down_delay=60.0,
            load_adjustment_interval=5.0,
            max_gpu_budget=-1,
        ),
    )
    found = PlannedFleet(
        Scene(engines=10, engines_per_node=10, g2_gb=256.0).fleet(),
        Planner(settings),
        requests(made, SCENE.block_tokens),
        engines=1,
        start_delay_s=START_S,
        tick_s=5.0,
        prefill=5,
    ).run()
    records = found.result.records
    assert [r.request_id for r in records] == list(range(2 * len(made)))
    assert all(r.outcome == "finished" for r in records)
    prompts, answers = records[::2], records[1::2]
    assert all(r.engine < 5 and len(r.token_times_ps) == 1 for r in prompts)
    assert all(r.engine >= 5 and len(r.token_times_ps) == 59 for r in answers)
    # What a decode engine is given it does not compute.
    assert all(r.cached_tokens["G2"] >= 4096 - SCENE.block_tokens for r in answers)
    traffic = [t for p in found.plans if (t := p.observation.traffic) and t.prompts > 20]
    assert all(t.prompt_tokens == 4096 and not any(t.hits.values()) for t in traffic)
    most = {
        role: max(p.decision.targets[role] for p in found.plans) for role in ("prefill", "decode")
    }
    assert most["prefill"] >= 3 > most["decode"]
    assert found.reversals("prefill") == 1
