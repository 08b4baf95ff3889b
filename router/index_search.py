"""The kernel that finds how far each worker holds a chain of blocks.

Blocks stored together have neighbouring records, so following a chain is mostly a walk over
adjacent words: each step hashes the next block onto the record's sequence hash and compares with
the record beside it; steps do not wait for each other. Where the chain was stored in pieces the
hash table is asked, for many blocks at once so that their cache misses overlap. Every block is
looked at: that is what makes the answer exact where evictions left holes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import int32, int64, types, uint64

from router import index_tables as t
from runtime.native import READ_U64, WORDS, inlined, kernel, load32, load64, prefetch
from runtime.xxh3 import of_two_words

_SEED: Final = uint64(1337)
_AHEAD: Final = 16


@inlined
def _start(S, which, levels, active):  # type: ignore[no-untyped-def]
    """Who holds the first block: in G1, in G1 or G2, and so on."""
    words, row = S[t.LANE_WORDS], t.row_of(S, which)
    for word in range(words):
        held = uint64(0)
        for level in range(levels):
            held |= load64(row, level * words + word)
            active[level * words + word] = held


@inlined
def _narrow(S, which, levels, active, out, position):  # type: ignore[no-untyped-def]
    """Whoever lacks this block ends here; returns whether anybody goes on."""
    words, row = S[t.LANE_WORDS], t.row_of(S, which)
    some = uint64(0)
    for word in range(words):
        held = uint64(0)
        for level in range(levels):
            held |= load64(row, level * words + word)
            at = level * words + word
            ended = active[at] & ~held
            if ended != uint64(0):
                active[at] &= held
                while ended != uint64(0):
                    lane, ended = t.members(ended, 64 * word)
                    out[level, lane] = position
        some |= active[(levels - 1) * words + word]
    return some != uint64(0)


@inlined
def _finish(S, levels, active, out, position):  # type: ignore[no-untyped-def]
    """Whoever is left holds all that was looked at; unused tiers are like the first."""
    words = S[t.LANE_WORDS]
    for level in range(levels):
        for word in range(words):
            left = active[level * words + word]
            while left != uint64(0):
                lane, left = t.members(left, 64 * word)
                out[level, lane] = position
    for level in range(levels, t.ALIAS_LAYER):
        for lane in range(out.shape[1]):
            out[level, lane] = out[0, lane]


@inlined
def _ask_ahead(S, chained, tokens, position, ahead):  # type: ignore[no-untyped-def]
    """Sequence hashes of the next blocks, and their places on the way to the cache."""
    for n in range(min(_AHEAD, len(tokens) - position)):
        chained = of_two_words(chained, tokens[position + n], 16, _SEED)
        ahead[n] = chained
        t.warm(S, t.BY_SEQUENCE, t.mixed(S, chained))
    for n in range(min(_AHEAD, len(tokens) - position)):
        record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], ahead[n])
        if record < 0:
            return
        prefetch(S[t.HOLDERS] + 4 * record)


@kernel(int64(WORDS, READ_U64, types.Array(int32, 2, "C")))
def find(S, tokens, out):  # type: ignore[no-untyped-def]
    """Fill `out`, zeros by tier and lane, with numbers of leading blocks; how many are known."""
    count = len(tokens)
    if count == 0:
        return 0
    sequences, holders, end = S[t.SEQUENCES], S[t.HOLDERS], S[t.RECORDS]
    record = t.find_record(S, t.BY_SEQUENCE, sequences, tokens[0])
    if record < 0:
        return 0
    levels = t.ALIAS_LAYER if S[t.LOWER] != 0 else 1
    active = np.empty(t.ALIAS_LAYER * S[t.LANE_WORDS], dtype=np.uint64)
    ahead = np.empty(_AHEAD, dtype=np.uint64)
    which = load32(holders, record) & t.SET_MASK
    _start(S, which, levels, active)
    position = 1
    asked = 0  # positions below it were asked for
    jumped = -2
    while position < count:
        chained = of_two_words(load64(sequences, record), tokens[position], 16, _SEED)
        beside = record + 1
        if beside < end and load64(sequences, beside) == chained and load32(holders, beside) != 0:
            record = beside
        else:
            if jumped == position - 1 and position >= asked:
                _ask_ahead(S, load64(sequences, record), tokens, position, ahead)
                asked = position + _AHEAD
            jumped = position
            record = t.find_record(S, t.BY_SEQUENCE, sequences, chained)
            if record < 0:
                break
        held = load32(holders, record) & t.SET_MASK
        if held != which:
            which = held
            if not _narrow(S, which, levels, active, out, position):
                break
        position += 1
    _finish(S, levels, active, out, position)
    return position
