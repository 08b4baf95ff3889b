"""Which chunks must go so that one more fits, in a tier whose slots come from slabs."""

from __future__ import annotations

from typing import Final

from storage_tiers.chunk_index import ChunkIndex
from storage_tiers.slabs import HELD, SlabAllocator

TRIED_MAX: Final = 4096
"""Chunks looked at before the search gives up; it runs on an event loop."""


def find_victims(slots: SlabAllocator, index: ChunkIndex, length: int) -> list[int]:
    """Records of the first chunk of this size to go, or of all in the way of a slab of it.

    Empty if none may go. The slots' owners are the index's records.
    """
    wanted = slots.slot_bytes(length)
    for record in index.evictable(TRIED_MAX):
        place = index.place(record)
        if slots.size_of(place) == wanted:
            return [record]
        owners = [slots.owner(at) for at in slots.blockers(place, length)]
        # None: the range's tail. HELD: a slot that is being written or kept aside.
        if owners and not any(owner == HELD or index.pins(owner) for owner in owners):
            return owners
    return []
