"""The reference's algorithm: cells and their borders, overrides, the order of retries."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.pools.grid import Axis, Features, Override, Strategy

ISL = Axis("tokens", 0, 32000, 4)
TTFT = Axis("ttft_ms", 10.0, 3010.0, 3)
# Rows by tokens, columns by the target: each pool is its cell's number.
TABLE = [[3 * row + column for column in range(3)] for row in range(4)]
finite = st.floats(-1e9, 1e9)


def prefill(**more: Any) -> Strategy:
    known: dict[str, Any] = {
        "role": "prefill",
        "namespaces": tuple(f"p{n}" for n in range(12)),
        "priorities": tuple(range(12)),
        "axes": (ISL, TTFT),
        "mapping": TABLE,
    }
    return Strategy(**{**known, **more})


@pytest.mark.parametrize(
    ("tokens", "ttft_ms", "pool"),
    [
        (0, 10.0, 0),
        (7999, 10.0, 0),
        (8000, 10.0, 3),  # a border belongs to the cell above it
        (31999, 10.0, 9),
        (32000, 10.0, 9),  # but the last one, and all beyond
        (10**7, 10.0, 9),
        (0, 1009.999, 0),
        (0, 1010.0, 1),
        (0, 2010.0, 2),
        (0, 3010.0, 2),
        (0, 9e9, 2),
        (0, 0.0, 0),  # below the range: the first
        (0, None, 1),  # no target: the middle, 1510 ms
        (20000, None, 7),
    ],
)
def test_cells_and_their_borders(tokens: int, ttft_ms: float | None, pool: int) -> None:
    choice = prefill().choose(Features(tokens, ttft_ms=ttft_ms))
    assert (choice.pool, choice.override) == (pool, None)
    assert TABLE[choice.cell[0]][choice.cell[1]] == pool


def test_the_middle_of_an_even_number_of_cells_is_the_upper_one() -> None:
    assert Axis("itl_ms", 0.0, 100.0, 4).cell(None) == 2
    assert Axis("itl_ms", 0.0, 100.0, 1).cell(None) == 0


@given(
    low=finite,
    width=st.floats(1e-3, 1e9),
    cells=st.integers(1, 50),
    values=st.lists(finite, min_size=2),
)
def test_cells_rise_with_the_value_and_stay_in_the_table(
    low: float, width: float, cells: int, values: list[float]
) -> None:
    axis = Axis("tokens", low, max(low + width, low + abs(low) * 1e-9), cells)
    found = [axis.cell(value) for value in sorted(values)]
    assert found == sorted(found)
    assert found[0] >= 0 and found[-1] < cells
    assert axis.cell(axis.low) == 0 and axis.cell(axis.high) == cells - 1
    assert axis.cell(None) == axis.cell((axis.low + axis.high) / 2)


@given(cells=st.integers(1, 64), step=st.integers(1, 5000), low=st.integers(-9000, 9000))
def test_every_border_of_whole_numbers_begins_a_cell(cells: int, step: int, low: int) -> None:
    axis = Axis("tokens", low, low + cells * step, cells)
    for number in range(cells):
        assert axis.cell(low + number * step) == number
        assert axis.cell(low + (number + 1) * step - 1) == number


def test_the_first_override_that_matches_wins_and_none_does_without_a_priority() -> None:
    rules = (Override(0, 5, 11), Override(5, 9, 10), Override(-3, -1, 8))
    strategy = prefill(overrides=rules)
    found = {p: strategy.choose(Features(0, 10.0, priority=p)) for p in (None, -3, 0, 5, 6, 9, 10)}
    assert {p: one.pool for p, one in found.items()} == {
        None: 0,
        -3: 8,
        0: 11,
        5: 11,
        6: 10,
        9: 10,
        10: 0,
    }
    assert [found[p].override for p in (None, 0, 6, -3, 10)] == [None, 0, 1, 2, None]
    assert found[6].cell == (0, 0)


def test_aggregated_pools_with_and_without_the_length() -> None:
    targets = (Axis("ttft_ms", 0, 100, 2), Axis("itl_ms", 0, 10, 2))
    flat = prefill(role="aggregated", axes=targets, mapping=[[0, 1], [2, 3]])
    deep = prefill(
        role="aggregated",
        axes=(ISL, *targets),
        mapping=[[[4 * n] * 2] * 2 for n in range(3)] + [[[1, 2], [3, 4]]],
    )
    assert flat.choose(Features(99, 50, 4)).pool == 2
    assert flat.choose(Features(99)).pool == 3
    assert deep.choose(Features(9000, 50, 4)).pool == 4
    assert deep.choose(Features(40000, 20, 9)).pool == 2


@pytest.mark.parametrize(
    ("priorities", "pool", "order"),
    [
        ((0, 1, 2), 2, (2, 1, 0)),
        ((0, 1, 2), 0, (0,)),
        ((2, 1, 0), 0, (0, 1, 2)),
        ((0, 0, 5, 3), 2, (2, 3, 0, 1)),  # the slowest of the faster first; ties as they stand
        ((1, 1, 1), 1, (1,)),
    ],
)
def test_retries_go_through_faster_pools(
    priorities: tuple[int, ...], pool: int, order: tuple[int, ...]
) -> None:
    assert prefill(priorities=priorities, retries=True).order(pool) == order
    assert prefill(priorities=priorities).order(pool) == (pool,)


@given(priorities=st.lists(st.integers(-3, 3), min_size=1, max_size=8), data=st.data())
def test_every_faster_pool_is_tried_once_and_no_other(
    priorities: list[int], data: st.DataObject
) -> None:
    pool = data.draw(st.integers(0, len(priorities) - 1))
    first, *rest = prefill(priorities=tuple(priorities), retries=True).order(pool)
    assert first == pool
    assert sorted(rest) == [n for n, p in enumerate(priorities) if p < priorities[pool]]
    speeds = [priorities[n] for n in rest]
    assert speeds == sorted(speeds, reverse=True)
