"""Costs against the same sums written out for one worker at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.cost import BlocksCost, Request, SecondsCost
from router.workers import Speed, Workers
from tests.router.builders import BLOCK, request, table, worker

ALL = slice(None)


def everyone(workers: Workers) -> np.ndarray:
    return workers.present[: workers.rows].copy()


def test_the_references_published_example() -> None:
    """Its documentation gives three workers, their overlaps and loads, and costs 18, 10 and 11."""
    workers = table(3)
    workers.blocks[:3] = [0, -5, -1]  # decode blocks 10, 5 and 9 with the request's 10
    costs = BlocksCost()(request(workers, 10, [[2, 5, 8]] * 4), workers, everyone(workers))
    assert costs.total.tolist() == [18.0, 10.0, 11.0]


speeds = st.builds(
    Speed,
    prefill_s_per_token=st.floats(1e-6, 1e-3),
    prefill_s_per_token2=st.floats(0, 1e-7),
    step_s=st.floats(1e-3, 1e-1),
    step_s_per_request=st.floats(0, 1e-3),
    step_s_per_block=st.floats(0, 1e-5),
    load_s_per_block=st.tuples(*[st.floats(1e-6, 1e-1)] * 3),
    load_latency_s=st.tuples(*[st.floats(0, 1)] * 3),
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Workers, Request]:
    workers = Workers()
    count = draw(st.integers(1, 6))
    for instance in range(count):
        workers.add(worker(instance, speed=draw(speeds)))
    tokens = draw(st.integers(1, 400))
    whole = tokens // BLOCK
    covered = np.zeros((4, count), dtype=np.int64)
    for row in range(count):
        ends = sorted(draw(st.lists(st.integers(0, whole), min_size=4, max_size=4)))
        covered[:, row] = ends
        workers.prefill_tokens[row] = draw(st.integers(0, 5000))
        workers.prefill_s[row] = draw(st.floats(0, 10))
        workers.blocks[row] = draw(st.integers(0, 5000))
        workers.requests[row] = draw(st.integers(0, 100))
    return workers, Request(tokens, BLOCK, covered, draw(st.integers(0, 1000)))


@settings(deadline=None)  # the first call compiles
@given(situations(), st.floats(0, 2))
def test_seconds_are_the_cheapest_way_to_have_the_prompts_kv(
    situation: tuple[Workers, Request], weight: float
) -> None:
    workers, asked = situation
    costs = SecondsCost(weight)(asked, workers, everyone(workers))
    for row in range(workers.rows):
        speed = workers.at(row).speed

        def compute(first: int, speed: Speed = speed) -> float:
            return sum(
                speed.prefill_s_per_token + speed.prefill_s_per_token2 * (at + 0.5)
                for at in range(first, asked.tokens)
            )

        ends = [min(int(blocks) * BLOCK, asked.tokens - 1) for blocks in asked.covered[:, row]]
        ways, loads = [compute(ends[0])], 0.0
        for tier in range(3):
            blocks = int(asked.covered[tier + 1, row] - asked.covered[tier, row])
            if blocks:
                loads += blocks * speed.load_s_per_block[tier] + speed.load_latency_s[tier]
            ways.append(loads + compute(ends[tier + 1]))
        step_s = (
            speed.step_s
            + speed.step_s_per_request * (workers.requests[row] + 1)
            + speed.step_s_per_block * (workers.blocks[row] + asked.blocks)
        )
        expected = (
            min(ways) + workers.prefill_s[row] + weight * asked.expected_output_tokens * step_s
        )
        assert costs.total[row] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert sum(term[row] for term in costs.terms.values()) == pytest.approx(expected)
        assert all(term[row] >= -1e-12 for term in costs.terms.values())


@given(
    situations(),
    st.builds(
        BlocksCost,
        overlap_credit=st.floats(0, 1),
        overlap_decay=st.floats(0, 10),
        host_credit=st.floats(0, 1),
        disk_credit=st.floats(0, 1),
        prefill_scale=st.floats(0, 10),
        request_weight=st.floats(0, 10),
    ),
    st.integers(0, 63),
)
def test_blocks_are_the_references_formula(
    situation: tuple[Workers, Request], cost: BlocksCost, excluded: int
) -> None:
    workers, asked = situation
    eligible = np.array([not excluded >> row & 1 for row in range(workers.rows)])
    costs = cost(asked, workers, eligible)
    active = [tokens / BLOCK for tokens in workers.prefill_tokens[: workers.rows]]
    least = min((active[row] for row in range(workers.rows) if eligible[row]), default=0.0)
    blocks = math.ceil(asked.tokens / BLOCK)
    for row in np.flatnonzero(eligible):
        g1, g2, g3, g4 = (int(end) for end in asked.covered[:, row])
        decay = 1 / (1 + cost.overlap_decay * (active[row] - least) / blocks)
        credit = cost.overlap_credit * decay * g1
        credit += cost.host_credit * (g2 - g1) + cost.disk_credit * (g4 - g2)
        expected = cost.prefill_scale * max(active[row] + blocks - credit, 0)
        expected += workers.blocks[row] + blocks + cost.request_weight * workers.requests[row]
        assert costs.total[row] == pytest.approx(expected)
        assert sum(term[row] for term in costs.terms.values()) == pytest.approx(expected)
        del g3


def test_a_prompt_that_is_all_there_still_computes_its_last_token() -> None:
    workers = table(1)
    costs = SecondsCost()(request(workers, 4, [[4]] * 4), workers, everyone(workers))
    assert costs.terms["compute"][0] == pytest.approx(workers.at(0).speed.prefill_s_per_token)


def test_a_tier_slower_than_computing_is_not_loaded_from() -> None:
    workers = Workers()
    slow = Speed(prefill_s_per_token=1e-6, load_s_per_block=(1.0, 1.0, 1.0))
    workers.add(worker(1, speed=slow))
    costs = SecondsCost()(request(workers, 10, [[2], [9], [9], [9]]), workers, everyone(workers))
    assert costs.terms["load"][0] == 0
    assert costs.terms["compute"][0] == pytest.approx(8 * BLOCK * 1e-6)


def test_a_worker_whose_memory_is_full_is_waited_for_until_it_has_room() -> None:
    """100 blocks of which 90 are in use: a prompt of 10 fits, of 20 a tenth is too much."""
    workers = Workers()
    workers.add(worker(1, speed=Speed(step_s=0.01), kv_blocks=100))
    workers.add(worker(2, speed=Speed(step_s=0.01)))  # has not said what it has
    workers.blocks[:2] = 90
    fits, too_much = (
        SecondsCost()(request(workers, blocks, output=50), workers, everyone(workers)).terms["room"]
        for blocks in (10, 20)
    )
    assert fits.tolist() == [0.0, 0.0]
    assert too_much.tolist() == pytest.approx([0.1 * 50 * 0.01, 0.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("overlap_credit", 1.5),
        ("host_credit", -0.1),
        ("disk_credit", math.nan),
        ("overlap_decay", -1.0),
        ("prefill_scale", math.inf),
    ],
)
def test_a_weight_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        BlocksCost(**{name: value})
