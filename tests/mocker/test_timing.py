"""The timing model: what steps and loads cost, and that more of anything never costs less."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocker.timing import PRESETS, PS_PER_MS, PS_PER_S, LinkTiming, StepTiming, pairs
from tests.mocker.builders import TIMING

COUNTS = st.integers(0, 100_000)


def test_a_prefill_pays_for_its_tokens_and_for_the_pairs_of_attention() -> None:
    # 10 overhead + 20 x 6 tokens + 2 x (6 x 5 context + 21 among themselves)
    assert TIMING.prefill_ps(6, 5) == 10 + 120 + 2 * (30 + 21)


def test_a_small_step_pays_for_reading_the_weights() -> None:
    assert TIMING.prefill_ps(5) == 10 + 100 + 2 * 15
    assert TIMING.prefill_ps(1) == 10 + 100 + 2


def test_a_decode_pays_for_the_kv_that_it_reads() -> None:
    assert TIMING.decode_ps(2, 50) == 10 + 100 + 3 * 50
    assert TIMING.decode_ps(8, 50) == 10 + 160 + 3 * 50


def test_chunks_see_the_same_pairs_as_the_whole() -> None:
    assert pairs(10, 0) == pairs(4, 0) + pairs(6, 4) == 55


@given(st.tuples(COUNTS, COUNTS, COUNTS, COUNTS), st.integers(0, 3), st.integers(0, 1000))
def test_more_of_anything_never_takes_less_time(
    counts: tuple[int, int, int, int], which: int, more: int
) -> None:
    for machine in PRESETS.values():
        larger = list(counts)
        larger[which] += more
        assert machine.step.step_ps(*larger) >= machine.step.step_ps(*counts)


@given(COUNTS, st.integers(0, 1000))
def test_more_bytes_never_load_sooner(count_bytes: int, more: int) -> None:
    link = LinkTiming(6 * 10**9, PS_PER_MS)
    assert link.load_ps(count_bytes + more) >= link.load_ps(count_bytes) >= PS_PER_MS


def test_a_link_takes_its_latency_and_then_its_bandwidth() -> None:
    assert LinkTiming(10**9, 7).load_ps(10**9) == PS_PER_S + 7


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pair_ps": -1}, "pair_ps"),
        ({"token_ps": 1.5}, "token_ps"),
        ({"overhead_ps": 0, "weights_ps": 0}, "a step must take time"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(change: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(TIMING, **change)
    with pytest.raises(ValueError, match="bandwidth"):
        LinkTiming(0, 0)


def test_the_preset_of_an_8b_model_is_that_of_its_public_figures() -> None:
    machine = PRESETS["llama-8b-h100"]
    assert machine.kv_bytes_per_token == 131072
    # 16.06 GB of weights at 0.8 x 3.35 TB/s; 16.06 GFLOP a token at half of 989.4 TFLOP/s.
    assert machine.step.weights_ps == pytest.approx(5.993 * PS_PER_MS, rel=1e-3)
    assert machine.step.token_ps == pytest.approx(32.46e6, rel=1e-3)
    assert isinstance(machine.step, StepTiming)
    assert 350_000 < machine.kv_tokens < 450_000
