"""The kernel that applies many events of many workers in one call."""

from __future__ import annotations

from typing import Final

from numba import int64, types, uint64

from router import index_tables as t
from router.index_removal import remove_lanes
from router.index_store import is_evident, store_lanes
from runtime.native import READ_U32, READ_U64, WORDS, kernel

STORED: Final = 0
REMOVED: Final = 1
CLEARED: Final = 2
BROKEN: Final = 3  # as many names as tokens' hashes are needed
HEAD_WORDS: Final = 6
"""kind, group of workers, tier, number of blocks, whether there is a parent, the parent"""


@kernel(
    int64(WORDS, READ_U64, READ_U64, READ_U64, WORDS, READ_U32, types.Array(types.uint8, 1, "C"))
)
def apply(S, heads, names, tokens, groups, lanes, outcomes):  # type: ignore[no-untyped-def]
    """Events from `S[AT_EVENT]` on; what is lacking, or `CLEARING` at one that is not done here.

    `names` and `tokens` are those of all events one behind the other, `groups` gives each group
    three words: where its lanes begin, how many there are, whether all its workers have one.
    """
    named, hashed = int64(names.ctypes.data), int64(tokens.ctypes.data)
    while S[t.AT_EVENT] < len(outcomes):
        event = S[t.AT_EVENT]
        head = HEAD_WORDS * event
        kind, group, tier = int64(heads[head]), 3 * int64(heads[head + 1]), int64(heads[head + 2])
        count = int64(heads[head + 3])
        at, lane_count = int64(lanes.ctypes.data) + 4 * groups[group], groups[group + 1]
        here, whole = named + 8 * S[t.AT_NAME], groups[group + 2] != 0
        result = t.DONE
        if kind == STORED:
            there = hashed + 8 * S[t.AT_TOKEN]
            if whole:
                chain = (heads[head + 4] != uint64(0), heads[head + 5], here, there, count)
                result = store_lanes(S, at, lane_count, tier, is_evident(chain), chain)
            else:
                result = t.NO_LANE
            if result < t.NEEDS_RECORDS:
                S[t.AT_TOKEN] += count
        elif kind == REMOVED:
            result = remove_lanes(S, at, lane_count, tier, here, count)
            if result == t.DONE and count > 0 and not whole:
                result = t.NOT_FOUND
        elif kind == CLEARED:
            return t.CLEARING
        else:
            result = t.BROKEN
        if result >= t.NEEDS_RECORDS:
            return result
        outcomes[event] = result
        S[t.AT_NAME] += count
        S[t.AT_EVENT] += 1
    return t.DONE
