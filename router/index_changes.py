"""Kernels that change the index: blocks stored and removed, a worker's gone, tables built anew.

A kernel that would run out of room stops before the block it has no room for and says what it
lacks (`S[STOPPED]`); the caller makes room and calls again from there. Each block is applied
wholly or not at all.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import boolean, int64, types, uint64

from router import index_tables as t
from runtime.native import (
    READ_U64,
    WORDS,
    inlined,
    kernel,
    load32,
    load64,
    prefetch,
    store32,
    store64,
)
from runtime.xxh3 import of_two_words

DONE: Final = 0
NO_PARENT: Final = 1
FULL: Final = 2
NEEDS_RECORDS: Final = 3
NEEDS_SETS: Final = 4
NEEDS_ALIASES: Final = 5

_SEED: Final = uint64(1337)
_AHEAD: Final = 32  # blocks whose places are asked for before they are worked on


@inlined
def _named(S, lane, name):  # type: ignore[no-untyped-def]
    """The record that a lane means by a name, or -1."""
    alias = t.find_alias(S, t.BY_ALIAS, lane, name)
    if alias >= 0:
        return load32(S[t.ALIAS_RECORDS], alias)
    record = t.find_record(S, t.BY_NAME, S[t.NAMES], name)
    if record >= 0:
        which = load32(S[t.HOLDERS], record) & t.SET_MASK
        if not t.holds(S, which, lane) or t.is_member(S, which, lane, t.ALIAS_LAYER):
            return -1
    return record


@inlined
def _new_record(S, sequence):  # type: ignore[no-untyped-def]
    """A record without a name and holders. Neighbours in a chain get neighbouring records."""
    holders, end = S[t.HOLDERS], S[t.RECORDS]
    record = S[t.CURSOR]
    while True:
        if record >= end:
            record = 0
        if load32(holders, record) == 0:
            break
        record += 1
    S[t.CURSOR] = record + 1
    S[t.LIVE] += 1
    store64(S[t.SEQUENCES], record, sequence)
    store32(holders, record, t.UNNAMED)
    t.insert(S, t.BY_SEQUENCE, t.mixed(sequence), record)
    return record


@inlined
def _free_if_unheld(S, record):  # type: ignore[no-untyped-def]
    held = load32(S[t.HOLDERS], record)
    if held & t.SET_MASK == 0:
        if held & t.UNNAMED == 0:
            t.erase(S, t.BY_NAME, t.mixed(load64(S[t.NAMES], record)), record)
        t.erase(S, t.BY_SEQUENCE, t.mixed(load64(S[t.SEQUENCES], record)), record)
        store32(S[t.HOLDERS], record, 0)
        S[t.LIVE] -= 1


@inlined
def _add_alias(S, record, lane, name):  # type: ignore[no-untyped-def]
    alias = S[t.ALIASES_FREE]
    S[t.ALIASES_FREE] = load32(S[t.ALIAS_RECORDS], alias) - 1
    S[t.ALIASES_LIVE] += 1
    store64(S[t.ALIAS_NAMES], alias, name)
    store32(S[t.ALIAS_RECORDS], alias, record)
    store32(S[t.ALIAS_LANES], alias, lane)
    t.insert(S, t.BY_ALIAS, t.of_lane(lane, name), alias)
    t.insert(S, t.BY_OWNER, t.of_lane(lane, uint64(record)), alias)
    t.turn_over(S, record, lane, t.ALIAS_LAYER)


@inlined
def _end_alias(S, record, lane):  # type: ignore[no-untyped-def]
    """Of a lane that holds the record, if it has one."""
    which = load32(S[t.HOLDERS], record) & t.SET_MASK
    if t.is_member(S, which, lane, t.ALIAS_LAYER):
        alias = t.find_alias(S, t.BY_OWNER, lane, uint64(record))
        t.erase(S, t.BY_ALIAS, t.of_lane(lane, load64(S[t.ALIAS_NAMES], alias)), alias)
        t.erase(S, t.BY_OWNER, t.of_lane(lane, uint64(record)), alias)
        store32(S[t.ALIAS_LANES], alias, t.FREE_LANE)
        store32(S[t.ALIAS_RECORDS], alias, S[t.ALIASES_FREE] + 1)
        S[t.ALIASES_FREE] = alias
        S[t.ALIASES_LIVE] -= 1
        t.turn_over(S, record, lane, t.ALIAS_LAYER)


@inlined
def _drop(S, record, lane):  # type: ignore[no-untyped-def]
    """A lane holds the record no more, in no tier."""
    _end_alias(S, record, lane)
    for tier in range(t.ALIAS_LAYER):
        if t.is_member(S, load32(S[t.HOLDERS], record) & t.SET_MASK, lane, tier):
            t.turn_over(S, record, lane, tier)
    _free_if_unheld(S, record)


@inlined
def _name(S, record, lane, name):  # type: ignore[no-untyped-def]
    """Give a lane's name to a record it has no name for yet."""
    held = load32(S[t.HOLDERS], record)
    if held & t.UNNAMED != 0:
        if t.find_record(S, t.BY_NAME, S[t.NAMES], name) < 0:
            store64(S[t.NAMES], record, name)
            store32(S[t.HOLDERS], record, held & t.SET_MASK)
            t.insert(S, t.BY_NAME, t.mixed(name), record)
            return
    elif load64(S[t.NAMES], record) == name:
        return
    _add_alias(S, record, lane, name)


@inlined
def _renamed(S, lane, name, sequence, record):  # type: ignore[no-untyped-def]
    """The block's record, once the name means it to the lane and nothing else does."""
    named = _named(S, lane, name)
    if named < 0 or named != record:
        if named >= 0:
            _drop(S, named, lane)  # the engine has given the name to other content
        if record < 0:
            record = _new_record(S, sequence)
        else:
            _end_alias(S, record, lane)  # a lane has one name for a block: the latest
        _name(S, record, lane, name)
    return record


@inlined
def _store_block(S, lane, tier, name, sequence):  # type: ignore[no-untyped-def]
    record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], sequence)
    taken = t.find_record(S, t.BY_NAME, S[t.NAMES], name)
    plain = record == taken and t.find_alias(S, t.BY_ALIAS, lane, name) < 0
    if plain and record < 0:
        record = _new_record(S, sequence)
        store64(S[t.NAMES], record, name)
        store32(S[t.HOLDERS], record, 0)
        t.insert(S, t.BY_NAME, t.mixed(name), record)
    elif plain and S[t.ALIASES_LIVE] == 0:
        pass  # the lane has this name for it, or is about to
    else:
        record = _renamed(S, lane, name, sequence, record)
    if not t.is_member(S, load32(S[t.HOLDERS], record) & t.SET_MASK, lane, tier):
        t.turn_over(S, record, lane, tier)


@inlined
def _lacks(S, lane, name, sequence):  # type: ignore[no-untyped-def]
    """What there is no room of, in the worst case, to store one more block."""
    if not t.has_set_room(S):
        return NEEDS_SETS
    room = S[t.CAPACITY] - S[t.LIVE] - S[t.ALIASES_LIVE]
    if room < 2:
        record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], sequence)
        if room < 1 and (record < 0 or _named(S, lane, name) != record):
            return FULL  # only what needs neither a record nor an alias is still taken
        if record < 0 and t.find_record(S, t.BY_NAME, S[t.NAMES], name) >= 0:
            return FULL  # a new block by another's name needs both
    if S[t.LIVE] >= S[t.LIVE_MAX]:
        return NEEDS_RECORDS
    if S[t.ALIASES_LIVE] >= S[t.ALIASES_MAX]:
        return NEEDS_ALIASES
    return DONE


@kernel(int64(WORDS, int64, int64, boolean, uint64, READ_U64, READ_U64, int64))
def store(S, lane, tier, has_parent, parent, names, tokens, start):  # type: ignore[no-untyped-def]
    """Blocks of one chain from `start` on; returns how far it got, `S[STOPPED]` says why."""
    count = len(names)
    chained, previous = start > 0, uint64(S[t.CHAINED])
    S[t.STOPPED] = DONE
    if tier > 0:
        S[t.LOWER] = 1
    if start == 0 and has_parent:
        record = _named(S, lane, parent)
        if record < 0:
            S[t.STOPPED] = NO_PARENT
            return 0
        chained, previous = True, load64(S[t.SEQUENCES], record)
    ahead = np.empty(_AHEAD, dtype=np.uint64)
    first = start
    while first < count:
        last = min(first + _AHEAD, count)
        before = previous
        for n in range(first, last):
            before = of_two_words(before, tokens[n], 16, _SEED) if chained else tokens[n]
            chained = True
            ahead[n - first] = before
            t.warm(S, t.BY_SEQUENCE, t.mixed(before))
            t.warm(S, t.BY_NAME, t.mixed(names[n]))
        for n in range(first, last):
            sequence = ahead[n - first]
            lacks = _lacks(S, lane, names[n], sequence)
            if lacks != DONE:
                S[t.STOPPED] = lacks
                S[t.CHAINED] = int64(previous)
                return n
            _store_block(S, lane, tier, names[n], sequence)
            previous = sequence
        first = last
    return count


@kernel(int64(WORDS, int64, int64, READ_U64, int64))
def remove(S, lane, tier, names, start):  # type: ignore[no-untyped-def]
    """Names of blocks that left a lane's tier; those that were not there are counted."""
    S[t.STOPPED] = DONE
    for n in range(start, len(names)):
        if not t.has_set_room(S):
            S[t.STOPPED] = NEEDS_SETS
            return n
        if n + 8 < len(names):
            t.warm(S, t.BY_NAME, t.mixed(names[n + 8]))
        record = _named(S, lane, names[n])
        if record < 0 or not t.is_member(S, load32(S[t.HOLDERS], record) & t.SET_MASK, lane, tier):
            S[t.MISSING] += 1
            continue
        t.turn_over(S, record, lane, tier)
        if not t.holds(S, load32(S[t.HOLDERS], record) & t.SET_MASK, lane):
            _end_alias(S, record, lane)
            _free_if_unheld(S, record)
    return len(names)


@kernel(int64(WORDS, int64, int64))
def drop_lane(S, lane, start):  # type: ignore[no-untyped-def]
    """Everything of one lane, from record `start` on; returns how far it got."""
    S[t.STOPPED] = DONE
    for record in range(start, S[t.RECORDS]):
        which = load32(S[t.HOLDERS], record) & t.SET_MASK
        if which != 0 and t.holds(S, which, lane):
            if not t.has_set_room(S):
                S[t.STOPPED] = NEEDS_SETS
                return record
            _drop(S, record, lane)
    return S[t.RECORDS]


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
    return held != 0 and (table == t.BY_SEQUENCE or held & t.UNNAMED == 0)


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
    left_out = 0 if table == t.BY_SEQUENCE else t.UNNAMED
    at = t.TABLES + 3 * table
    address, slots, bits = S[at], S[at + 1], S[at + 2]
    holders, count = S[t.HOLDERS], S[t.RECORDS]
    for number in range(count):
        prefetch(address + 4 * t.home(t.mixed(load64(words, min(number + 24, count - 1))), slots))
        held = load32(holders, number)
        if held != 0 and held & left_out == 0:
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
    """Whether no lane has one name both as an alias and as the record's that it is."""
    for alias in range(S[t.ALIASES]):
        lane = load32(S[t.ALIAS_LANES], alias)
        if lane != t.FREE_LANE:
            name = load64(S[t.ALIAS_NAMES], alias)
            record = t.find_record(S, t.BY_NAME, S[t.NAMES], name)
            if record >= 0:
                which = load32(S[t.HOLDERS], record) & t.SET_MASK
                if t.holds(S, which, lane) and not t.is_member(S, which, lane, t.ALIAS_LAYER):
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
