"""Copies of many pieces give every byte and touch no other, however sizes and addresses lie."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_tiers import streaming
from storage_tiers.streaming import copy_pieces


@pytest.fixture
def no_llvmlite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    streaming._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    yield
    streaming._compiled.cache_clear()


def check(*, count: int, size: int, gap: int, source_at: int, target_at: int) -> None:
    """`count` pieces in another order, `gap` bytes apart, from where the offsets say."""
    pitch = size + gap
    generator = np.random.default_rng(count * 7919 + size)
    source = generator.integers(0, 255, count * pitch + source_at + 64, dtype=np.uint8)
    target = np.full(count * pitch + target_at + 128, 255, dtype=np.uint8)
    first = -target.ctypes.data % 64 + target_at
    order = generator.permutation(count)
    copy_pieces(
        np.array([target.ctypes.data + first + i * pitch for i in range(count)], dtype=np.uint64),
        np.array([source.ctypes.data + source_at + i * pitch for i in order], dtype=np.uint64),
        size,
    )
    expected = np.full_like(target, 255)
    for place, index in enumerate(order):
        at, start = first + place * pitch, source_at + index * pitch
        expected[at : at + size] = source[start : start + size]
    np.testing.assert_array_equal(target, expected)


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 9),
    size=st.one_of(st.integers(0, 700), st.integers(1, 40).map(lambda n: n * 256)),
    gap=st.sampled_from([0, 1, 64, 192]),
    source_at=st.integers(0, 64),
    target_at=st.sampled_from([0, 0, 0, 1, 32]),
)
def test_every_byte_arrives_and_no_other_is_touched(
    count: int, size: int, gap: int, source_at: int, target_at: int
) -> None:
    check(count=count, size=size, gap=gap, source_at=source_at, target_at=target_at)


def test_pages_of_engines_are_streamed() -> None:
    assert streaming._compiled() is not None
    for size in (8 << 10, 48 << 10, 72 << 10):
        check(count=65, size=size, gap=0, source_at=0, target_at=0)


@pytest.mark.usefixtures("no_llvmlite")
def test_without_llvmlite_pieces_are_copied_all_the_same() -> None:
    assert streaming._compiled() is None
    check(count=5, size=4096, gap=64, source_at=3, target_at=0)
