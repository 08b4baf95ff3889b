"""Kernels that build the index's tables anew, and that check them."""

from __future__ import annotations

from numba import boolean, int64, types, uint64

from router import index_tables as t
from router.index_names import calls
from runtime.native import WORDS, inlined, kernel, load32, load64, store64


@inlined
def _numbers(S, table):  # type: ignore[no-untyped-def]
    """Below this are the numbers of all that may belong into a table."""
    if table == t.BY_MEMBERS:
        return S[t.SETS_END]
    return S[t.ALIASES_END] if table >= t.BY_ALIAS else S[t.RECORDS]


@inlined
def _belongs(S, table, number):  # type: ignore[no-untyped-def]
    if table == t.BY_MEMBERS:  # only the empty set, the first, has the hash 0; and free ones
        return number == 0 or load64(S[t.SET_HASHES], number) != uint64(0)
    if table >= t.BY_ALIAS:
        return load32(S[t.ALIAS_LANES], number) != 0
    held = load32(S[t.HOLDERS], number)
    return held != 0 and (table == t.BY_SEQUENCE or held & t.NAMED != 0)


@inlined
def _is_twice(S, table, number):  # type: ignore[no-untyped-def]
    """Whether the table has an equal entry already; of sets, integrity tells otherwise."""
    if table == t.BY_SEQUENCE:
        return t.find_record(S, table, S[t.SEQUENCES], load64(S[t.SEQUENCES], number)) >= 0
    if table == t.BY_NAME:
        return t.find_record(S, table, S[t.NAMES], load64(S[t.NAMES], number)) >= 0
    if table == t.BY_MEMBERS:
        return False
    value = uint64(load32(S[t.ALIAS_RECORDS], number))
    if table == t.BY_ALIAS:
        value = load64(S[t.ALIAS_NAMES], number)
    return t.find_alias(S, table, load32(S[t.ALIAS_LANES], number) - 1, value) >= 0


@kernel(boolean(WORDS, int64))
def fill_table(S, table):  # type: ignore[no-untyped-def]
    """Fill an empty table with all that belongs there; False if two are equal."""
    count = _numbers(S, table)
    for number in range(count):
        if table <= t.BY_NAME and number + 16 < count:
            t.warm(S, table, t.hash_of(S, table, number + 16))
        if _belongs(S, table, number):
            if _is_twice(S, table, number):
                return False
            t.insert(S, table, t.hash_of(S, table, number), number)
    return True


@kernel(types.void(WORDS, int64))
def begin_table(S, table):  # type: ignore[no-untyped-def]
    """An empty one; its memory is zeros."""
    at = t.TABLES + t.TABLE_WORDS * table
    S[at + t.SEGMENTS], S[at + t.MASK], S[at + t.COUNT] = 1, 1, 0
    t.limit(S, table)


@kernel(boolean(WORDS, int64))
def check_table(S, table):  # type: ignore[no-untyped-def]
    """Whether everything that belongs into the table is found in it."""
    for number in range(_numbers(S, table)):
        if _belongs(S, table, number):
            h = t.hash_of(S, table, number)
            address, slot = t.segment(S, table, h), t.home(h)
            while load32(address, slot) != t.tag(h, S[t.BITS]) | (number + 1):
                if load32(address, slot) == 0:
                    return False
                slot = (slot + 1) & (t.SLOTS - 1)
    return True


@inlined
def _calls_so(S, lane, name):  # type: ignore[no-untyped-def]
    """How many records a lane calls so that have this common name."""
    count = 0
    record = t.find_record(S, t.BY_NAME, S[t.NAMES], name)
    if record >= 0 and calls(S, lane, record):
        count += 1
    record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], name)
    named = record >= 0 and load32(S[t.HOLDERS], record) & t.NAMED != 0
    if record >= 0 and not named and calls(S, lane, record):
        count += 1
    return count


@kernel(boolean(WORDS))
def check_names(S):  # type: ignore[no-untyped-def]
    """Whether no lane has one name for two blocks."""
    for alias in range(S[t.ALIASES_END]):
        lane = load32(S[t.ALIAS_LANES], alias) - 1
        if lane >= 0 and _calls_so(S, lane, load64(S[t.ALIAS_NAMES], alias)) > 0:
            return False
    for record in range(S[t.RECORDS]):
        if load32(S[t.HOLDERS], record) & t.NAMED != 0:
            name = load64(S[t.NAMES], record)
            if t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], name) >= 0:
                for lane in range(64 * S[t.LANE_WORDS]):
                    if _calls_so(S, lane, name) > 1:
                        return False
    return True


@inlined
def _hash_of_members(S, which):  # type: ignore[no-untyped-def]
    h, row = uint64(0), t.row_of(S, which)
    for layer in range(t.LAYERS):
        for word in range(S[t.LANE_WORDS]):
            left = load64(row, layer * S[t.LANE_WORDS] + word)
            while left != uint64(0):
                lane, left = t.members(left, 64 * word)
                h ^= t.member_hash(lane, layer)
    return h


@kernel(boolean(WORDS))
def check_hashes(S):  # type: ignore[no-untyped-def]
    """Whether every set in use has the hash of its members."""
    for which in range(S[t.SETS_END]):
        h = load64(S[t.SET_HASHES], which)
        if h != uint64(0) and h != _hash_of_members(S, which):
            return False
    return True


@kernel(types.void(WORDS, int64))
def hash_sets(S, count):  # type: ignore[no-untyped-def]
    """Give the sets from 1 to `count` their hashes."""
    for which in range(1, count + 1):
        store64(S[t.SET_HASHES], which, _hash_of_members(S, which))


@kernel(types.void(WORDS))
def count_blocks(S):  # type: ignore[no-untyped-def]
    """Count each lane's blocks from the sets; what was counted before must be zero."""
    words = S[t.LANE_WORDS]
    for which in range(1, S[t.SETS_END]):
        if load64(S[t.SET_HASHES], which) != uint64(0):
            references, row = load64(S[t.SET_REFERENCES], which), t.row_of(S, which)
            for layer in range(t.ALIAS_LAYER):
                for word in range(words):
                    left = load64(row, layer * words + word)
                    while left != uint64(0):
                        lane, left = t.members(left, 64 * word)
                        at = lane * t.ALIAS_LAYER + layer
                        store64(S[t.LANE_BLOCKS], at, load64(S[t.LANE_BLOCKS], at) + references)
                        if layer > 0:
                            S[t.LOWER] = 1
