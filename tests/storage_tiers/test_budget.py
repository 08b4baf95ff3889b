"""A budget over a day, with a clock of its own."""

from __future__ import annotations

from storage_tiers.budget import BURST_S, DAY_S, Budget


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_an_hour_of_it_may_be_spent_at_once_and_no_more_in_a_day_than_it_says() -> None:
    clock = Clock()
    budget = Budget(2400, clock=clock)
    assert budget.left == 100
    spent = 0
    for _ in range(int(DAY_S)):
        clock.now_s += 1
        while budget.left > 0:
            budget.spend(1)
            spent += 1
    assert 2400 <= spent <= 2400 + 100 + 1


def test_a_debt_is_paid_back_first() -> None:
    clock = Clock()
    budget = Budget(24, clock=clock)
    budget.spend(11)
    assert budget.left == -10
    clock.now_s += 9 * BURST_S
    assert budget.left == -1
    clock.now_s += 2 * BURST_S
    assert budget.left == 1


def test_what_is_unused_is_not_kept_for_ever() -> None:
    clock = Clock()
    budget = Budget(24, clock=clock)
    clock.now_s += 30 * DAY_S
    assert budget.left == 1


def test_without_a_bound_it_is_never_spent() -> None:
    budget = Budget()
    budget.spend(1e30)
    assert budget.left > 0
