"""Which chunks must go so that one more fits, in a tier whose slots come from slabs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from storage_tiers.base import Key
from storage_tiers.recency import Recency
from storage_tiers.slabs import SlabAllocator

TRIED_MAX: Final = 4096
"""Chunks looked at before the search gives up; it runs on an event loop."""


def find_victims(
    slots: SlabAllocator, index: Recency[Any], key_at: Mapping[int, Key], length: int
) -> list[Key]:
    """The oldest chunk of this size, or all in the way of a slab of it; empty if none may go.

    Leaves come before their parents. `key_at` says which chunk is resident in a slot.
    """
    wanted = slots.slot_bytes(length)
    for key in index.evictable(TRIED_MAX):
        record = index.get(key)
        assert record is not None, "evictable keys are resident"
        if slots.size_of(record.at) == wanted:
            return [key]
        blockers = slots.blockers(record.at, length)
        keys = [key_at[at] for at in blockers if at in key_at]
        if not blockers or len(keys) < len(blockers):
            continue  # the range's tail, or a slot that is being written or kept aside
        family = index.with_descendants(keys)
        if all((r := index.get(k)) is not None and r.pins == 0 for k in family):
            return family
    return []
