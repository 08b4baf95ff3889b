"""What a request's blocks hold, as the hashes that blocks are found by.

The local hash of a block is XXH3-64 with seed 1337 of its token ids as little-endian u32; block
hashes are chained: the first is its local hash, each next one XXH3-64 of the hash before it and of
its local hash. Only whole blocks have hashes. Requests of a trace have no tokens: their local
hashes are made of the trace's ids, and of a number of their own where the answer begins.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import xxhash

from runtime.hashing import SEED, block_hashes

OWN: Final = 1 << 63  # sets blocks with generated tokens apart from those that a trace names
OWN_BLOCKS_MAX: Final = 1 << 20


class Content(Protocol):
    """Local hashes of the blocks of a prompt and its answer; equal calls give equal hashes."""

    def local_hashes(self, first: int, end: int) -> list[int]: ...


class Chain:
    """Local and chained hashes of a sequence's first blocks, as far as anybody has asked."""

    __slots__ = ("_content", "hashes", "locals")

    def __init__(self, content: Content) -> None:
        self._content = content
        self.locals: list[int] = []
        self.hashes: list[int] = []

    def extend(self, blocks: int) -> None:
        """Have at least so many; the caller guarantees that these blocks are whole."""
        known = len(self.hashes)
        if blocks <= known:
            return
        new = self._content.local_hashes(known, blocks)
        self.locals += new
        digest, pack, hashes = xxhash.xxh3_64_intdigest, _PAIR.pack, self.hashes
        previous = hashes[-1] if hashes else None
        for local in new:
            previous = local if previous is None else digest(pack(previous, local), SEED)
            hashes.append(previous)


class TraceContent:
    """Blocks named by a trace's ids, each of them cut into `split` blocks of the engine's size.

    From the first block on that the prompt does not fill, blocks are the request's own: a trace
    does not say what the answer was, so nobody ever finds these again.
    """

    __slots__ = ("_ids", "_number", "_prompt_blocks", "_split")

    def __init__(self, ids: Sequence[int], split: int, prompt_blocks: int, number: int) -> None:
        assert prompt_blocks <= len(ids) * split
        self._ids = ids
        self._split = split
        self._prompt_blocks = prompt_blocks
        self._number = number

    def local_hashes(self, first: int, end: int) -> list[int]:
        split = self._split
        named_end = min(end, self._prompt_blocks)
        values = np.empty(end - first, np.uint64)
        named = max(named_end - first, 0)
        if named:
            ids = np.array(self._ids[first // split : -(-named_end // split)], np.uint64)
            parts = ids[:, None] * np.uint64(split) + np.arange(split, dtype=np.uint64)
            values[:named] = parts.ravel()[first % split :][:named]
        if named < end - first:
            begin = OWN + self._number * OWN_BLOCKS_MAX + max(first, self._prompt_blocks)
            assert end < OWN_BLOCKS_MAX
            values[named:] = np.arange(end - first - named, dtype=np.uint64) + np.uint64(begin)
        return mixed(values)


class TokenContent:
    """Blocks of token ids, prompt and answer, the latter as far as it has been generated."""

    __slots__ = ("_block_size", "tokens")

    def __init__(self, tokens: Sequence[int], block_size: int) -> None:
        self.tokens = array("I", tokens)
        self._block_size = block_size

    def local_hashes(self, first: int, end: int) -> list[int]:
        size = self._block_size
        assert end * size <= len(self.tokens), "only whole blocks have hashes"
        whole: list[int] = block_hashes(self.tokens[first * size : end * size], size).tolist()
        return whole


def mixed(values: np.ndarray) -> list[int]:
    """splitmix64, which maps different numbers to different ones that look random."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: list[int] = (z ^ (z >> np.uint64(31))).tolist()
    return mixed


def mixed_one(value: int) -> int:
    """The same of one number, without numpy's cost of a call."""
    z = (value + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


_WORD: Final = (1 << 64) - 1
_PAIR: Final = struct.Struct("<QQ")
