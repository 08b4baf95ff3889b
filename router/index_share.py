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
def _count_moved(S, which, lanes, lane_count, tier, joins, moved):  # type: ignore[no-untyped-def]
    """So many blocks of this set have changed for those lanes that it says otherwise of."""
    for n in range(lane_count):
        lane = load32(lanes, n)
        if t.is_member(S, which, lane, tier) != joins:
            at = S[t.LANE_BLOCKS] + 8 * (lane * t.ALIAS_LAYER + tier)
            change = uint64(moved) if joins else uint64(0) - uint64(moved)
            store64(at, 0, load64(at, 0) + change)


@inlined
def _lacking(S, which, lanes, lane_count, tier):  # type: ignore[no-untyped-def]
    """How many of these lanes are not in a set."""
    count = 0
    for n in range(lane_count):
        if not t.is_member(S, which, load32(lanes, n), tier):
            count += 1
    return count


@inlined
def share(S, lanes, lane_count, tier, joins, sequences, count):  # type: ignore[no-untyped-def]
    """All lanes get, or lose, blocks by sequence hash, from `S[AT_BLOCK]` on, in a pure index.

    The caller made sure of room for them as records. Lost blocks that are not there are counted
    in `S[MISSING]`, by lane.
    """
    source, target, moved, lacking = -1, -1, 0, 0
    first = S[t.AT_BLOCK]
    while first < count:
        last = min(first + _AHEAD, count)
        for n in range(first, last):
            t.warm(S, t.BY_SEQUENCE, t.mixed(load64(sequences, n)))
        for n in range(first, last):
            if not t.has_set_room(S):
                if moved > 0:
                    _count_moved(S, source, lanes, lane_count, tier, joins, moved)
                S[t.AT_BLOCK] = n
                return t.NEEDS_SETS
            sequence = load64(sequences, n)
            record = t.find_record(S, t.BY_SEQUENCE, S[t.SEQUENCES], sequence)
            if record < 0:
                if not joins:
                    S[t.MISSING] += lane_count
                    continue
                record = new_record(S, sequence)
            which = load32(S[t.HOLDERS], record) & t.SET_MASK
            if which != source:
                if moved > 0:
                    _count_moved(S, source, lanes, lane_count, tier, joins, moved)
                source, moved = which, 0
                target = t.set_with(S, which, lanes, lane_count, tier, joins)
                if not joins:
                    lacking = _lacking(S, which, lanes, lane_count, tier)
            S[t.MISSING] += lacking
            if target != source:
                moved += 1
                if load64(S[t.SET_REFERENCES], source) == uint64(1):
                    _count_moved(S, source, lanes, lane_count, tier, joins, moved)
                    t.move(S, record, source, target)
                    source, moved = -1, 0
                else:
                    t.move(S, record, source, target)
                if target == 0:
                    free_record(S, record)
        first = last
    if moved > 0:
        _count_moved(S, source, lanes, lane_count, tier, joins, moved)
    return t.DONE
