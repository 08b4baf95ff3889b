"""Pages of an engine's tensors go to their place in a slot and back, and nowhere else: in every
layout, in host memory and in a GPU's, and there in every way of copying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from storage_tiers.hbm import Bytes, CopyPlan
from tests.storage_tiers.page_rigs import BLOCKS, LAYOUTS, RIGS, Layout, Rig, layers_apart

pytestmark = pytest.mark.usefixtures("short_windows")

POISON = 0xA5
PER_CHUNK = 4  # blocks
MakeRig = Callable[[], Rig]


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest) -> Rig:
    make: MakeRig = request.param
    return make()


class Transfer:
    """Random blocks of every group in random places of random slots."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.layout = layout
        self.chunks: list[tuple[int, list[int], int]] = []  # group, blocks, first
        for group in range(len(layout.groups)):
            blocks = self.random.permutation(BLOCKS)[: self.random.integers(1, BLOCKS)].tolist()
            while blocks:
                first = int(self.random.integers(0, PER_CHUNK))
                count = int(self.random.integers(1, PER_CHUNK - first + 1))
                self.chunks.append((group, blocks[:count], first))
                blocks = blocks[count:]
        self.random.shuffle(self.chunks)
        lengths = [PER_CHUNK * layout.block_bytes(group) for group, _, _ in self.chunks]
        gaps = self.random.integers(0, 64, len(lengths)) * 16
        self.places = np.cumsum([0, *(np.array(lengths[:-1]) + gaps[:-1])]).tolist()
        self.memory_bytes = self.places[-1] + lengths[-1]

    def plans(self, memory: Bytes) -> list[CopyPlan]:
        return [
            CopyPlan(group, blocks, first, memory[at : at + self._stripe(group)])
            for (group, blocks, first), at in zip(self.chunks, self.places, strict=True)
        ]

    def pages(self) -> list[tuple[int, int, int, int, int]]:
        """View and block of each page, the block's number in the transfer, its place and size."""
        found: list[tuple[int, int, int, int, int]] = []
        for (group, blocks, first), at in zip(self.chunks, self.places, strict=True):
            place = at + first * self.layout.block_bytes(group)
            for block in blocks:
                for view in self.layout.groups[group]:
                    size = self.layout.views[view].page_bytes
                    found.append((view, block, group, place, size))
                    place += size
        return found

    def bytes(self) -> int:
        return sum(size for *_, size in self.pages())

    def expected_slots(self, storages: Sequence[Bytes]) -> Bytes:
        memory = np.full(self.memory_bytes, POISON, dtype=np.uint8)
        for view, block, _, place, size in self.pages():
            memory[place : place + size] = self.layout.page(storages, view, block)
        return memory

    def _stripe(self, group: int) -> int:
        return PER_CHUNK * self.layout.block_bytes(group)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_random_blocks_are_bit_exact_in_slots_and_all_else_is_untouched(
    rig: Rig, layout: Layout
) -> None:
    for seed in range(3):
        transfer = Transfer(layout, seed)
        storages = layout.random(seed)
        engine = rig.place(storages)
        memory = np.full(transfer.memory_bytes, POISON, dtype=np.uint8)
        pages = rig.pages(layout, engine)
        pages.attach(memory)
        if seed:  # else it is pinned while it is copied to
            rig.settle(pages)
        assert pages.gather(transfer.plans(memory), pages.fence()) == transfer.bytes()
        np.testing.assert_array_equal(memory, transfer.expected_slots(storages))
        for before, after in zip(storages, rig.read(engine), strict=True):
            np.testing.assert_array_equal(after, before)
        pages.close()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_slots_are_bit_exact_in_random_blocks_and_all_else_is_untouched(
    rig: Rig, layout: Layout
) -> None:
    for seed in range(3):
        transfer = Transfer(layout, seed)
        expected = [np.full(size, POISON, dtype=np.uint8) for size in layout.storages]
        engine = rig.place(expected)
        memory = np.random.default_rng(seed).integers(0, 256, transfer.memory_bytes, np.uint8)
        before = memory.copy()
        # Groups that overlay each other share pages: what lands last in one is either's.
        seen: dict[tuple[int, int], set[bytes]] = {}
        for view, block, _, place, size in transfer.pages():
            seen.setdefault((view, block), set()).add(memory[place : place + size].tobytes())
            layout.page(expected, view, block)[:] = memory[place : place + size]
        pages = rig.pages(layout, engine)
        pages.attach(memory)
        if seed:
            rig.settle(pages)
        assert pages.scatter(transfer.plans(memory), pages.fence()) == transfer.bytes()
        found = rig.read(engine)
        for (view, block), contents in seen.items():
            page = layout.page(found, view, block)
            assert page.tobytes() in contents
            page[:] = layout.page(expected, view, block)
        for storage, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(storage, wanted)
        np.testing.assert_array_equal(memory, before)
        pages.close()


def test_nothing_is_copied_where_any_part_is_outside(rig: Rig) -> None:
    layout = layers_apart(2, 256)
    engine = rig.place(layout.random(0))
    before = rig.read(engine)
    pages = rig.pages(layout, engine)
    slot = np.zeros(1024, dtype=np.uint8)
    for blocks, first in (([1, BLOCKS], 0), ([-1], 0), ([1, 2, 3], 0), ([1, 2], 1), ([1], -1)):
        with pytest.raises(IndexError):
            pages.gather([CopyPlan(0, [0], 0, slot), CopyPlan(0, blocks, first, slot)])
        with pytest.raises(IndexError):
            pages.scatter([CopyPlan(0, [0], 0, slot), CopyPlan(0, blocks, first, slot)])
    assert not slot.any()
    for wanted, found in zip(before, rig.read(engine), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert pages.gather([]) == pages.scatter([]) == 0
    pages.close()
