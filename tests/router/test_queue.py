"""Waiting lines: order, bound, and leaving early."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.queue import Order, Urgency, WaitingLine


def order_of(line: WaitingLine[str]) -> list[str]:
    names: list[str] = []
    while (name := line.pop()) is not None:
        names.append(name)
    return names


def test_first_come_first_served_with_a_head_start() -> None:
    line: WaitingLine[str] = WaitingLine("fcfs")
    line.put("first", Urgency(), tokens=1, now=0.0)
    line.put("second", Urgency(), tokens=1, now=1.0)
    line.put("head start", Urgency(priority=2.5), tokens=1, now=2.0)
    line.put("strict", Urgency(strict_priority=1), tokens=1, now=9.0)
    assert order_of(line) == ["strict", "head start", "first", "second"]


def test_the_last_first() -> None:
    line: WaitingLine[str] = WaitingLine("lcfs")
    for now, name in enumerate("abc"):
        line.put(name, Urgency(), tokens=1, now=now)
    assert order_of(line) == ["c", "b", "a"]


def test_short_and_weighty_first() -> None:
    line: WaitingLine[str] = WaitingLine("wspt")
    line.put("long", Urgency(), tokens=1000, now=0)
    line.put("short", Urgency(), tokens=100, now=0)
    line.put("long and weighty", Urgency(priority=99), tokens=1000, now=0)
    assert order_of(line) == ["long and weighty", "short", "long"]


def test_a_full_line_refuses_and_counts() -> None:
    line: WaitingLine[str] = WaitingLine(limit=1)
    number = line.put("a", Urgency(), tokens=1, now=0)
    assert number is not None
    assert line.put("b", Urgency(strict_priority=9), tokens=1, now=0) is None
    assert line.refused_total == 1
    assert line.take(number) == "a" and line.take(number) is None
    assert line.first() is None and line.pop() is None
    assert line.put("b", Urgency(), tokens=1, now=0) is not None


operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(-2, 2), st.floats(0, 9), st.integers(1, 99)),
        st.tuples(st.just("pop")),
        st.tuples(st.just("take"), st.integers(0, 30)),
    )
)


@given(operations, st.sampled_from(["fcfs", "lcfs", "wspt"]))
def test_any_line_is_a_sorted_list(steps: list[tuple], order: Order) -> None:  # type: ignore[type-arg]
    line: WaitingLine[int] = WaitingLine(order, limit=10)
    model: list[tuple[tuple[float, float, int], int]] = []
    for now, step in enumerate(steps):
        if step[0] == "put":
            _, strict, priority, tokens = step
            key = {
                "fcfs": now - priority,
                "lcfs": -(now + priority),
                "wspt": -(1 + priority) / tokens,
            }[order]
            number = line.put(now, Urgency(priority, strict), tokens=tokens, now=now)
            assert (number is None) is (len(model) == 10)
            if number is not None:
                model.append(((-strict, key, number), now))
                model.sort()
        elif step[0] == "pop":
            assert line.pop() == (model.pop(0)[1] if model else None)
        else:
            found = [entry for entry in model if entry[0][2] == step[1]]
            assert line.take(step[1]) == (found[0][1] if found else None)
            model = [entry for entry in model if entry not in found]
        assert len(line) == len(model)
        assert line.first() == (model[0][1] if model else None)
        assert line.foremost(3) == [(key[2], item) for key, item in model[:3]]
