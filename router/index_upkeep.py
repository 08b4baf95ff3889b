"""Kernels for what is put off: workers that are gone are swept out, live records moved together.

A worker that was cleared is in no answer from that moment on, because its lane is nobody's any
more; the lane stays in sets until a pass over all records has taken it out of them. A pass, and
moving records into a smaller memory, are done a little at a time, by the calls that come later.
"""

from __future__ import annotations

from numba import boolean, int64, types, uint64

from router import index_tables as t
from router.index_names import erase_alias, free_record
from runtime.native import WORDS, inlined, kernel, load32, load64, store32, store64

_AHEAD = 16


@inlined
def _is_dying(S, which):  # type: ignore[no-untyped-def]
    """Whether a set has lanes that are to go."""
    words, row = S[t.LANE_WORDS], t.row_of(S, which)
    found = uint64(0)
    for layer in range(t.LAYERS):
        for word in range(words):
            found |= load64(row, layer * words + word) & load64(S[t.DYING_LANES], word)
    return found != uint64(0)


@inlined
def _end_aliases(S, record):  # type: ignore[no-untyped-def]
    """Those of lanes that are to go."""
    words = S[t.LANE_WORDS]
    for word in range(words):
        row = t.row_of(S, load32(S[t.HOLDERS], record) & t.SET_MASK)
        left = load64(row, t.ALIAS_LAYER * words + word) & load64(S[t.DYING_LANES], word)
        while left != uint64(0):
            lane, left = t.members(left, 64 * word)
            erase_alias(S, record, lane)


@inlined
def _without(S, which):  # type: ignore[no-untyped-def]
    """The set without lanes that are to go."""
    words, draft, h = S[t.LANE_WORDS], t.drafted(S, which), load64(S[t.SET_HASHES], which)
    for layer in range(t.LAYERS):
        for word in range(words):
            held = load64(draft, layer * words + word)
            left = held & load64(S[t.DYING_LANES], word)
            store64(draft, layer * words + word, held ^ left)
            while left != uint64(0):
                lane, left = t.members(left, 64 * word)
                h ^= t.member_hash(lane, layer)
    return t.settled(S, h)


@kernel(boolean(WORDS, int64))
def sweep(S, count):  # type: ignore[no-untyped-def]
    """Take `DYING_LANES` out of so many records from `S[SWEEP]` on; False: room for sets lacks."""
    last = min(S[t.SWEEP] + count, S[t.RECORDS])
    clean, source, target = 0, -1, -1  # the empty set is of those that are free
    for record in range(S[t.SWEEP], last):
        S[t.SWEEP] = record
        if record + _AHEAD < last and load32(S[t.HOLDERS], record + _AHEAD) != 0:
            t.warm(S, t.BY_SEQUENCE, t.mixed(S, load64(S[t.SEQUENCES], record + _AHEAD)))
        which = load32(S[t.HOLDERS], record) & t.SET_MASK
        if which != source:
            if which == clean or not _is_dying(S, which):
                clean = which
                continue
            if not t.has_set_room(S):
                return False
            source, target = which, _without(S, which)
        if S[t.ALIASES_LIVE] > 0:
            _end_aliases(S, record)
        if load64(S[t.SET_REFERENCES], which) == uint64(1):
            source = -1
        t.move(S, record, which, target)
        if target == 0:
            free_record(S, record)
    S[t.SWEEP] = last
    return True


@inlined
def _slide_record(S, record, to):  # type: ignore[no-untyped-def]
    """To a free place; whatever names the record by its number names it by the other."""
    held, sequence = load32(S[t.HOLDERS], record), load64(S[t.SEQUENCES], record)
    t.renumber(S, t.BY_SEQUENCE, t.mixed(S, sequence), record, to)
    store64(S[t.SEQUENCES], to, sequence)
    if held & t.NAMED != 0:
        name = load64(S[t.NAMES], record)
        t.renumber(S, t.BY_NAME, t.mixed(S, name), record, to)
        store64(S[t.NAMES], to, name)
    store32(S[t.HOLDERS], to, held)
    store32(S[t.HOLDERS], record, 0)
    row, words = t.row_of(S, held & t.SET_MASK), S[t.LANE_WORDS]
    for word in range(words):
        left = load64(row, t.ALIAS_LAYER * words + word)
        while left != uint64(0):
            lane, left = t.members(left, 64 * word)
            alias = t.find_alias(S, t.BY_OWNER, lane, uint64(record))
            t.erase(S, t.BY_OWNER, t.of_lane(S, lane, uint64(record)), alias)
            store32(S[t.ALIAS_RECORDS], alias, to)
            t.insert(S, t.BY_OWNER, t.of_lane(S, lane, uint64(to)), alias)


@kernel(types.void(WORDS, int64))
def slide(S, count):  # type: ignore[no-untyped-def]
    """Move live ones among so many records from `S[SLIDE]` on, in order, to where `CURSOR` is.

    Ends with `S[SLIDE]` at the last record; from `CURSOR` on all are free then.
    """
    holders, to = S[t.HOLDERS], S[t.CURSOR]
    last = min(S[t.SLIDE] + count, S[t.RECORDS])
    for record in range(S[t.SLIDE], last):
        if load32(holders, record) != 0:
            while to < record and load32(holders, to) != 0:
                to += 1
            if to < record:
                _slide_record(S, record, to)
                to += 1
            else:
                to = max(to, record + 1)
        elif record + _AHEAD < last and load32(holders, record + _AHEAD) != 0:
            t.warm(S, t.BY_SEQUENCE, t.mixed(S, load64(S[t.SEQUENCES], record + _AHEAD)))
    S[t.SLIDE], S[t.CURSOR] = last, to
