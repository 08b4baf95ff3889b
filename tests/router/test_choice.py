"""Choices: by cost, by chance, by load, by name."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.affinity import owner_of
from router.choice import (
    RoundRobin,
    any_of,
    better_of_two,
    chances_of,
    least_loaded,
    lowest,
    sampled,
)
from router.index import WorkerId
from tests.router.builders import table

costs_and_eligible = st.integers(1, 20).flatmap(
    lambda count: st.tuples(
        st.lists(st.floats(-1e6, 1e6), min_size=count, max_size=count),
        st.lists(st.booleans(), min_size=count, max_size=count).filter(any),
    )
)


@settings(deadline=None)  # the first call compiles
@given(costs_and_eligible, st.floats(0, 3), st.integers())
def test_whatever_is_chosen_may_be_used(
    case: tuple[list[float], list[bool]], temperature: float, seed: int
) -> None:
    costs, eligible = np.array(case[0]), np.array(case[1])
    dice = random.Random(seed)
    assert costs[lowest(costs, eligible, dice)] == costs[eligible].min()
    assert eligible[sampled(costs, eligible, temperature, dice)]
    assert eligible[any_of(eligible, dice)]


def test_equals_share_the_requests() -> None:
    dice = random.Random(1)
    costs = np.array([3.0, 1.0, 1.0, 1.0, 0.0])
    eligible = np.array([True, True, True, True, False])
    seen = Counter(lowest(costs, eligible, dice) for _ in range(3000))
    assert set(seen) == {1, 2, 3} and min(seen.values()) > 850


def test_chances_follow_the_temperature() -> None:
    costs = np.array([0.0, 5.0, 10.0])
    assert chances_of(costs, 1.0) == pytest.approx(
        np.exp([0, -0.5, -1]) / np.exp([0, -0.5, -1]).sum()
    )
    assert chances_of(costs, 1e-9).tolist() == [1.0, 0.0, 0.0]
    assert chances_of(costs, 1e9) == pytest.approx([1 / 3] * 3)
    assert chances_of(np.array([4.0, 4.0]), 0.1).tolist() == [0.5, 0.5]


def test_draws_come_as_often_as_their_chances() -> None:
    dice = random.Random(2)
    costs, eligible = np.array([0.0, 9.0, 5.0, 10.0]), np.array([True, False, True, True])
    seen = Counter(sampled(costs, eligible, 0.5, dice) for _ in range(20_000))
    expected = chances_of(costs[[0, 2, 3]], 0.5)
    assert [seen[row] / 20_000 for row in (0, 2, 3)] == pytest.approx(expected, abs=0.02)
    assert not seen[1]


def test_round_robin_goes_on_where_it_was_though_workers_change() -> None:
    workers, turn = table(4), RoundRobin()
    some = np.array([True, True, False, True])
    assert [turn(workers, some) for _ in range(4)] == [0, 1, 3, 0]
    assert turn(workers, np.array([False, False, True, True])) == 2
    assert turn(workers, some) == 3


def test_load_decides() -> None:
    workers, dice = table(3), random.Random(3)
    everyone = np.ones(3, dtype=np.bool_)
    workers.requests[:3], workers.blocks[:3] = [2, 1, 1], [0, 900, 30]
    assert least_loaded(workers, everyone, dice) == 2
    picks = {better_of_two(workers, everyone, dice) for _ in range(200)}
    assert picks == {1, 2}, "the busiest loses to whomever it meets"
    assert better_of_two(workers, np.array([True, False, False]), dice) == 0


workers_of = st.sets(st.builds(WorkerId, st.integers(0, 2**64 - 1), st.integers(0, 7)), min_size=1)


@given(st.text(), workers_of, st.randoms())
def test_replicas_agree_on_a_sessions_worker(
    session: str, workers: set[WorkerId], dice: random.Random
) -> None:
    order = sorted(workers)
    dice.shuffle(order)
    owner = owner_of(session, order)
    assert owner == owner_of(session, workers) and owner in workers
    others = workers - {owner}
    heir = owner_of(session, others)
    assert heir in others if others else heir is None


def test_a_worker_that_goes_moves_only_its_own_sessions() -> None:
    workers = [WorkerId(instance) for instance in range(8)]
    before = {name: owner_of(name, workers) for name in map(str, range(2000))}
    counts = Counter(before.values())
    assert min(counts.values()) > 180, "each has its share"
    after = {name: owner_of(name, workers[1:]) for name in before}
    assert all(after[name] == owner for name, owner in before.items() if owner != workers[0])
    assert owner_of("any", []) is None
