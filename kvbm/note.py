"""What is kept with a chunk so that routers can be told of it: the hashes of its tokens.

The connector makes a note for each chunk it stores, the tiers keep it beside the chunk and give it
back after a restart or on another node. To them it is bytes without meaning.

Layout, little-endian: u8 version 1, u8 whether there is a block before, u16 number of blocks n,
u32 zero, u64 domain, u64 sequence hash of the block before (or zero), n x u64 hashes of each
block's tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from runtime.hashing import Hashes, sequence_hashes
from storage_tiers.base import Key

VERSION: Final = 1
BLOCKS_MAX: Final = 4096  # in one chunk
_HEAD: Final = struct.Struct("<BBHIQQ")
NOTE_BYTES_MAX: Final = _HEAD.size + 8 * BLOCKS_MAX


class NoteError(ValueError):
    """Bytes that are no note of this version."""


@dataclass(frozen=True, slots=True, eq=False)
class Note:
    domain: int  # see `domain_of`
    parent: int | None  # sequence hash of the block before the first
    tokens_hashes: Hashes

    @property
    def chain(self) -> Hashes:
        """Sequence hashes of the blocks."""
        if self.parent is None:
            return sequence_hashes(self.tokens_hashes)
        head = np.array([self.parent], np.uint64)
        return sequence_hashes(np.concatenate([head, self.tokens_hashes]))[1:]

    def encode(self) -> bytes:
        hashes = self.tokens_hashes.astype("<u8", copy=False).tobytes()
        return pack_note(self.domain, self.parent, hashes)

    @classmethod
    def decode(cls, note: bytes) -> Self:
        """Raises NoteError."""
        if len(note) < _HEAD.size:
            raise NoteError(f"a note of {len(note)} bytes")
        version, has_parent, count, _, domain, parent = _HEAD.unpack_from(note)
        if version != VERSION or not 0 < count <= BLOCKS_MAX:
            raise NoteError(f"a note of version {version} with {count} blocks")
        if len(note) != _HEAD.size + 8 * count:
            raise NoteError(f"a note of {len(note)} bytes with {count} blocks")
        hashes: NDArray[np.uint64] = np.frombuffer(note, "<u8", offset=_HEAD.size)
        return cls(domain, parent if has_parent else None, hashes.astype(np.uint64, copy=False))


def pack_note(domain: int, parent: int | None, tokens_hashes: bytes) -> bytes:
    """`Note.encode` of hashes that are little-endian bytes already."""
    count = len(tokens_hashes) // 8
    assert 0 < count <= BLOCKS_MAX
    return _HEAD.pack(VERSION, parent is not None, count, 0, domain, parent or 0) + tokens_hashes


class NoteBook(Protocol):
    """Notes of the chunks that this node keeps in any tier. On the daemon's event loop.

    It hears of residencies as a `kvbm.manager.BlockEvents` does, and forgets the notes of chunks
    that are in no tier any more.
    """

    def learn(self, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        """One note a key, empty where there is none; what is no note is skipped.

        Called just before `stored` tells that the keys are in a tier, or later, for keys that are
        in one: a tier found their notes only then. A key's note never changes.
        """
        ...

    def note_of(self, key: Key) -> bytes:
        """As it was learnt; empty if there is none."""
        ...


class NoNotes:
    """Nobody is told of what this node keeps: it keeps no notes."""

    def learn(self, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        pass

    def note_of(self, key: Key) -> bytes:
        return b""


def is_note(note: bytes) -> bool:
    """Whether `Note.decode` takes these bytes. Costs no copy."""
    if len(note) < _HEAD.size:
        return False
    version, _, count, _, _, _ = _HEAD.unpack_from(note)
    whole: bool = version == VERSION and len(note) == _HEAD.size + 8 * count
    return whole and 0 < count <= BLOCKS_MAX


def domain_in(note: bytes) -> int:
    """Of what `is_note`."""
    domain: int = _HEAD.unpack_from(note)[4]
    return domain


@lru_cache(maxsize=64)
def domain_of(namespace: bytes, salt: bytes, tag: int) -> int:
    """The KV that engines of one key space and tenant share: XXH3-64 of what their keys have in
    common."""
    return xxhash.xxh3_64_intdigest(namespace + b"\0" + salt + bytes([tag]))


def owner_of(node: str, domain: int) -> int:
    """The `worker_id` of a node's blocks of one domain: the same over restarts of the daemon."""
    return xxhash.xxh3_64_intdigest(node.encode(), seed=domain)
