"""When a daemon that does not answer is given up: many short waits are no long one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvbm.client import SILENT_S, UNANSWERED_MAX, SchedulerClient
from tests.kvbm.members import make_hello


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Client(SchedulerClient):
    """Without a daemon; counts how often it starts over."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("nowhere", lambda: make_hello("scheduler"), [1], clock=clock)
        self.clock = clock
        self.renewals = 0

    def renew(self) -> None:
        self.renewals += 1


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client(Clock())
    client.start()
    yield client
    client.close()


def test_short_deadlines_missed_within_a_moment_are_no_reason_to_start_over(
    client: Client,
) -> None:
    clock = client.clock
    asked_at = clock.now_s
    for _ in range(3 * UNANSWERED_MAX):
        clock.now_s += SILENT_S / 20
        client.note_unanswered(asked_at)
    assert client.renewals == 0
    clock.now_s = asked_at + SILENT_S
    client.note_unanswered(clock.now_s - 0.02)
    assert client.renewals == 1, "it has been silent since the first of them"
    client.note_unanswered(clock.now_s - 0.02)
    assert client.renewals == 1, "counted anew"


def test_long_deadlines_missed_are_one_once_there_are_enough(client: Client) -> None:
    clock = client.clock
    for count in range(1, UNANSWERED_MAX + 1):
        clock.now_s += 1.0
        client.note_unanswered(clock.now_s - 1.0)
        assert client.renewals == (count == UNANSWERED_MAX)
