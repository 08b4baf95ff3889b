"""Records and what lanes call them.

A record's common name, the one that its holders use unless they have an alias, is its sequence
hash; that costs nothing, the table of sequence hashes finds it. If the first to store a block has
another name for it, that is the common one (the record is `NAMED`) and in a table of its own.

What a lane means by a name is therefore one of three: its alias; the record of this common name,
or the record of this sequence hash, if the lane holds it and has no alias for it. Never two of
them: giving a name to a block takes it from any other of the same lane.
"""

from __future__ import annotations

from numba import uint64

from router import index_tables as t
from runtime.native import inlined, load32, load64, store32, store64


@inlined
def is_pure(S):  # type: ignore[no-untyped-def]
    """Every name in use is a sequence hash."""
    return S[t.NAMED_LIVE] == 0 and S[t.ALIASES_LIVE] == 0


@inlined
def calls(S, lane, record):  # type: ignore[no-untyped-def]
    """Whether a lane holds a record and calls it by its common name."""
    which = load32(S[t.HOLDERS], record) & t.SET_MASK
    return t.holds(S, which, lane) and not t.is_member(S, which, lane, t.ALIAS_LAYER)


@inlined
def called(S, lane, name):  # type: ignore[no-untyped-def]
    """The record that a lane means by a name, or -1."""
    alias = t.find_alias(S, t.BY_ALIAS, lane, name)
    if alias >= 0:
        return load32(S[t.ALIAS_RECORDS], alias)
    if S[t.NAMED_LIVE] > 0:
        record = t.find_record(S, t.BY_NAME, S[t.NAMES], name)
        if record >= 0 and calls(S, lane, record):
            return record
    if S[t.NAMED_LIVE] < S[t.LIVE]:
        record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], name)
        named = record >= 0 and load32(S[t.HOLDERS], record) & t.NAMED != 0
        if record >= 0 and not named and calls(S, lane, record):
            return record
    return -1


@inlined
def is_common(S, record, name):  # type: ignore[no-untyped-def]
    if load32(S[t.HOLDERS], record) & t.NAMED != 0:
        return load64(S[t.NAMES], record) == name
    return load64(S[t.SEQUENCES], record) == name


@inlined
def new_record(S, sequence):  # type: ignore[no-untyped-def]
    """Without holders: free again unless it gets one. Neighbours in a chain are neighbours."""
    holders, end = S[t.HOLDERS], S[t.RECORDS]
    record = S[t.CURSOR]
    while True:
        if record >= end:
            record = 0
            S[t.SLIDE] = -1
        if load32(holders, record) == 0:
            break
        record += 1
    S[t.CURSOR] = record + 1
    S[t.LIVE] += 1
    store64(S[t.SEQUENCES], record, sequence)
    t.insert(S, t.BY_SEQUENCE, t.mixed(S, sequence), record)
    return record


@inlined
def make_common(S, record, name):  # type: ignore[no-untyped-def]
    """Of a record without holders and a name that is no record's."""
    S[t.NAMED_LIVE] += 1
    store64(S[t.NAMES], record, name)
    store32(S[t.HOLDERS], record, t.NAMED)
    t.insert(S, t.BY_NAME, t.mixed(S, name), record)


@inlined
def free_record(S, record):  # type: ignore[no-untyped-def]
    """Nobody holds it any more."""
    if load32(S[t.HOLDERS], record) & t.NAMED != 0:
        S[t.NAMED_LIVE] -= 1
        t.erase(S, t.BY_NAME, t.mixed(S, load64(S[t.NAMES], record)), record)
    t.erase(S, t.BY_SEQUENCE, t.mixed(S, load64(S[t.SEQUENCES], record)), record)
    store32(S[t.HOLDERS], record, 0)
    S[t.LIVE] -= 1
    if S[t.LIVE] < S[t.SPARSE]:
        S[t.UPKEEP] = 1


@inlined
def add_alias(S, record, lane, name):  # type: ignore[no-untyped-def]
    alias = S[t.ALIASES_FREE]
    if alias >= 0:
        S[t.ALIASES_FREE] = load32(S[t.ALIAS_RECORDS], alias) - 1
    else:
        alias = S[t.ALIASES_END]
        S[t.ALIASES_END] += 1
    S[t.ALIASES_LIVE] += 1
    store64(S[t.ALIAS_NAMES], alias, name)
    store32(S[t.ALIAS_RECORDS], alias, record)
    store32(S[t.ALIAS_LANES], alias, lane + 1)
    t.insert(S, t.BY_ALIAS, t.of_lane(S, lane, name), alias)
    t.insert(S, t.BY_OWNER, t.of_lane(S, lane, uint64(record)), alias)
    t.turn_over(S, record, lane, t.ALIAS_LAYER)


@inlined
def erase_alias(S, record, lane):  # type: ignore[no-untyped-def]
    """A lane's name for a record that has one; the record's set does not know yet."""
    alias = t.find_alias(S, t.BY_OWNER, lane, uint64(record))
    t.erase(S, t.BY_ALIAS, t.of_lane(S, lane, load64(S[t.ALIAS_NAMES], alias)), alias)
    t.erase(S, t.BY_OWNER, t.of_lane(S, lane, uint64(record)), alias)
    store32(S[t.ALIAS_LANES], alias, 0)
    store32(S[t.ALIAS_RECORDS], alias, S[t.ALIASES_FREE] + 1)
    S[t.ALIASES_FREE] = alias
    S[t.ALIASES_LIVE] -= 1


@inlined
def end_alias(S, record, lane):  # type: ignore[no-untyped-def]
    """Of a lane that holds the record, if it has one."""
    which = load32(S[t.HOLDERS], record) & t.SET_MASK
    if t.is_member(S, which, lane, t.ALIAS_LAYER):
        erase_alias(S, record, lane)
        t.turn_over(S, record, lane, t.ALIAS_LAYER)


@inlined
def drop(S, record, lane):  # type: ignore[no-untyped-def]
    """A lane holds the record no more, in no tier."""
    end_alias(S, record, lane)
    for tier in range(t.ALIAS_LAYER):
        if t.is_member(S, load32(S[t.HOLDERS], record) & t.SET_MASK, lane, tier):
            t.turn_over(S, record, lane, tier)
    if load32(S[t.HOLDERS], record) & t.SET_MASK == 0:
        free_record(S, record)


@inlined
def give_name(S, lane, name, sequence, record):  # type: ignore[no-untyped-def]
    """The block's record, once the name means it to the lane and nothing else does."""
    named = called(S, lane, name)
    if named >= 0 and named == record:
        return record
    if named >= 0:
        drop(S, named, lane)  # the engine has given the name to other content
    if record < 0:
        record = new_record(S, sequence)
        if name != sequence and t.find_record(S, t.BY_NAME, S[t.NAMES], name) < 0:
            make_common(S, record, name)
    else:
        end_alias(S, record, lane)  # a lane has one name for a block: the latest
    if not is_common(S, record, name):
        add_alias(S, record, lane, name)
    return record
