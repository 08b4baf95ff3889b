"""Decisions: within bounds, never fewer for more load, and steady where the load is."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.decide import Decision, State, decide
from planner.observe import EngineLoad
from runtime.engine_card import Role
from tests.planner.builders import GOALS, decided, forecast, load, perf, scaling, seen


def kinds(decision: Decision) -> list[str]:
    return [reason.kind for reason in decision.reasons]


def target(decision: Decision) -> int:
    return decision.targets["aggregated"]


@settings(deadline=None, max_examples=60)
@given(
    rate=st.floats(0, 2000),
    there=st.integers(0, 40),
    waiting=st.floats(0, 500),
    kv_used=st.floats(0, 1),
    least=st.integers(0, 5),
    more=st.integers(0, 30),
    budget=st.integers(0, 64),
    gpus=st.integers(1, 8),
)
def test_no_load_leaves_the_bounds(
    rate: float,
    there: int,
    waiting: float,
    kv_used: float,
    least: int,
    more: int,
    budget: int,
    gpus: int,
) -> None:
    bounds = scaling(
        min_endpoint=least,
        max_endpoint=least + more + 1,
        max_gpu_budget=budget,
        gpus_per_engine={"aggregated": gpus},
    )
    found = decided(rate, there, settings=bounds, waiting=waiting, kv_used=kv_used)
    assert least <= target(found) <= least + more + 1
    assert target(found) * gpus <= max(budget, least * gpus)
    assert found.reasons


@settings(deadline=None, max_examples=40)
@given(rates=st.tuples(st.floats(0, 500), st.floats(0, 500)), there=st.integers(1, 30))
def test_more_load_never_gives_fewer(rates: tuple[float, float], there: int) -> None:
    low, high = sorted(rates)
    step = scaling(scale_up_step=1000)
    assert target(decided(low, there, settings=step)) <= target(decided(high, there, settings=step))


@settings(deadline=None, max_examples=12)
@given(rate=st.floats(0.5, 300), noise=st.floats(0, 0.11), seed=st.integers(0, 1 << 30))
def test_a_load_that_only_jitters_never_makes_it_go_up_and_down(
    rate: float, noise: float, seed: int
) -> None:
    """The largest and the smallest rate differ by less than the margin of 1 / 0.8."""
    dice = random.Random(seed)
    state, engines, at_s = State(), 1, 0.0
    steps = scaling(scale_down_delay=60.0, scale_up_step=64)
    sizes = []
    for _ in range(60):
        at_s += 5
        now = rate * (1 + dice.uniform(-noise, noise))
        found = decided(now, engines, state, at_s=at_s, settings=steps)
        state, engines = found.state, target(found)
        sizes.append(engines)
    # Up at first, also for what has waited by then, and down once; never up after that.
    turned = next((n for n, (a, b) in enumerate(pairwise(sizes)) if b < a), len(sizes))
    assert sizes[: turned + 1] == sorted(sizes[: turned + 1])
    assert sizes[turned:] == sorted(sizes[turned:], reverse=True)


def test_fewer_come_only_after_the_delay_and_one_at_a_time() -> None:
    state, engines, changed = State(), 20, []
    settings = scaling(scale_down_delay=100.0)
    for tick in range(60):
        found = decided(10.0, engines, state, at_s=5.0 * tick, settings=settings)
        state = found.state
        if found.changes:
            changed.append((5.0 * tick, found.changes["aggregated"]))
        engines = target(found)
    assert changed[0] == (100.0, -1)
    assert {step for _, step in changed} == {-1}


def test_a_burst_is_answered_at_once_and_says_why() -> None:
    found = decided(200.0, 2)
    assert found.changes["aggregated"] == 8
    assert kinds(found) == ["floor", "load", "step"]
    assert "200.00 requests/s" in found.reasons[0].text


def test_a_queue_asks_for_engines_only_where_they_would_come_in_time() -> None:
    """Two engines at a tenth of their time empty a short queue long before a third serves."""
    short = decided(2.0, 2, waiting=10)
    assert target(short) == 2
    long = decided(2.0, 2, waiting=2000)
    assert target(long) > 4


def test_engines_that_are_starting_count() -> None:
    """Else every tick until they serve would ask for as many again."""
    asked = decided(60.0, 2)
    there = [load("a"), load("b")]
    there += [load(f"s{n}", phase="starting", running=0) for n in range(target(asked) - 2)]
    again = decide(
        seen(5.0, there, rate=60.0),
        forecast(60.0),
        perf(60.0),
        GOALS,
        scaling(),
        asked.state,
    )
    assert again.changes == {}


def test_what_is_in_flight_keeps_its_engines() -> None:
    """No rate, but KV in use that fewer engines could not hold."""
    state, settings = State(), scaling(scale_down_delay=0.0)
    full = decided(0.1, 4, state, settings=settings, kv_used=0.75)
    assert target(full) == 4
    assert "in-flight" in kinds(full)
    assert target(decided(0.1, 4, state, settings=settings, kv_used=0.1)) == 3


def test_who_is_blind_changes_nothing() -> None:
    settings = scaling(scale_down_delay=0.0)
    there = [load("a"), load("b"), load("c")]
    found = decide(seen(0.0, there, rate=None), None, perf(0.0), GOALS, settings, State())
    assert found.targets == {"aggregated": 3}
    assert kinds(found) == ["blind"]


def test_what_others_set_by_hand_is_kept_for_a_while() -> None:
    """The reference and its users fight there (its issue 4420)."""
    settings = scaling(manual_hold=100.0, scale_up_step=64)
    there = [load(f"{n}") for n in range(3)]
    first = decide(
        seen(0.0, there, desired={"aggregated": 3}),
        forecast(60.0),
        perf(60.0),
        GOALS,
        settings,
        State(),
    )
    wanted = target(first)
    assert wanted > 3
    states = first.state
    assert wanted != 4
    for at_s, expected in ((5.0, 4), (50.0, 4), (104.0, 4), (106.0, wanted)):
        found = decide(
            seen(at_s, there, desired={"aggregated": 4}),
            forecast(60.0),
            perf(60.0),
            GOALS,
            settings,
            states,
        )
        assert target(found) == expected, at_s
        states = found.state


def test_without_a_known_speed_only_a_queue_asks() -> None:
    def found(waiting: float) -> Decision:
        there = [load("a", waiting=waiting), load("b", waiting=waiting)]
        return decide(
            seen(0.0, there), forecast(50.0), perf(50.0, speed=None), GOALS, scaling(), State()
        )

    assert target(found(0)) == 2
    assert target(found(5)) == 3
    assert kinds(found(5)) == ["unmeasured"]


def test_a_budget_is_shared_between_pools() -> None:
    roles: list[Role] = ["prefill", "decode"]
    there: list[EngineLoad] = [load(role, role=role) for role in roles]
    settings = scaling(
        mode="disagg", max_gpu_budget=10, gpus_per_engine={"decode": 2}, scale_up_step=64
    )
    found = decide(seen(0.0, there), forecast(300.0), perf(300.0), GOALS, settings, State())
    assert found.targets["prefill"] + 2 * found.targets["decode"] <= 10
    assert min(found.targets.values()) >= 1
    assert "budget" in kinds(found)


@pytest.mark.parametrize("switch", ["enable_throughput_scaling", "enable_load_scaling"])
def test_each_rule_alone_sizes_the_fleet(switch: str) -> None:
    other = decided(100.0, 2, settings=scaling(**{switch: False}))
    assert target(other) > 2
