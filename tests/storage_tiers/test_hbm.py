"""Pages of host tensors go to their place in a slot and back, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from storage_tiers.hbm import Bytes, CopyPlan, HostPages

BLOCKS = 12


def tensors(*page_bytes: int) -> list[Bytes]:
    """One allocation with all layers, as engines make it, filled with noise."""
    generator = np.random.default_rng(len(page_bytes))
    return [generator.integers(0, 255, (BLOCKS, size), dtype=np.uint8) for size in page_bytes]


def stripe_of(of_group: list[Bytes], blocks: list[int]) -> bytes:
    return b"".join(tensor[block].tobytes() for block in blocks for tensor in of_group)


@pytest.mark.parametrize("sizes", [(256,), (512, 512, 512), (512, 256, 512), (100, 4096, 100)])
def test_a_chunk_is_its_blocks_pages_in_order(sizes: tuple[int, ...]) -> None:
    own = tensors(*sizes)
    pages = HostPages(own, [list(range(len(own)))])
    slots = np.zeros((2, 3 * sum(sizes)), dtype=np.uint8)
    plans = [CopyPlan(0, [7, 2, 11], 0, slots[0]), CopyPlan(0, [5], 1, slots[1])]
    assert pages.gather(plans) == 4 * sum(sizes)
    assert slots[0].tobytes() == stripe_of(own, [7, 2, 11])
    part = slice(sum(sizes), 2 * sum(sizes))
    assert slots[1, part].tobytes() == stripe_of(own, [5])
    assert not slots[1, : part.start].any() and not slots[1, part.stop :].any()

    others = tensors(*sizes)
    expected = [tensor.copy() for tensor in others]
    for tensor, source in zip(expected, own, strict=True):
        tensor[[0, 4, 1, 9]] = source[[7, 2, 11, 5]]
    back = [CopyPlan(0, [0, 4, 1], 0, slots[0]), CopyPlan(0, [9], 1, slots[1])]
    assert HostPages(others, [list(range(len(own)))]).scatter(back) == 4 * sum(sizes)
    for tensor, wanted in zip(others, expected, strict=True):
        np.testing.assert_array_equal(tensor, wanted)


def test_groups_of_one_transfer_keep_their_own_tensors() -> None:
    own = tensors(256, 512, 256)
    pages = HostPages(own, [[0, 2], [1]])
    first, second = np.zeros(512, dtype=np.uint8), np.zeros(1024, dtype=np.uint8)
    plans = [CopyPlan(1, [3, 8], 0, second), CopyPlan(0, [6], 0, first)]
    assert pages.gather(plans) == 1536
    assert first.tobytes() == stripe_of([own[0], own[2]], [6])
    assert second.tobytes() == stripe_of([own[1]], [3, 8])


def test_nothing_is_copied_where_any_part_is_outside() -> None:
    own = tensors(256, 256)
    pages = HostPages(own, [[0, 1]])
    slot = np.zeros(1024, dtype=np.uint8)
    for blocks, first in (([1, BLOCKS], 0), ([-1], 0), ([1, 2, 3], 0), ([1, 2], 1), ([1], -1)):
        with pytest.raises(IndexError):
            pages.gather([CopyPlan(0, [0], 0, slot), CopyPlan(0, blocks, first, slot)])
        with pytest.raises(IndexError):
            pages.scatter([CopyPlan(0, blocks, first, slot)])
    assert not slot.any()
    assert pages.gather([]) == pages.scatter([]) == 0
