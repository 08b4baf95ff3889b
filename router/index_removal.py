"""Kernels that take blocks away, by name.

They stop where they lack room for sets, and go on when called again, as those that store do.
"""

from __future__ import annotations

from numba import int64

from router import index_tables as t
from router.index_names import called, end_alias, free_record, is_pure
from router.index_share import share
from router.index_store import begin
from runtime.native import READ_U64, WORDS, inlined, kernel, load32, load64


@inlined
def _lose(S, record, lane, tier):  # type: ignore[no-untyped-def]
    """A lane that holds the record there holds it there no more."""
    t.turn_over(S, record, lane, tier)
    if not t.holds(S, load32(S[t.HOLDERS], record) & t.SET_MASK, lane):
        end_alias(S, record, lane)
        if load32(S[t.HOLDERS], record) & t.SET_MASK == 0:
            free_record(S, record)


@inlined
def _remove_lane(S, lane, tier, names, count):  # type: ignore[no-untyped-def]
    """Blocks by name, from `S[AT_BLOCK]` on; those that are not there are counted."""
    for n in range(S[t.AT_BLOCK], count):
        if not t.has_set_room(S):
            S[t.AT_BLOCK] = n
            return t.NEEDS_SETS
        if n + 8 < count:
            t.warm(S, t.BY_NAME, t.mixed(S, load64(names, n + 8)))
            t.warm(S, t.BY_SEQUENCE, t.mixed(S, load64(names, n + 8)))
        record = called(S, lane, load64(names, n))
        if record < 0 or not t.is_member(S, load32(S[t.HOLDERS], record) & t.SET_MASK, lane, tier):
            S[t.MISSING] += 1
        else:
            _lose(S, record, lane, tier)
    return t.DONE


@inlined
def remove_lanes(S, lanes, lane_count, tier, names, count):  # type: ignore[no-untyped-def]
    """What came of it, or what is lacking. `S[AT_LANE]` is -1 while all lanes are worked on."""
    if S[t.AT_LANE] < 0 and S[t.AT_BLOCK] == 0:
        S[t.AT_MISSING] = S[t.MISSING]
    if S[t.AT_LANE] < 0 and is_pure(S):
        result = share(S, lanes, lane_count, tier, False, names, count)
        if result != t.DONE:
            return result
    else:
        for n in range(max(0, S[t.AT_LANE]), lane_count):
            S[t.AT_LANE] = n
            result = _remove_lane(S, load32(lanes, n), tier, names, count)
            if result != t.DONE:
                return result
            S[t.AT_BLOCK] = 0
    begin(S)
    missing = S[t.MISSING] - S[t.AT_MISSING]
    S[t.REMOVED] += count * lane_count - missing
    return t.NOT_FOUND if missing > 0 else t.DONE


@kernel(int64(WORDS, int64, int64, READ_U64))
def remove(S, lane, tier, names):  # type: ignore[no-untyped-def]
    """One event of one lane."""
    lanes = S[t.LANE_NUMBERS] + 4 * lane
    return remove_lanes(S, lanes, 1, tier, int64(names.ctypes.data), len(names))
