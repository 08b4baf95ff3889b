"""Allocator of equal-sized slots inside one byte range: slabs with size classes.

Used for the host-memory arena and for the SSD's extents, so that models with different chunk
sizes share one capacity. The range is cut into granules; a slab is a run of granules that holds
slots of one size; an empty slab gives its granules back, so memory moves between classes.

A slab of a class always has the same length and starts at a multiple of it. Where a slot lies is
therefore a pure function of (offset, size), and `place` can rebuild the state after a restart from
offsets and sizes alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_WASTE_MAX = 1 / 16  # of a slab, at its tail
_SLAB_GRANULES_MAX = 16  # unless one slot alone needs more
_GRANULES_MIN = 64  # small ranges get smaller granules


@dataclass(slots=True)
class _Slab:
    start: int  # bytes
    length: int  # bytes
    slot_bytes: int
    used: set[int] = field(default_factory=set)  # offsets
    free: list[int] = field(default_factory=list)  # offsets, ascending pops from the end


class SlabAllocator:
    """Slots at multiples of `align` within `[0, capacity_bytes)`. O(1) but for a new slab."""

    def __init__(
        self, capacity_bytes: int, *, align: int = 4096, granule_bytes: int = 2 << 20
    ) -> None:
        if align <= 0 or align & (align - 1) or granule_bytes % align:
            raise ValueError(f"align {align} must be a power of two dividing {granule_bytes}")
        share = max(capacity_bytes // _GRANULES_MIN, align)
        self.granule_bytes = min(granule_bytes, 1 << (share.bit_length() - 1))
        self.capacity_bytes = capacity_bytes
        self.align = align
        self.used_bytes = 0  # slots handed out, rounding included
        self._taken = bytearray(capacity_bytes // self.granule_bytes)  # 1: granule is in a slab
        self._slabs: dict[int, _Slab] = {}  # start -> slab
        self._open: dict[int, dict[int, _Slab]] = {}  # slot size -> start -> slab with free slots
        self._slot_sizes: dict[int, int] = {}  # offset -> slot size, of slots handed out
        self._lengths: dict[int, int] = {}  # slot size -> slab length, memoised

    def slot_bytes(self, size: int) -> int:
        """What a slot for `size` bytes takes: `size` rounded up to the alignment."""
        if size <= 0:
            raise ValueError(f"slot size must be positive, got {size}")
        return -(-size // self.align) * self.align

    def allocate(self, size: int) -> int | None:
        """Offset of a free slot for `size` bytes, or None if none is free and no slab fits."""
        slot = self.slot_bytes(size)
        slabs = self._open.get(slot)
        if slabs:
            slab = next(reversed(slabs.values()))
        else:
            start = self._find_run(self._slab_length(slot))
            if start is None:
                return None
            slab = self._add_slab(start, slot)
        offset = slab.free.pop()
        self._hand_out(slab, offset)
        return offset

    def free(self, offset: int) -> None:
        """Give a slot back. Raises ValueError for an offset that is not handed out."""
        slot = self._slot_sizes.pop(offset, None)
        if slot is None:
            raise ValueError(f"offset {offset} is not allocated")
        slab = self._slab_at(offset, slot)
        slab.used.remove(offset)
        slab.free.append(offset)
        self.used_bytes -= slot
        if slab.used:
            self._open.setdefault(slot, {})[slab.start] = slab
        else:
            self._drop_slab(slab)

    def place(self, offset: int, size: int) -> None:
        """Hand out exactly this slot, as `allocate` once did. Raises ValueError if it cannot be."""
        slot = self.slot_bytes(size)
        length = self._slab_length(slot)
        start = offset // length * length if offset >= 0 else -1
        if start < 0 or start + length > len(self._taken) * self.granule_bytes:
            raise ValueError(f"slot at {offset} of {slot} bytes is outside the range")
        slab = self._slabs.get(start)
        if slab is None:
            first, count = start // self.granule_bytes, length // self.granule_bytes
            if any(self._taken[first : first + count]):
                raise ValueError(f"slot at {offset} of {slot} bytes overlaps another slab")
            if (offset - start) % slot or offset + slot > start + length:
                raise ValueError(f"no slot of {slot} bytes starts at {offset}")
            slab = self._add_slab(start, slot)
        if slab.slot_bytes != slot or offset not in slab.free:
            raise ValueError(f"slot at {offset} of {slot} bytes overlaps another slot")
        slab.free.remove(offset)
        self._hand_out(slab, offset)

    def blockers(self, offset: int, size: int) -> list[int]:
        """Slots that must be freed for a slab of `size` to be formed around `offset`.

        Empty if `offset` lies where no slab of that class fits (the range's tail).
        """
        length = self._slab_length(self.slot_bytes(size))
        start = offset // length * length
        if start + length > len(self._taken) * self.granule_bytes:
            return []
        found: list[int] = []
        first = start // self.granule_bytes
        seen: set[int] = set()
        for granule in range(first, first + length // self.granule_bytes):
            slab = self._slab_covering(granule * self.granule_bytes)
            if slab is not None and slab.start not in seen:
                seen.add(slab.start)
                found.extend(slab.used)
        return found

    def size_of(self, offset: int) -> int:
        """Slot size at an offset that is handed out (KeyError otherwise)."""
        return self._slot_sizes[offset]

    def fits(self, size: int) -> bool:
        """Whether an empty allocator could hold one slot of this size at all."""
        return self._slab_length(self.slot_bytes(size)) <= len(self._taken) * self.granule_bytes

    def check_integrity(self) -> None:
        """Assert that slabs, slots and counters agree. Cost: linear in slots."""
        covered = bytearray(len(self._taken))
        handed_out = 0
        for start, slab in self._slabs.items():
            assert start == slab.start and start % slab.length == 0
            first, count = start // self.granule_bytes, slab.length // self.granule_bytes
            assert not any(covered[first : first + count]), "slabs overlap"
            covered[first : first + count] = b"\x01" * count
            slots = {*slab.used, *slab.free}
            assert len(slots) == len(slab.used) + len(slab.free) == slab.length // slab.slot_bytes
            assert all((o - start) % slab.slot_bytes == 0 for o in slots)
            assert slab.used, "an empty slab was kept"
            assert bool(slab.free) == (start in self._open.get(slab.slot_bytes, {}))
            assert all(self._slot_sizes[o] == slab.slot_bytes for o in slab.used)
            handed_out += len(slab.used)
        assert covered == self._taken
        assert handed_out == len(self._slot_sizes)
        assert self.used_bytes == sum(self._slot_sizes.values()) <= self.capacity_bytes

    # -- below: one slab at a time -------------------------------------------------------

    def _slab_length(self, slot: int) -> int:
        known = self._lengths.get(slot)
        if known is not None:
            return known
        fewest = -(-slot // self.granule_bytes)
        best, best_waste = fewest, 1.0
        for count in range(fewest, max(_SLAB_GRANULES_MAX, fewest) + 1):
            waste = (count * self.granule_bytes % slot) / (count * self.granule_bytes)
            if waste < best_waste:
                best, best_waste = count, waste
            if waste <= _WASTE_MAX:
                break
        self._lengths[slot] = best * self.granule_bytes
        return best * self.granule_bytes

    def _find_run(self, length: int) -> int | None:
        count = length // self.granule_bytes
        free_run = bytes(count)
        at = self._taken.find(free_run)
        while at >= 0:
            aligned = -(-at // count) * count
            if self._taken[aligned : aligned + count] == free_run:
                return aligned * self.granule_bytes
            at = self._taken.find(free_run, aligned)
        return None

    def _add_slab(self, start: int, slot: int) -> _Slab:
        length = self._slab_length(slot)
        first, count = start // self.granule_bytes, length // self.granule_bytes
        self._taken[first : first + count] = b"\x01" * count
        free = list(range(start, start + length - slot + 1, slot))[::-1]
        slab = _Slab(start, length, slot, set(), free)
        self._slabs[start] = slab
        self._open.setdefault(slot, {})[start] = slab
        return slab

    def _drop_slab(self, slab: _Slab) -> None:
        first, count = slab.start // self.granule_bytes, slab.length // self.granule_bytes
        self._taken[first : first + count] = bytes(count)
        del self._slabs[slab.start]
        self._open.get(slab.slot_bytes, {}).pop(slab.start, None)

    def _hand_out(self, slab: _Slab, offset: int) -> None:
        slab.used.add(offset)
        self._slot_sizes[offset] = slab.slot_bytes
        self.used_bytes += slab.slot_bytes
        if not slab.free:
            del self._open[slab.slot_bytes][slab.start]

    def _slab_at(self, offset: int, slot: int) -> _Slab:
        length = self._slab_length(slot)
        return self._slabs[offset // length * length]

    def _slab_covering(self, position: int) -> _Slab | None:
        """The slab whose run covers a byte position; slab lengths are few, so try each."""
        for length in set(self._lengths.values()):
            slab = self._slabs.get(position // length * length)
            if slab is not None and slab.length > position - slab.start:
                return slab
        return None
