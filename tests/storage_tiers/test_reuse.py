"""Reuse depths: exact while every key is sampled, near enough and bounded when not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_tiers.base import Key
from storage_tiers.reuse import KEYS_MIN, ReuseSample, words_of
from storage_tiers.testing import make_key

FAR = 1 << 60


def sizes_of(keys: list[Key], length: int = 10) -> np.ndarray:
    return np.full(len(keys), length, dtype=np.int64)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 300), min_size=1, unique=True), min_size=1, max_size=80))
def test_depths_are_those_of_an_lru_stack(calls: list[list[int]]) -> None:
    """Against a plain list; keys differ in size, and there is room to be made between."""
    sample = ReuseSample(KEYS_MIN * 2, FAR)
    stack: list[int] = []  # latest last
    for numbers in calls:
        sizes = np.array([1 + number % 7 for number in numbers], dtype=np.int64)
        uses = sample.use(words_of([make_key(number) for number in numbers]), sizes)
        expected = [
            sum(1 + other % 7 for other in stack[stack.index(number) :])
            if number in stack
            else np.inf
            for number in numbers
        ]
        assert uses.depths.tolist() == expected and uses.rate == 1
        stack = [number for number in stack if number not in numbers] + numbers
        sample.check_integrity()
    assert len(sample) == len(stack)


def test_the_sample_is_bounded_and_its_depths_are_near_the_truth() -> None:
    """A loop over 20000 keys: each use lies as deep as all of them are large."""
    keys = [make_key(number) for number in range(20_000)]
    sample = ReuseSample(2048, FAR)
    depths: list[float] = []
    for _ in range(3):
        for start in range(0, len(keys), 50):
            some = keys[start : start + 50]
            uses = sample.use(words_of(some), sizes_of(some))
            depths += uses.depths[np.isfinite(uses.depths)].tolist()
            assert len(sample) <= 2048
    sample.check_integrity()
    assert 0.05 < sample.rate < 0.11
    assert np.mean(depths) == pytest.approx(200_000, rel=0.1)  # of ten bytes each


def test_keys_out_of_reach_are_forgotten_and_the_rate_stays() -> None:
    """New keys for ever: what is told apart is the latest, and it is told apart no worse."""
    sample = ReuseSample(1024, 40_000)  # 4000 keys
    for start in range(0, 200_000, 100):
        keys = [make_key(number) for number in range(start, start + 100)]
        sample.use(words_of(keys), sizes_of(keys))
    sample.check_integrity()
    assert 0.1 < sample.rate < 0.5, "a sample of 4000 keys, not of 200000"
    recent = [make_key(number) for number in range(198_000, 200_000)]
    old = [make_key(number) for number in range(100_000, 102_000)]
    assert np.isfinite(sample.use(words_of(recent), sizes_of(recent)).depths).all()
    assert np.isinf(sample.use(words_of(old), sizes_of(old)).depths).all()


def test_one_call_may_name_more_keys_than_the_sample_holds() -> None:
    keys = [make_key(number) for number in range(20_000)]
    sample = ReuseSample(KEYS_MIN, FAR)
    for _ in range(2):
        uses = sample.use(words_of(keys), sizes_of(keys))
        assert 0 < len(uses.indexes) <= KEYS_MIN
        sample.check_integrity()


def test_a_key_named_twice_counts_once() -> None:
    keys = [make_key(1), make_key(2), make_key(1)]
    sample = ReuseSample(KEYS_MIN, FAR)
    assert sample.use(words_of(keys), sizes_of(keys)).indexes.tolist() == [1, 2]
    sample.check_integrity()
    assert sample.use(words_of(keys), sizes_of(keys)).depths.tolist() == [20, 10]


def test_keys_that_are_no_hashes_do_no_harm() -> None:
    """Thousands with the same first half: one of them is kept."""
    keys = [Key(bytes(8) + number.to_bytes(8, "little")) for number in range(5000)]
    sample = ReuseSample(KEYS_MIN, FAR)
    for _ in range(3):
        sample.use(words_of(keys), sizes_of(keys))
    sample.check_integrity()
    assert len(sample) == 1
    low = [Key(number.to_bytes(8, "little") * 2) for number in range(5000)]
    sample.use(words_of(low), sizes_of(low))
    sample.check_integrity()
    assert len(sample) <= KEYS_MIN


def test_no_more_than_a_part_is_sampled_however_few_there_are() -> None:
    sample = ReuseSample(1024, 1 << 40, rate_max=1 / 8)
    keys = [make_key(str(number)) for number in range(800)]
    uses = sample.use(words_of(keys), np.full(len(keys), 4096, dtype=np.int64))
    assert uses.rate == sample.rate == 1 / 8
    assert 60 <= len(uses.indexes) == len(sample) <= 140
