"""An engine's events as the router's: its blocks by sequence hash, with the hash of their tokens.

The tokens' hash is `runtime.hashing`'s, seeded by LoRA adapter and cache salt. An engine names a
block and the one before it in its own way, and the salt at a sequence's first block only: so what
it holds is remembered here, in columns. An engine whose blocks are larger than the router's has
several of them under one name. What it tells again, as vLLM does of a prefix that a request finds
cached, comes to nothing; after a loss that is how it becomes known again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
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
    KvCacheEventData,
    Removed,
    StorageTier,
    Stored,
    tier_of_medium,
)
from runtime.hashing import Hashes, block_hashes, media_hash, seed_for, sequence_hashes

if TYPE_CHECKING:
    from runtime.ledger import Keys, Ledger

BLOCKS_MAX: Final = 1 << 22
EVENT_BLOCKS_MAX: Final = 4096
PARTS_MAX: Final = 4096
_VERSION: Final = 1  # of a note: see `runtime.ledger`
_PARENT: Final = 1 << 8
_COUNT_AT: Final = 16
_HEAD_WORDS: Final = 3


@dataclass(frozen=True, slots=True)
class EngineRouterStatus:
    blocks: int  # the engine holds
    skipped_total: int  # events of other cache groups, other tiers, or not at this engine
    refused_total: int  # events that contradict themselves, or the router's block size
    orphaned_total: int  # blocks whose place is not known, because that of the one before is not
    full_total: int  # blocks beyond what is remembered


class EngineRouter:
    """Keeps what one rank's stream needs from one event to the next; `cleared` after `Lost`.

    `ledger` has all blocks that it holds, bit 0 set; their domain is the salt they are seeded by.
    """

    def __init__(self, block_size: int, *, group: int = 0, blocks_max: int = BLOCKS_MAX) -> None:
        """`group` is the cache group that the router indexes: of others removals say nothing."""
        from runtime.ledger import Ledger  # compiles when it is imported

        assert block_size > 0
        self.ledger: Ledger = Ledger(slack=0, run_blocks_max=EVENT_BLOCKS_MAX)
        self._block_size = block_size
        self._group = group
        self._blocks_max = blocks_max
        self._salts: dict[int, str] = {}
        self._counts = dict.fromkeys(("skipped", "refused", "orphaned", "full"), 0)

    def translate(self, batch: EngineBatch) -> list[KvCacheEventData]:
        """What its device gained and lost."""
        return [data for event in batch.events for data in self._event(event)]

    def cleared(self) -> Cleared:
        """What is to be told when the engine's events were lost, or it began anew."""
        self._salts.clear()
        self.ledger.reset()
        return Cleared()

    def status(self) -> EngineRouterStatus:
        counts = self._counts
        return EngineRouterStatus(
            self.ledger.blocks(0),
            counts["skipped"],
            counts["refused"],
            counts["orphaned"],
            counts["full"],
        )

    def _event(self, event: EngineEvent) -> list[KvCacheEventData]:
        if isinstance(event, AllBlocksCleared):
            return [self.cleared()]
        is_ours = tier_of_medium(event.medium) is StorageTier.DEVICE and event.locality != "REMOTE"
        if not is_ours or event.group_idx not in {None, self._group}:
            self._counts["skipped"] += 1
            return []
        return self._removed(event) if isinstance(event, BlockRemoved) else self._stored(event)

    def _removed(self, event: BlockRemoved) -> list[KvCacheEventData]:
        found: list[KvCacheEventData] = []
        for keys in _parts_of(_keys([number_of(name) for name in event.block_hashes])):
            runs = self.ledger.removed(self.ledger.clear(0, keys))
            self.ledger.trim()
            found += [Removed(run.names) for run in runs]
        return found

    def _stored(self, event: BlockStored) -> list[KvCacheEventData]:
        parts, odd = divmod(event.block_size, self._block_size)
        numbers = [number_of(block_hash) for block_hash in event.block_hashes]
        named = None if event.parent_block_hash is None else number_of(event.parent_block_hash)
        if (
            odd
            or not 0 < parts <= PARTS_MAX
            or len(event.token_ids) != len(numbers) * event.block_size
            or len({named, *numbers}) != len(numbers) + 1  # a block that follows itself
        ):
            return self._refused()
        before: int | None = None
        salt = _own_salt(event)
        if named is not None:
            row = int(self.ledger.rows_of(_keys([named]))[0])
            if row < 0:
                self._counts["orphaned"] += len(numbers)
                return []
            before = self.ledger.end_of(row)
            salt = self._salts.get(self.ledger.domain(row))
        local = self._local(event, parts, salt)
        if local is None:
            return self._refused()
        if self.ledger.blocks(0) + len(local) > self._blocks_max:
            self._counts["full"] += len(local)
            return []
        return self._hold(numbers, before, local, parts, salt)

    def _local(self, event: BlockStored, parts: int, salt: str | None) -> Hashes | None:
        """The blocks' own hashes; None if they cannot be had."""
        media = _images(event)
        if media and parts > 1:
            return None  # which of the parts they are in is not told
        seed = seed_for(event.lora_name, salt)
        try:
            return block_hashes(event.token_ids, self._block_size, seed=seed, media=media)
        except OverflowError:  # a token that is none of 32 bits
            return None

    def _hold(
        self, numbers: list[int], before: int | None, local: Hashes, parts: int, salt: str | None
    ) -> list[KvCacheEventData]:
        """Remember the blocks, and tell those that were not held before."""
        domain = 0 if salt is None else xxhash.xxh3_64_intdigest(salt.encode())
        known = self.ledger.number_of(domain)
        if known is None:  # so many salts that it is time to begin anew
            return [self.cleared(), *self._hold(numbers, before, local, parts, salt)]
        if salt is not None:
            self._salts[domain] = salt
        notes = np.zeros((len(numbers), _HEAD_WORDS + parts), np.uint64)
        notes[:, 0] = _VERSION | _PARENT | parts << _COUNT_AT
        ends = _chain(before, local)[parts - 1 :: parts]
        notes[1:, 2] = ends[:-1]
        if before is not None:
            notes[0, 2] = before
        elif len(notes):
            notes[0, 0] = _VERSION | parts << _COUNT_AT
        notes[:, _HEAD_WORDS:] = local.reshape(len(numbers), parts)
        found: list[KvCacheEventData] = []
        start = 0
        for keys in _parts_of(_keys(numbers)):
            end = start + len(keys)
            # Marked first: a row that no bit holds would be forgotten at once.
            self.ledger.mark(0, keys)
            fresh = self.ledger.learn(keys, notes[start:end], np.full(len(keys), known, np.uint32))
            runs = self.ledger.stored(self.ledger.rows_of(keys[fresh]))
            found += [Stored(run.parent, run.names, run.tokens) for run in runs]
            start = end
        return found

    def _refused(self) -> list[KvCacheEventData]:
        self._counts["refused"] += 1
        return []


def _keys(numbers: list[int]) -> Keys:
    keys = np.zeros((len(numbers), 2), np.uint64)
    keys[:, 0] = numbers
    return keys


def _parts_of(keys: Keys) -> list[Keys]:
    """As many at a time as a ledger takes."""
    from runtime.ledger import KEYS_AT_ONCE_MAX

    return [keys[at : at + KEYS_AT_ONCE_MAX] for at in range(0, len(keys), KEYS_AT_ONCE_MAX)]


def _chain(before: int | None, local: Hashes) -> Hashes:
    """Sequence hashes of blocks that follow the one named `before`."""
    if before is None:
        return sequence_hashes(local)
    return sequence_hashes(np.concatenate([np.array([before], np.uint64), local]))[1:]


def _own_salt(event: BlockStored) -> str | None:
    """Of a first block: the text among its keys that is not the adapter's name."""
    keys = list(event.extra_keys[0] or ()) if event.extra_keys else []
    texts = [key for key in keys if isinstance(key, str)]
    if event.lora_name and texts and texts[0] == event.lora_name:
        del texts[0]
    return texts[0] if texts else None


def _images(event: BlockStored) -> dict[int, list[int]]:
    """By block, the hashes of what is embedded in it."""
    found = {}
    for index, keys in enumerate(event.extra_keys or ()):
        names = [key[0] for key in keys or () if _is_image(key)]
        if names:
            found[index] = [media_hash(name) for name in names]
    return found


def _is_image(key: Any) -> bool:
    return isinstance(key, list | tuple) and len(key) > 0 and isinstance(key[0], str)
