"""Allocator of equal-sized slots inside one byte range: slabs with size classes.

Used for the host-memory arena and for the SSD's extents, so that models with different chunk
sizes share one capacity. The range is cut into granules; a slab is a run of granules that holds
slots of one size; an empty slab gives its granules back, so memory moves between classes.

A slab of a class always has the same length and starts at a multiple of it. Where a slot lies is
therefore a pure function of (offset, size), and `place` can rebuild the state after a restart from
offsets and sizes alone. Each slot in use has an owner, a number of the caller's; what the allocator
knows of a slot takes 4 bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

HELD: Final = -1
"""The owner of a slot that is in use and has been given none."""

_FREE: Final = -2
_NO_SLAB: Final = -1
_WASTE_MAX = 1 / 16  # of a slab, at its tail
_SLAB_GRANULES_MAX = 16  # unless one slot alone needs more
_GRANULES_MIN = 64  # small ranges get smaller granules


@dataclass(slots=True)
class _Slab:
    start: int  # bytes
    length: int  # bytes
    slot_bytes: int
    owners: array[int]  # by slot: its owner, HELD or _FREE
    used: int = 0  # slots
    first_free: int = 0  # no slot before it is free

    def offset_of(self, slot: int) -> int:
        return self.start + slot * self.slot_bytes


class SlabAllocator:
    """Slots at multiples of `align` within `[0, capacity_bytes)`.

    O(1) but for a new slab, and for finding a slab's next free slot, which is a scan of 4 bytes a
    slot.
    """

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
        count = capacity_bytes // self.granule_bytes
        self._taken = bytearray(count)  # 1: granule is in a slab
        self._free_granules = count  # so that a full range is known without a look at all of it
        self._slab_starts = array("i", [_NO_SLAB]) * count  # granule -> its slab's first granule
        self._slabs: dict[int, _Slab] = {}  # first granule -> slab
        self._open: dict[int, dict[int, _Slab]] = {}  # slot size -> start -> slab with free slots
        self._lengths: dict[int, int] = {}  # slot size -> slab length, memoised

    def slot_bytes(self, size: int) -> int:
        """What a slot for `size` bytes takes: `size` rounded up to the alignment."""
        if size <= 0:
            raise ValueError(f"slot size must be positive, got {size}")
        return -(-size // self.align) * self.align

    def allocate(self, size: int) -> int | None:
        """Offset of a free slot for `size` bytes, or None if none is free and no slab fits."""
        slot_bytes = self.slot_bytes(size)
        slabs = self._open.get(slot_bytes)
        if slabs:
            slab = next(reversed(slabs.values()))
        else:
            start = self._find_run(self._slab_length(slot_bytes))
            if start is None:
                return None
            slab = self._add_slab(start, slot_bytes)
        slot = slab.owners.index(_FREE, slab.first_free)
        self._hand_out(slab, slot)
        slab.first_free = slot + 1
        return slab.offset_of(slot)

    def free(self, offset: int) -> None:
        """Give a slot back. Raises ValueError for an offset that is not handed out."""
        slab, slot = self._locate(offset)
        slab.owners[slot] = _FREE
        slab.used -= 1
        slab.first_free = min(slab.first_free, slot)
        self.used_bytes -= slab.slot_bytes
        if slab.used:
            self._open.setdefault(slab.slot_bytes, {})[slab.start] = slab
        else:
            self._drop_slab(slab)

    def place(self, offset: int, size: int) -> None:
        """Hand out exactly this slot, as `allocate` once did. Raises ValueError if it cannot be."""
        slot_bytes = self.slot_bytes(size)
        length = self._slab_length(slot_bytes)
        start = offset // length * length if offset >= 0 else -1
        if start < 0 or start + length > len(self._taken) * self.granule_bytes:
            raise ValueError(f"slot at {offset} of {slot_bytes} bytes is outside the range")
        first, count = start // self.granule_bytes, length // self.granule_bytes
        slab = self._slabs.get(first)
        if slab is None or slab.slot_bytes != slot_bytes:
            if any(self._taken[first : first + count]):
                raise ValueError(f"slot at {offset} of {slot_bytes} bytes overlaps another slab")
            slab = None
        slot, rest = divmod(offset - start, slot_bytes)
        if rest or offset + slot_bytes > start + length:
            raise ValueError(f"no slot of {slot_bytes} bytes starts at {offset}")
        if slab is None:
            slab = self._add_slab(start, slot_bytes)
        if slab.owners[slot] != _FREE:
            raise ValueError(f"slot at {offset} of {slot_bytes} bytes overlaps another slot")
        self._hand_out(slab, slot)

    def set_owner(self, offset: int, owner: int) -> None:
        """Note whose a slot in use is; `owner` is not negative, or HELD."""
        slab, slot = self._locate(offset)
        slab.owners[slot] = owner

    def owner(self, offset: int) -> int:
        """Whose a slot in use is, or HELD. Raises ValueError for one that is not in use."""
        slab, slot = self._locate(offset)
        return slab.owners[slot]

    def blockers(self, offset: int, size: int) -> list[int]:
        """Slots that must be freed for a slab of `size` to be formed around `offset`.

        Empty if `offset` lies where no slab of that class fits (the range's tail).
        """
        length = self._slab_length(self.slot_bytes(size))
        start = offset // length * length
        if start + length > len(self._taken) * self.granule_bytes:
            return []
        first = start // self.granule_bytes
        slabs = set(self._slab_starts[first : first + length // self.granule_bytes]) - {_NO_SLAB}
        return [offset for at in sorted(slabs) for offset in self._used_in(self._slabs[at])]

    def size_of(self, offset: int) -> int:
        """Slot size at an offset that is handed out. Raises ValueError otherwise."""
        return self._locate(offset)[0].slot_bytes

    def fits(self, size: int) -> bool:
        """Whether an empty allocator could hold one slot of this size at all."""
        return self._slab_length(self.slot_bytes(size)) <= len(self._taken) * self.granule_bytes

    def has_room(self, size: int) -> bool:
        """Whether `allocate` would find a slot."""
        slot_bytes = self.slot_bytes(size)
        return bool(self._open.get(slot_bytes)) or (
            self._find_run(self._slab_length(slot_bytes)) is not None
        )

    def check_integrity(self) -> None:
        """Assert that slabs, slots and counters agree. Cost: linear in slots."""
        covered = bytearray(len(self._taken))
        starts = array("i", [_NO_SLAB]) * len(self._taken)
        used_bytes = 0
        for first, slab in self._slabs.items():
            assert first * self.granule_bytes == slab.start and slab.start % slab.length == 0
            count = slab.length // self.granule_bytes
            assert not any(covered[first : first + count]), "slabs overlap"
            covered[first : first + count] = b"\x01" * count
            starts[first : first + count] = array("i", [first]) * count
            assert len(slab.owners) == slab.length // slab.slot_bytes
            free = slab.owners.count(_FREE)
            assert slab.used == len(slab.owners) - free > 0, "an empty slab was kept"
            assert _FREE not in slab.owners[: slab.first_free]
            assert bool(free) == (slab.start in self._open.get(slab.slot_bytes, {}))
            used_bytes += slab.used * slab.slot_bytes
        assert self._free_granules == self._taken.count(0)
        assert covered == self._taken and starts == self._slab_starts
        assert self.used_bytes == used_bytes <= self.capacity_bytes

    # -- below: one slab at a time -------------------------------------------------------

    def _slab_length(self, slot_bytes: int) -> int:
        known = self._lengths.get(slot_bytes)
        if known is not None:
            return known
        fewest = -(-slot_bytes // self.granule_bytes)
        best, best_waste = fewest, 1.0
        for count in range(fewest, max(_SLAB_GRANULES_MAX, fewest) + 1):
            waste = (count * self.granule_bytes % slot_bytes) / (count * self.granule_bytes)
            if waste < best_waste:
                best, best_waste = count, waste
            if waste <= _WASTE_MAX:
                break
        self._lengths[slot_bytes] = best * self.granule_bytes
        return best * self.granule_bytes

    def _find_run(self, length: int) -> int | None:
        count = length // self.granule_bytes
        if count > self._free_granules:
            return None
        free_run = bytes(count)
        at = self._taken.find(free_run)
        while at >= 0:
            aligned = -(-at // count) * count
            if self._taken[aligned : aligned + count] == free_run:
                return aligned * self.granule_bytes
            at = self._taken.find(free_run, aligned)
        return None

    def _add_slab(self, start: int, slot_bytes: int) -> _Slab:
        length = self._slab_length(slot_bytes)
        first, count = start // self.granule_bytes, length // self.granule_bytes
        self._taken[first : first + count] = b"\x01" * count
        self._free_granules -= count
        self._slab_starts[first : first + count] = array("i", [first]) * count
        slab = _Slab(start, length, slot_bytes, array("i", [_FREE]) * (length // slot_bytes))
        self._slabs[first] = slab
        self._open.setdefault(slot_bytes, {})[start] = slab
        return slab

    def _drop_slab(self, slab: _Slab) -> None:
        first, count = slab.start // self.granule_bytes, slab.length // self.granule_bytes
        self._taken[first : first + count] = bytes(count)
        self._free_granules += count
        self._slab_starts[first : first + count] = array("i", [_NO_SLAB]) * count
        del self._slabs[first]
        self._open.get(slab.slot_bytes, {}).pop(slab.start, None)

    def _hand_out(self, slab: _Slab, slot: int) -> None:
        slab.owners[slot] = HELD
        slab.used += 1
        self.used_bytes += slab.slot_bytes
        if slab.used == len(slab.owners):
            del self._open[slab.slot_bytes][slab.start]

    def _locate(self, offset: int) -> tuple[_Slab, int]:
        """The slab and slot number at an offset in use. Raises ValueError for any other."""
        granule = offset // self.granule_bytes
        first = self._slab_starts[granule] if 0 <= granule < len(self._taken) else _NO_SLAB
        if first != _NO_SLAB:
            slab = self._slabs[first]
            slot, rest = divmod(offset - slab.start, slab.slot_bytes)
            if not rest and slot < len(slab.owners) and slab.owners[slot] != _FREE:
                return slab, slot
        raise ValueError(f"offset {offset} is not allocated")

    def _used_in(self, slab: _Slab) -> Iterator[int]:
        for slot, owner in enumerate(slab.owners):
            if owner != _FREE:
                yield slab.offset_of(slot)
