"""Kernels that store blocks: one event, many events, rows of blocks that do not follow each other.

A kernel that would run out of room stops before the block it has no room for and says what it
lacks; the caller makes room and calls again, and it goes on from where `S` says it was. Each block
is applied wholly or not at all, to one worker after the other.

Where all names are sequence hashes, blocks are looked up once for all workers of an event, and
their holders changed at once (`_share`).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import boolean, int64, types, uint64

from router import index_tables as t
from router.index_names import called, give_name, is_common, is_pure, make_common, new_record
from router.index_share import share
from runtime.native import READ_U32, READ_U64, WORDS, inlined, kernel, load32, load64
from runtime.xxh3 import of_two_words

_SEED: Final = uint64(1337)
_AHEAD: Final = 32  # blocks whose places are asked for before they are worked on


@inlined
def is_evident(chain):  # type: ignore[no-untyped-def]
    """Whether names are the sequence hashes that follow from the parent taken for one."""
    has_parent, parent, names, tokens, count = chain
    if count == 0:
        return True
    first = load64(tokens, 0)
    if load64(names, 0) != (of_two_words(parent, first, 16, _SEED) if has_parent else first):
        return False
    wrong = uint64(0)
    for n in range(1, count):
        expected = of_two_words(load64(names, n - 1), load64(tokens, n), 16, _SEED)
        wrong |= expected ^ load64(names, n)
    return wrong == uint64(0)


@inlined
def _needed(S, lane, name, sequence):  # type: ignore[no-untyped-def]
    """Records and aliases that a block may take."""
    record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], sequence)
    if record < 0:
        taken = name != sequence and t.find_record(S, t.BY_NAME, S[t.NAMES], name) >= 0
        return 2 if taken else 1
    return 0 if is_common(S, record, name) or called(S, lane, name) == record else 1


@inlined
def _lacks(S, lane, name, sequence):  # type: ignore[no-untyped-def]
    """What there is no room of, in the worst case, to store one more block."""
    if not t.has_set_room(S):
        return t.NEEDS_SETS
    room = S[t.CAPACITY] - S[t.LIVE] - S[t.ALIASES_LIVE]
    if room < 2 and room < _needed(S, lane, name, sequence):
        return t.NEEDS_SWEEP if S[t.DYING] > 0 else t.FULL
    if S[t.LIVE] >= S[t.LIVE_MAX]:
        return t.NEEDS_RECORDS
    if S[t.ALIASES_LIVE] >= S[t.ALIASES_MAX]:
        return t.NEEDS_ALIASES
    return t.DONE


@inlined
def _store_block(S, lane, tier, name, sequence):  # type: ignore[no-untyped-def]
    record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], sequence)
    plain = False
    if name != sequence:
        taken = t.find_record(S, t.BY_NAME, S[t.NAMES], name)
        plain = record == taken and S[t.ALIASES_LIVE] == 0
        if plain and S[t.NAMED_LIVE] < S[t.LIVE]:
            plain = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], name) < 0
    if not plain:
        record = give_name(S, lane, name, sequence, record)
    elif record < 0:
        record = new_record(S, sequence)
        make_common(S, record, name)
    if not t.is_member(S, load32(S[t.HOLDERS], record) & t.SET_MASK, lane, tier):
        t.turn_over(S, record, lane, tier)


@inlined
def _store_lane(S, lane, tier, known, chain):  # type: ignore[no-untyped-def]
    """Blocks from `S[AT_BLOCK]` on. Known: the names are the sequence hashes."""
    has_parent, parent, names, tokens, count = chain
    start = S[t.AT_BLOCK]
    chained, previous = start > 0, uint64(S[t.AT_CHAIN])
    if start == 0 and has_parent:
        record = called(S, lane, parent)
        if record >= 0:
            previous = load64(S[t.SEQUENCES], record)
            known = known and previous == parent
        elif known:
            previous = parent
        else:
            return t.NO_PARENT
        chained = True
    ahead = np.empty(_AHEAD, dtype=np.uint64)
    first = start
    while first < count:
        last = min(first + _AHEAD, count)
        before = previous
        for n in range(first, last):
            name = load64(names, n)
            if known:
                before = name
            elif chained:
                before = of_two_words(before, load64(tokens, n), 16, _SEED)
            else:
                before = load64(tokens, n)
            chained = True
            ahead[n - first] = before
            t.warm(S, t.BY_SEQUENCE, t.mixed(S, before))
            t.warm(S, t.BY_NAME, t.mixed(S, name))
        for n in range(first, last):
            sequence, name = ahead[n - first], load64(names, n)
            lacks = _lacks(S, lane, name, sequence)
            if lacks != t.DONE:
                S[t.AT_BLOCK], S[t.AT_CHAIN] = n, int64(previous)
                return lacks
            _store_block(S, lane, tier, name, sequence)
            S[t.STORED] += 1
            previous = sequence
        first = last
    return t.DONE


@inlined
def can_share(S, count):  # type: ignore[no-untyped-def]
    room = S[t.CAPACITY] - S[t.LIVE] - S[t.ALIASES_LIVE]
    return S[t.AT_LANE] < 0 and is_pure(S) and room >= count


@inlined
def begin(S):  # type: ignore[no-untyped-def]
    """The next event starts with its first lane and block."""
    S[t.AT_LANE], S[t.AT_BLOCK], S[t.AT_WORST] = -1, 0, t.DONE


@inlined
def store_lanes(S, lanes, lane_count, tier, known, chain):  # type: ignore[no-untyped-def]
    """Blocks that follow each other, or, if known and without a parent, any; what came of it.

    `chain` is whether there is a parent, the parent, addresses of names and tokens' hashes, their
    number. `S[AT_LANE]` is -1 while all lanes are worked on at once.
    """
    names, count = chain[2], chain[4]
    if tier > 0:
        S[t.LOWER] = 1
    if known and can_share(S, count - S[t.AT_BLOCK]):
        if S[t.LIVE] + count - S[t.AT_BLOCK] > S[t.LIVE_MAX]:
            return t.NEEDS_RECORDS
        result = share(S, lanes, lane_count, tier, True, names, count)
        if result == t.DONE:
            S[t.STORED] += count * lane_count
            begin(S)
        return result
    for n in range(max(0, S[t.AT_LANE]), lane_count):
        S[t.AT_LANE] = n
        lane = load32(lanes, n)
        result = _store_lane(S, lane, tier, known, chain)
        if result >= t.NEEDS_RECORDS:
            return result
        if S[t.AT_WORST] == t.DONE:
            S[t.AT_WORST] = result
        S[t.AT_BLOCK] = 0
    worst = S[t.AT_WORST]
    begin(S)
    return worst


@kernel(int64(WORDS, int64, int64, boolean, uint64, READ_U64, READ_U64))
def store(S, lane, tier, has_parent, parent, names, tokens):  # type: ignore[no-untyped-def]
    """One event of one lane."""
    chain = (has_parent, parent, int64(names.ctypes.data), int64(tokens.ctypes.data), len(names))
    lanes = S[t.LANE_NUMBERS] + 4 * lane
    return store_lanes(S, lanes, 1, tier, is_evident(chain), chain)


@kernel(types.void(READ_U64, READ_U64, types.Array(types.uint64, 1, "C")))
def name_rows(parents, tokens, names):  # type: ignore[no-untyped-def]
    """The sequence hash of every row; a parent 0 is none."""
    for n in range(len(tokens)):
        names[n] = tokens[n]
        if parents[n] != uint64(0):
            names[n] = of_two_words(parents[n], tokens[n], 16, _SEED)


@kernel(int64(WORDS, READ_U32, int64, READ_U64))
def store_rows(S, lanes, tier, names):  # type: ignore[no-untyped-def]
    """Blocks by sequence hash, in any order."""
    at = int64(names.ctypes.data)
    chain = (False, uint64(0), at, at, len(names))
    return store_lanes(S, int64(lanes.ctypes.data), len(lanes), tier, True, chain)
