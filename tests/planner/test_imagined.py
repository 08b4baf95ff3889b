"""A planner that is only listened to decides what one that acts would."""

from __future__ import annotations

import random

import pytest

from planner.imagined import Imagined
from planner.measure import Profile
from planner.observe import Counters, EngineSnapshot, Phase, Snapshot
from planner.planning import Planner
from planner.settings import ForecastSettings, PlanSettings
from runtime.engine_card import Role
from tests.planner.builders import load, scaling, seen

TICK_S = 5.0
START_S = 60.0
DOWN_S = 100.0
ROLES: tuple[Role, ...] = ("aggregated",)
PROFILE = Profile(
    [(100, 0.01), (1000, 0.1)],
    [(1, 0, 0.013), (101, 0, 0.313)],
    kv_tokens=300_000,
)


def planner() -> Planner:
    settings = PlanSettings(
        forecast=ForecastSettings(load_predictor="constant"),
        scaling=scaling(start_delay=START_S, scale_down_delay=DOWN_S, scale_up_step=3),
    )
    return Planner(settings, {"aggregated": PROFILE})


def snapshot(at_s: float, phases: list[Phase], told: Counters, in_flight: float) -> Snapshot:
    serving = phases.count("serving")
    engines = [
        EngineSnapshot(f"{n}", "aggregated", phase, None, in_flight / serving, 0.0, 0.1 / serving)
        if phase == "serving"
        else EngineSnapshot(f"{n}", "aggregated", phase)
        for n, phase in enumerate(phases)
    ]
    return Snapshot(at_s, tuple(engines), {"f": told})


@pytest.mark.parametrize(("seed", "engines"), [(0, 2), (1, 2), (2, 9)])
def test_only_told_it_decides_as_one_whose_fleet_follows(seed: int, engines: int) -> None:
    dice = random.Random(seed)
    acting, telling = planner(), planner()
    fleet: list[float] = [0.0] * engines  # when each engine serves
    requests, rate, targets = 0.0, 2.0, []
    for tick in range(1, 200):
        at_s = tick * TICK_S
        if tick % 25 == 0:
            rate = dice.choice((1.0, 4.0, 8.0, 16.0)) if tick < 150 else 1.0
        requests += rate * TICK_S
        told = Counters(
            arrived=requests, prompts=requests, prompt_tokens=requests * 500, first_tokens=requests
        )
        phases: list[Phase] = ["serving" if since <= at_s else "starting" for since in fleet]
        acts = acting.tick(snapshot(at_s, phases, told, rate)).decision
        only_told = snapshot(at_s, ["serving"] * engines, told, rate)
        tells = telling.tick(only_told, only_told=True).decision
        assert (tells.targets, tells.changes) == (acts.targets, acts.changes), f"tick {tick}"
        target = acts.targets["aggregated"]
        fleet = fleet[:target] + [at_s + START_S] * (target - len(fleet))
        targets.append(target)
    assert max(targets) > 4 and targets[-1] < max(targets) - 1, "it went up, and down again"


def test_a_target_that_was_raised_stays_for_the_delay() -> None:
    imagined = Imagined()
    there = [load("a", running=8, waiting=8, kv_used=0.9)]
    assert imagined.see(seen(0.0, there), ROLES, START_S).engines == tuple(there)
    imagined.decided(0.0, {"aggregated": 3})
    found = imagined.see(seen(5.0, there), ROLES, START_S).pool("aggregated")
    assert [e.phase for e in found] == ["serving", "starting", "starting"]
    assert (found[0].running, found[0].waiting) == (8, 8), "those that start run nothing"
    found = imagined.see(seen(START_S, there), ROLES, START_S).pool("aggregated")
    assert [(e.phase, e.waiting) for e in found] == [("serving", 0)] * 3
    assert sum(e.running for e in found) == pytest.approx(16)
    assert [e.kv_used for e in found] == [pytest.approx(0.3)] * 3
    imagined.decided(START_S, {"aggregated": 2})
    assert len(imagined.see(seen(65.0, there), ROLES, START_S).engines) == 2


def test_fewer_have_what_all_have_now() -> None:
    imagined = Imagined()
    there = [load("a", running=2), load("b", running=4), load("c", phase="starting", running=0)]
    imagined.see(seen(0.0, there), ROLES, START_S)
    imagined.decided(0.0, {"aggregated": 1})
    [left] = imagined.see(seen(5.0, there), ROLES, START_S).engines
    assert (left.name, left.running) == ("a", 6)
    assert left.kv_used == pytest.approx(0.3)


def test_what_others_do_to_the_fleet_ends_what_was_imagined() -> None:
    imagined = Imagined()
    one, two = [load("a")], [load("a"), load("b")]
    imagined.see(seen(0.0, one), ROLES, START_S)
    imagined.decided(0.0, {"aggregated": 9})
    assert len(imagined.see(seen(5.0, one), ROLES, START_S).engines) == 9
    assert imagined.see(seen(10.0, two), ROLES, START_S).engines == tuple(two)
    asked = imagined.see(seen(15.0, two, desired={"aggregated": 3}), ROLES, START_S)
    assert [e.phase for e in asked.engines] == ["serving", "serving", "starting"]
    assert asked.desired == {}
