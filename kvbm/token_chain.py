"""A sequence's blocks as routers name them, hashed as its tokens come; what notes are made from.

Engines' connectors keep one for each request. A token is hashed once.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from kvbm.note import pack_note
from runtime.hashing import block_hashes, media_hash, seed_for, sequence_hashes

_HASH: Final = struct.Struct("<Q")


class TokenChain:
    """All blocks from the first on. A block takes 16 bytes here."""

    def __init__(self, block_tokens: int, *, lora: str | None, cache_salt: str | None) -> None:
        assert block_tokens > 0
        self.block_tokens = block_tokens
        self._seed = seed_for(lora, cache_salt)
        self._own = bytearray()  # hashes of each block's tokens, little-endian
        self._chained = bytearray()  # and its sequence hash

    def __len__(self) -> int:
        """Blocks that are hashed."""
        return len(self._own) // _HASH.size

    def clear(self) -> None:
        self._own.clear()
        self._chained.clear()

    def extend(self, tokens: Sequence[int], media: Mapping[int, Sequence[str]] = {}) -> None:
        """Tokens of the blocks that follow, whole ones.

        `media` names what is embedded in a block by identifier; the first of these is block 0.
        Raises OverflowError if a token is none of 32 bits; nothing is added then.
        """
        assert len(tokens) % self.block_tokens == 0
        words = np.frombuffer(array("I", tokens), dtype=np.uint32)
        embedded = {block: [media_hash(name) for name in names] for block, names in media.items()}
        own = block_hashes(words, self.block_tokens, seed=self._seed, media=embedded)
        if self._chained:
            last = np.frombuffer(self._chained[-_HASH.size :], dtype="<u8")
            chained = sequence_hashes(np.concatenate([last, own]))[1:]
        else:
            chained = sequence_hashes(own)
        self._own += own.astype("<u8", copy=False).tobytes()
        self._chained += chained.astype("<u8", copy=False).tobytes()

    def note(self, domain: int, first: int, end: int) -> bytes:
        """Of the blocks from `first` to before `end`, which are hashed."""
        assert 0 <= first < end <= len(self)
        parent = None
        if first:
            (parent,) = _HASH.unpack_from(self._chained, (first - 1) * _HASH.size)
        return pack_note(domain, parent, bytes(self._own[first * _HASH.size : end * _HASH.size]))


def warm_up() -> None:
    """Compile what a chain needs, which takes seconds the first time on a machine."""
    TokenChain(16, lora=None, cache_salt=None).extend(range(64))
