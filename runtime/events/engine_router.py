"""An engine's events as the router's: its blocks with the hash of their tokens.

The tokens' hash is `runtime.hashing`'s, seeded by LoRA adapter and cache salt. vLLM
names the salt at a sequence's first block only, so blocks that have one are remembered here. An
engine whose blocks are larger than the router's has one name for several of them: the last takes
it, the others are named after it, so that a parent's name fits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import xxhash

from runtime.events.engine_wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EngineBatch,
    EngineEvent,
    number_of,
)
from runtime.events.router_event import (
    Cleared,
    KvCacheEvent,
    KvCacheEventData,
    MmObject,
    MmObjects,
    Removed,
    RouterEvent,
    StorageTier,
    Stored,
    hashes,
    tier_of_medium,
)
from runtime.hashing import SEED, block_hashes, media_hash, seed_for

SALTED_BLOCKS_MAX: Final = 1 << 18
_PART = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class EngineRouterStatus:
    next_event_id: int
    skipped_total: int  # of other cache groups, tiers not known, or not at this engine
    refused_total: int  # that contradict themselves, or the router's block size


class EngineRouter:
    """Keeps what one rank's stream needs from one event to the next; `cleared` after `Lost`."""

    def __init__(self, worker_id: int, dp_rank: int, block_size: int, *, group: int = 0) -> None:
        """`group` is the cache group that the router indexes: of others removals say nothing."""
        assert block_size > 0
        self._worker_id = worker_id
        self._dp_rank = dp_rank
        self._block_size = block_size
        self._group = group
        self._parts = 1  # router's blocks in one of the engine's
        self._salts: dict[int, str] = {}
        self._next_event_id = 0
        self._skipped_total = 0
        self._refused_total = 0

    def translate(self, batch: EngineBatch) -> list[RouterEvent]:
        return [event for found in batch.events if (event := self._event(found)) is not None]

    def cleared(self) -> RouterEvent:
        """What is to be told when the engine's events were lost, or it began anew."""
        self._salts.clear()
        return self._numbered(Cleared(), StorageTier.DEVICE)

    def status(self) -> EngineRouterStatus:
        return EngineRouterStatus(self._next_event_id, self._skipped_total, self._refused_total)

    def _event(self, event: EngineEvent) -> RouterEvent | None:
        if isinstance(event, AllBlocksCleared):
            return self.cleared()
        tier = tier_of_medium(event.medium)
        if tier is None or event.group_idx not in {None, self._group} or event.locality == "REMOTE":
            self._skipped_total += 1
            return None
        data = self._removed(event) if isinstance(event, BlockRemoved) else self._stored(event)
        if data is None:
            self._refused_total += 1
            return None
        return self._numbered(data, tier)

    def _removed(self, event: BlockRemoved) -> Removed:
        numbers = [number_of(block_hash) for block_hash in event.block_hashes]
        return Removed(hashes(self._names(numbers)))

    def _stored(self, event: BlockStored) -> Stored | None:
        parts, odd = divmod(event.block_size, self._block_size)
        numbers = [number_of(block_hash) for block_hash in event.block_hashes]
        if odd or not parts or len(event.token_ids) != len(numbers) * event.block_size:
            return None
        parent = None if event.parent_block_hash is None else number_of(event.parent_block_hash)
        if len({parent, *numbers}) != len(numbers) + 1:
            return None  # a block that follows itself
        salt = self._salt(event, parent, numbers)
        images = _images(event)
        if images and parts > 1:
            return None  # which of the parts they are in is not told
        seed = seed_for(event.lora_name, salt)
        media = {index: [image.mm_hash for image in those] for index, those in images.items()}
        try:
            found = block_hashes(event.token_ids, self._block_size, seed=seed, media=media)
        except OverflowError:  # a token that is none of 32 bits
            return None
        self._parts = parts
        return Stored(parent, hashes(self._names(numbers)), found, None, images)

    def _salt(self, event: BlockStored, parent: int | None, numbers: list[int]) -> str | None:
        salt = self._salts.get(parent) if parent is not None else _own_salt(event)
        if salt is not None:
            for number in numbers:
                self._salts[number] = salt
            while len(self._salts) > SALTED_BLOCKS_MAX:
                del self._salts[next(iter(self._salts))]
        return salt

    def _names(self, numbers: list[int]) -> list[int]:
        if self._parts == 1:
            return numbers
        return [
            number
            if part == self._parts - 1
            else xxhash.xxh3_64_intdigest(_PART.pack(number, part), SEED)
            for number in numbers
            for part in range(self._parts)
        ]

    def _numbered(self, data: KvCacheEventData, tier: StorageTier) -> RouterEvent:
        event = KvCacheEvent(self._next_event_id, data, self._dp_rank)
        self._next_event_id += 1
        return RouterEvent(self._worker_id, event, tier)


def _own_salt(event: BlockStored) -> str | None:
    """Of a first block: the text among its keys that is not the adapter's name."""
    keys = list(event.extra_keys[0] or ()) if event.extra_keys else []
    texts = [key for key in keys if isinstance(key, str)]
    if event.lora_name and texts and texts[0] == event.lora_name:
        del texts[0]
    return texts[0] if texts else None


def _images(event: BlockStored) -> dict[int, MmObjects]:
    """By block; where in it they stand is not told."""
    found = {}
    for index, keys in enumerate(event.extra_keys or ()):
        names = [key[0] for key in keys or () if _is_image(key)]
        if names:
            found[index] = tuple(MmObject(media_hash(name)) for name in names)
    return found


def _is_image(key: Any) -> bool:
    return isinstance(key, list | tuple) and len(key) > 0 and isinstance(key[0], str)
