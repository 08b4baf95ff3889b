"""Reservations end when told, with their worker, or when nothing is heard of them."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.model import Placed
from router.reservations import Reservations

LEASES = st.sampled_from([1.0, 5.0, 50.0])
NAMES = st.integers(0, 5).map(str)
LIMIT = 4


class FakePlaced:
    def __init__(self) -> None:
        self.endings: list[str] = []

    def end(self, ending: str) -> None:
        self.endings.append(ending)


class ReservationsMachine(RuleBasedStateMachine):
    """Against a table of when each must end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.held = Reservations(LIMIT, clock=lambda: self.now)
        self.model: dict[str, tuple[FakePlaced, float, float]] = {}
        self.expired = 0

    @rule(name=NAMES, lease=LEASES)
    def hold(self, name: str, lease: float) -> None:
        assert (name in self.held) == (name in self.model)
        if name in self.held or self.held.is_full:
            return
        placed: Any = FakePlaced()
        self.held.hold(name, cast(Placed, placed), lease)
        self.model[name] = (placed, lease, self.now + lease)

    @rule(name=NAMES)
    def heard(self, name: str) -> None:
        found = self.held.heard(name)
        assert (found is None) == (name not in self.model)
        if name in self.model:
            placed, lease, _ = self.model[name]
            self.model[name] = (placed, lease, self.now + lease)

    @rule(name=NAMES)
    def end(self, name: str) -> None:
        known = self.model.pop(name, None)
        assert self.held.end(name, "done") == (known is not None)
        assert known is None or known[0].endings == ["done"]

    @rule(seconds=st.sampled_from([0.1, 1.0, 7.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        over = {name for name, (_, _, ends_at) in self.model.items() if ends_at <= self.now}
        assert self.held.expire() == len(over)
        for name in over:
            assert self.model.pop(name)[0].endings == ["expired"]
        self.expired += len(over)

    @invariant()
    def agrees(self) -> None:
        assert len(self.held) == len(self.model) and self.held.expired_total == self.expired
        assert self.held.is_full == (len(self.model) == LIMIT)
        assert not any(placed.endings for placed, _, _ in self.model.values())


TestReservations = ReservationsMachine.TestCase


def test_ends_that_are_long_past_take_no_memory() -> None:
    now = 0.0
    held = Reservations(10, clock=lambda: now)
    for number in range(50_000):
        placed: Any = FakePlaced()
        held.hold(f"{number}", placed, 600.0)
        held.end(f"{number}", "done")
    assert len(held._due) <= 5000
