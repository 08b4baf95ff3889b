"""Many workers gain or lose a block at once, where every name in use is a sequence hash.

A block is looked up once, whoever gets it, and most blocks of an event go from one set of holders
to one other: what a change of sets comes to is worked out once for each run of blocks.
"""

from __future__ import annotations

from typing import Final

from numba import uint64

from router import index_tables as t
from router.index_names import free_record, new_record
from runtime.native import inlined, load32, load64, store64

_AHEAD: Final = 32  # blocks whose places are asked for before they are worked on


@inlined
def _count_moved(S, lanes, lane_count, tier, joins):  # type: ignore[no-untyped-def]
    """Every lane of which `SOURCE` said otherwise has `MOVED` blocks more, or fewer."""
    if S[t.MOVED] > 0:
        for n in range(lane_count):
            lane = load32(lanes, n)
            if t.is_member(S, S[t.SOURCE], lane, tier) != joins:
                at = S[t.LANE_BLOCKS] + 8 * (lane * t.ALIAS_LAYER + tier)
                change = uint64(S[t.MOVED]) if joins else uint64(0) - uint64(S[t.MOVED])
                store64(at, 0, load64(at, 0) + change)
    S[t.SOURCE], S[t.MOVED] = -1, 0


@inlined
def _take_from(S, which, lanes, lane_count, tier, joins):  # type: ignore[no-untyped-def]
    """From here on blocks of this set are changed: to what?"""
    _count_moved(S, lanes, lane_count, tier, joins)
    S[t.SOURCE], S[t.LACKING] = which, 0
    S[t.TARGET] = t.set_with(S, which, lanes, lane_count, tier, joins)
    if not joins:
        for n in range(lane_count):
            if not t.is_member(S, which, load32(lanes, n), tier):
                S[t.LACKING] += 1


@inlined
def _change(S, record, lanes, lane_count, tier, joins):  # type: ignore[no-untyped-def]
    which = load32(S[t.HOLDERS], record) & t.SET_MASK
    if which != S[t.SOURCE]:
        _take_from(S, which, lanes, lane_count, tier, joins)
    S[t.MISSING] += S[t.LACKING]
    target = S[t.TARGET]
    if target != which:
        S[t.MOVED] += 1
        if load64(S[t.SET_REFERENCES], which) == uint64(1):
            _count_moved(S, lanes, lane_count, tier, joins)  # the set is about to be given up
        t.move(S, record, which, target)
        if target == 0:
            free_record(S, record)


@inlined
def share(S, lanes, lane_count, tier, joins, sequences, count):  # type: ignore[no-untyped-def]
    """All lanes get, or lose, blocks by sequence hash, from `S[AT_BLOCK]` on, in a pure index.

    The caller made sure of room for them as records. Lost blocks that are not there are counted
    in `S[MISSING]`, by lane.
    """
    S[t.SOURCE], S[t.MOVED] = -1, 0
    first = S[t.AT_BLOCK]
    while first < count:
        last = min(first + _AHEAD, count)
        for n in range(first, last):
            t.warm(S, t.BY_SEQUENCE, t.mixed(S, load64(sequences, n)))
        for n in range(first, last):
            if not t.has_set_room(S):
                _count_moved(S, lanes, lane_count, tier, joins)
                S[t.AT_BLOCK] = n
                return t.NEEDS_SETS
            sequence = load64(sequences, n)
            record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], sequence)
            if record < 0 and not joins:
                S[t.MISSING] += lane_count
            else:
                if record < 0:
                    record = new_record(S, sequence)
                _change(S, record, lanes, lane_count, tier, joins)
        first = last
    _count_moved(S, lanes, lane_count, tier, joins)
    return t.DONE
