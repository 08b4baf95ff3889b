"""The kernels of `frontend.bpe`: the table of merges, and words to tokens with it.

Importing this module compiles (a second, once a machine).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import int64, types, uint64

from runtime.native import READ_U32, READ_U64, inlined, kernel

WORD_BYTES_MAX: Final = 128
"""Longer words are left to others: merging here costs the square of a word's length."""

_MIX: Final = uint64(0x9E3779B97F4A7C15)
_NONE: Final = uint64((1 << 64) - 1)
_LOW: Final = uint64(0xFFFFFFFF)
_BYTES: Final = types.Array(types.uint8, 1, "C", readonly=True)
_LENGTHS: Final = types.Array(types.int64, 1, "C", readonly=True)
_TABLE: Final = types.Array(types.uint64, 1, "C")
_OUT: Final = types.Array(types.uint32, 1, "C")


@inlined
def _place(table, pair):  # type: ignore[no-untyped-def]
    """Where a pair is in the table, or would be."""
    mask = uint64(len(table) // 2 - 1)
    at = (pair * _MIX >> uint64(32)) & mask
    while table[2 * at] != pair and table[2 * at] != _NONE:
        at = (at + uint64(1)) & mask
    return 2 * at


@inlined
def _merge_of(table, left, right):  # type: ignore[no-untyped-def]
    """Rank and token of what two tokens become; `_NONE` if they stay two."""
    return table[_place(table, (uint64(left) << uint64(32)) | uint64(right)) + uint64(1)]


@kernel(types.void(_TABLE, READ_U64, READ_U64))
def fill(table, pairs, merges):  # type: ignore[no-untyped-def]
    """Put pairs and what becomes of them into a table of all ones, of a power of two of pairs."""
    for n in range(len(pairs)):
        at = _place(table, pairs[n])
        table[at] = pairs[n]
        table[at + uint64(1)] = merges[n]


@inlined
def _merge(table, tokens, merges, count):  # type: ignore[no-untyped-def]
    """Merge the word in `tokens` as far as it goes; how many are left."""
    for n in range(count - 1):
        merges[n] = _merge_of(table, tokens[n], tokens[n + 1])
    while count > 1:
        where, best = -1, _NONE
        for n in range(count - 1):
            if merges[n] < best:
                where, best = n, merges[n]
        if where < 0:
            break
        tokens[where] = best & _LOW
        count -= 1
        for n in range(where + 1, count):
            tokens[n] = tokens[n + 1]
            merges[n - 1] = merges[n]
        if where > 0:
            merges[where - 1] = _merge_of(table, tokens[where - 1], tokens[where])
        if where < count - 1:
            merges[where] = _merge_of(table, tokens[where], tokens[where + 1])
    return count


@kernel(int64(READ_U64, READ_U32, _BYTES, _LENGTHS, _OUT))
def encode(table, of_byte, data, lengths, out):  # type: ignore[no-untyped-def]
    """Fill `out` with the tokens of words, how many; -1 if a word is too long or lengths are wrong.

    `lengths` are of words in `data`, one behind another; a negative one is a token, ~token.
    """
    tokens = np.empty(WORD_BYTES_MAX, dtype=np.uint32)
    merges = np.empty(WORD_BYTES_MAX, dtype=np.uint64)  # of each token and the next
    at = made = 0
    for word in range(len(lengths)):
        length = lengths[word]
        if length < 0:
            out[made] = ~length
            made += 1
            continue
        if length > WORD_BYTES_MAX or at + length > len(data):
            return -1
        for n in range(length):
            tokens[n] = of_byte[data[at + n]]
        at += length
        count = _merge(table, tokens, merges, length)
        for n in range(count):
            out[made + n] = tokens[n]
        made += count
    return made if at == len(data) else -1
