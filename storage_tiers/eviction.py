"""Which chunks must go so that one more fits into a tier's slots, or into its tenant's quota."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from storage_tiers.base import Chunk, tenant_of
from storage_tiers.chunk_index import ChunkIndex
from storage_tiers.leaves import NONE
from storage_tiers.slabs import HELD, SlabAllocator

TRIED_MAX: Final = 4096
"""Chunks looked at before the search gives up; it runs on an event loop."""
OWN_TRIED_MAX: Final = 256
"""Chunks looked at for one of a tenant's own, each time it stores a chunk beyond its quota."""

Quotas = Mapping[int, int]
"""Most bytes by a tenant's tag; no bound where it is not named."""


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


def within_quota(index: ChunkIndex, quotas: Quotas, chunk: Chunk, pending_bytes: int = 0) -> bool:
    """Whether a tenant may keep one more chunk beside those that it has or is about to have."""
    tag = tenant_of(chunk.key)
    quota = quotas.get(tag)
    return quota is None or index.tenant_bytes[tag] + pending_bytes + chunk.length <= quota


def find_own_victim(index: ChunkIndex, chunk: Chunk) -> int:
    """The record of the first chunk of the same tenant to go; NONE if none is among the first."""
    tag, parent = tenant_of(chunk.key), index.parent(chunk)
    for record in index.evictable(OWN_TRIED_MAX):
        if record != parent and tenant_of(index.key(record)) == tag:
            return record
    return NONE
