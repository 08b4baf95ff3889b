"""The queue between a publisher and the one that sends: its bounds, its counts, its order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from runtime.events.base import Message
from runtime.events.outbox import Outbox


def message(number: int, size_bytes: int = 1) -> Message:
    return Message(f"s.{number}", b"x" * size_bytes)


def test_what_is_not_done_is_given_again_in_the_same_order() -> None:
    outbox = Outbox(10, 100)
    for number in range(5):
        assert outbox.put(message(number), None)
    assert outbox.burst(3) == outbox.burst(3) == [message(n) for n in range(3)]
    assert (outbox.first_number, len(outbox)) == (0, 5)
    outbox.done(3, dropped=1)
    assert outbox.burst(10) == [message(3), message(4)]
    assert (outbox.first_number, outbox.sent_total, outbox.dropped_total) == (3, 2, 1)


def test_it_is_empty_only_when_all_is_done() -> None:
    outbox = Outbox(10, 100)
    assert outbox.empty.is_set()
    outbox.put(message(0), None)
    outbox.put(message(1), None)
    outbox.done(1)
    assert not outbox.empty.is_set()
    outbox.done(1)
    assert outbox.empty.is_set()


def test_being_full_is_told_once_until_it_was_empty() -> None:
    outbox = Outbox(1, 100)
    with capture_logs() as logs:
        for _ in range(2):
            taken = [outbox.put(message(n), "the reason") for n in range(3)]
            assert taken == [True, False, False]
            outbox.done(1)
    assert [(log["event"], log["error"]) for log in logs] == [
        ("event_queue_full", "the reason")
    ] * 2
    assert outbox.dropped_total == 4


@given(
    st.integers(1, 8),
    st.integers(1, 64),
    st.lists(st.one_of(st.integers(0, 40), st.just("send")), max_size=60),
)
def test_it_stays_within_both_bounds_and_loses_count_of_nothing(
    messages_max: int, bytes_max: int, steps: list[int | str]
) -> None:
    outbox = Outbox(messages_max, bytes_max)
    held: list[Message] = []
    put = taken = 0
    for step in steps:
        if isinstance(step, int):
            put += 1
            room = len(held) < messages_max
            room = room and sum(len(one.payload) for one in held) + step <= bytes_max
            assert outbox.put(message(put, step), None) is room
            held += [message(put, step)] if room else []
            taken += room
        else:
            burst = outbox.burst(2)
            assert burst == held[:2]
            outbox.done(len(burst))
            del held[:2]
        assert len(outbox) == len(held)
        assert outbox.first_number + len(outbox) == taken
        assert outbox.sent_total + outbox.dropped_total + len(outbox) == put
