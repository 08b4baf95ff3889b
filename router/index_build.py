"""Kernels that build the index's tables anew, and that check them."""

from __future__ import annotations

from numba import boolean, int64, types, uint64

from router import index_tables as t
from router.index_names import calls
from runtime.native import WORDS, inlined, kernel, load32, load64, prefetch, store32, store64


@inlined
def _numbers(S, table):  # type: ignore[no-untyped-def]
    """Below this are the numbers of all that may belong into a table."""
    if table == t.BY_MEMBERS:
        return S[t.SETS]
    return S[t.ALIASES] if table >= t.BY_ALIAS else S[t.RECORDS]


@inlined
def _belongs(S, table, number):  # type: ignore[no-untyped-def]
    if table == t.BY_MEMBERS:  # only the empty set, the first, has the hash 0; and free ones
        return number == 0 or load64(S[t.SET_HASHES], number) != uint64(0)
    if table >= t.BY_ALIAS:
        return load32(S[t.ALIAS_LANES], number) != t.FREE_LANE
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
    return t.find_alias(S, table, load32(S[t.ALIAS_LANES], number), value) >= 0


@kernel(types.void(WORDS, int64))
def build_records(S, table):  # type: ignore[no-untyped-def]
    """Fill one of the two empty tables of records, whose entries are known to differ."""
    words = S[t.SEQUENCES] if table == t.BY_SEQUENCE else S[t.NAMES]
    wanted = t.SET_MASK if table == t.BY_SEQUENCE else t.NAMED
    at = t.TABLES + 3 * table
    address, slots, bits = S[at], S[at + 1], S[at + 2]
    holders, count = S[t.HOLDERS], S[t.RECORDS]
    for number in range(count):
        prefetch(address + 4 * t.home(t.mixed(load64(words, min(number + 24, count - 1))), slots))
        held = load32(holders, number)
        if held & wanted != 0:
            h = t.mixed(load64(words, number))
            slot = t.home(h, slots)
            while load32(address, slot) != 0:
                slot += 1
                if slot == slots:
                    slot = 0
            store32(address, slot, t.tag(h, bits) | (number + 1))


@kernel(boolean(WORDS, int64, boolean))
def build_table(S, table, careful):  # type: ignore[no-untyped-def]
    """Fill an empty table with all that belongs there; if careful, False if two are equal."""
    count = _numbers(S, table)
    for number in range(count):
        if table <= t.BY_NAME and number + 16 < count:
            t.warm(S, table, t.hash_of(S, table, number + 16))
        if _belongs(S, table, number):
            if careful and _is_twice(S, table, number):
                return False
            t.insert(S, table, t.hash_of(S, table, number), number)
    return True


@kernel(boolean(WORDS, int64))
def check_table(S, table):  # type: ignore[no-untyped-def]
    """Whether everything that belongs into the table is found in it."""
    for number in range(_numbers(S, table)):
        if _belongs(S, table, number):
            address, slots = S[t.TABLES + 3 * table], S[t.TABLES + 3 * table + 1]
            bits = S[t.TABLES + 3 * table + 2]
            h = t.hash_of(S, table, number)
            slot = t.home(h, slots)
            while load32(address, slot) != t.tag(h, bits) | (number + 1):
                if load32(address, slot) == 0:
                    return False
                slot = slot + 1 if slot + 1 < slots else 0
    return True


@kernel(boolean(WORDS))
def check_names(S):  # type: ignore[no-untyped-def]
    """Whether no lane has one name for two blocks."""
    for alias in range(S[t.ALIASES]):
        lane = load32(S[t.ALIAS_LANES], alias)
        if lane != t.FREE_LANE:
            name = load64(S[t.ALIAS_NAMES], alias)
            record = t.find_record(S, t.BY_NAME, S[t.NAMES], name)
            if record >= 0 and calls(S, lane, record):
                return False
            record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], name)
            if record >= 0 and load32(S[t.HOLDERS], record) & t.NAMED == 0:
                if calls(S, lane, record):
                    return False
    for record in range(S[t.RECORDS]):
        if load32(S[t.HOLDERS], record) & t.NAMED != 0:
            name = load64(S[t.NAMES], record)
            other = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], name)
            if other >= 0 and load32(S[t.HOLDERS], other) & t.NAMED == 0:
                for lane in range(64 * S[t.LANE_WORDS]):
                    if calls(S, lane, record) and calls(S, lane, other):
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
    for which in range(S[t.SETS]):
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
    for which in range(1, S[t.SETS]):
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
