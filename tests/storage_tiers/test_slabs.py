"""The slab allocator against a model that only knows which ranges are taken."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage_tiers.slabs import SlabAllocator

CAPACITY = 8 << 20
SIZES = st.sampled_from([1, 4096, 5000, 65536, 100_000, 262_144, 1_000_000, 3 << 20])


class SlabMachine(RuleBasedStateMachine):
    """Allocate, free and rebuild in any order; slots never overlap and nothing leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.slabs = SlabAllocator(CAPACITY, granule_bytes=256 << 10)
        self.held: dict[int, int] = {}  # offset -> size asked for

    @rule(size=SIZES)
    def allocate(self, size: int) -> None:
        offset = self.slabs.allocate(size)
        if offset is None:
            assert self.held, "an empty allocator refused"
            return
        assert offset % 4096 == 0
        assert 0 <= offset <= CAPACITY - size
        for other, length in self.held.items():
            assert offset + size <= other or other + length <= offset, "slots overlap"
        self.held[offset] = size

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[offset]
        self.slabs.free(offset)
        with pytest.raises(ValueError, match="not allocated"):
            self.slabs.free(offset)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), size=SIZES)
    def freeing_the_blockers_makes_room(self, data: st.DataObject, size: int) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        blockers = self.slabs.blockers(offset, size)
        assert set(blockers) <= self.held.keys()
        if not blockers:
            return
        for blocker in blockers:
            self.slabs.free(blocker)
            del self.held[blocker]
        found = self.slabs.allocate(size)
        assert found is not None
        self.slabs.free(found)

    @rule()
    def a_restart_rebuilds_the_same_state(self) -> None:
        again = SlabAllocator(CAPACITY, granule_bytes=256 << 10)
        for offset, size in self.held.items():
            again.place(offset, size)
            with pytest.raises(ValueError, match="overlaps"):
                again.place(offset, size)
        assert again.used_bytes == self.slabs.used_bytes
        self.slabs = again

    @invariant()
    def integrity(self) -> None:
        self.slabs.check_integrity()

    def teardown(self) -> None:
        for offset in self.held:
            self.slabs.free(offset)
        assert self.slabs.used_bytes == 0
        assert self.slabs.allocate(3 << 20) is not None, "memory did not come back"


TestSlabs = SlabMachine.TestCase
TestSlabs.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("offset", "size"), [(-4096, 4096), (CAPACITY, 4096), (100, 4096), (4096, 3 << 20)]
)
def test_a_place_outside_the_grid_is_refused(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"outside|overlaps|no slot"):
        SlabAllocator(CAPACITY).place(offset, size)


def test_a_slot_larger_than_the_range_is_refused_not_raised() -> None:
    slabs = SlabAllocator(CAPACITY)
    assert not slabs.fits(CAPACITY + 1)
    assert slabs.allocate(CAPACITY + 1) is None


def test_waste_is_bounded_for_odd_sizes() -> None:
    """A class whose slot does not divide a granule still fills nearly all of the range."""
    slot = 2_949_120  # 128 tokens of a 30-layer model in bf16
    slabs = SlabAllocator(1 << 30)
    count = 0
    while slabs.allocate(slot) is not None:
        count += 1
    assert count * slot >= 0.9 * (1 << 30)
