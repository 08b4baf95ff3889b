"""The index's memory as its kernels see it, and the hash tables and holder sets in it.

`S`, an array of words, holds counters and the addresses of everything else. *Records* are blocks:
their sequence hash, the name that is common among their holders where that is another (the
engine's own hash), and the set of who holds it. *Sets* of holders are kept once each, however many blocks have them: a bit for each lane
(worker) in each layer (tier). *Aliases* are names of single lanes that differ from the record's
or that another record has taken.

Tables hold 32-bit entries, `tag | number + 1`, probed linearly: the tag, as many bits as the
number leaves, comes from the hash, so that hardly any entry but the right one is followed.
Importing this module imports numba; it is imported by kernels only.
"""

from __future__ import annotations

from typing import Final

from numba import int64, uint64

from runtime.native import inlined, load32, load64, prefetch, store32, store64, trailing_zeros

ALIAS_LAYER: Final = 4
LAYERS: Final = 5
"""G1 to G4, and who knows a block by a name of its own."""

# Words of S.
RECORDS: Final = 0  # how many there may be in this memory
LIVE: Final = 1
CURSOR: Final = 2  # where to look for the next free record
SEQUENCES: Final = 3  # address: uint64 by record
NAMES: Final = 4  # address: uint64 by record, of those that are NAMED
HOLDERS: Final = 5  # address: uint32 by record: its set, and NAMED
SETS: Final = 6
SETS_LIVE: Final = 7
SETS_FREE: Final = 8  # the first free set, or -1
SET_ROWS: Final = 9  # address: uint64 by set, layer, word
SET_REFERENCES: Final = 10  # address: uint64 by set; of a free one the next free
SET_HASHES: Final = 11  # address
LOWER: Final = 12  # whether anything was ever stored below G1
LANE_WORDS: Final = 13
ALIASES: Final = 14
ALIASES_LIVE: Final = 15
ALIASES_FREE: Final = 16  # the first free alias, or -1
ALIAS_NAMES: Final = 17  # address: uint64 by alias
ALIAS_RECORDS: Final = 18  # address: uint32 by alias; of a free one the next free
ALIAS_LANES: Final = 19  # address: uint32 by alias; FREE_LANE of a free one
LANE_BLOCKS: Final = 20  # address: uint64 by lane, tier
MEMO: Final = 21  # the last change of a set: which, what, and what it came to
MEMO_CHANGE: Final = 22
MEMO_RESULT: Final = 23
CAPACITY: Final = 24
LIVE_MAX: Final = 25  # of these many records
ALIASES_MAX: Final = 26
NAMED_LIVE: Final = 27  # records that are NAMED
DYING: Final = 28  # lanes whose worker is gone, and that are in sets still
LANE_NUMBERS: Final = 29  # address: uint32, 0, 1, 2, ...: a lane as an array of one lane
STORED: Final = 30  # blocks, ever
REMOVED: Final = 31
MISSING: Final = 32  # blocks that were to be removed and were not there
AT_EVENT: Final = 33  # where a kernel stopped: the event,
AT_NAME: Final = 34  # its first name
AT_TOKEN: Final = 35  # and token's hash,
AT_LANE: Final = 36  # which of its lanes, or -1
AT_BLOCK: Final = 37  # the block
AT_CHAIN: Final = 38  # the sequence hash before it
AT_WORST: Final = 39  # what came of the event for the lanes before
AT_MISSING: Final = 40  # `MISSING` before the event
TABLES: Final = 41  # for each: address, slots, bits of a number

BY_SEQUENCE: Final = 0
BY_NAME: Final = 1
BY_MEMBERS: Final = 2
BY_ALIAS: Final = 3
BY_OWNER: Final = 4
TABLE_COUNT: Final = 5
WORD_COUNT: Final = TABLES + 3 * TABLE_COUNT

# What came of an event.
DONE: Final = 0
NO_PARENT: Final = 1
FULL: Final = 2
NO_LANE: Final = 3
BROKEN: Final = 4
NOT_FOUND: Final = 5
# What a kernel lacks to go on.
NEEDS_RECORDS: Final = 8
NEEDS_SETS: Final = 9
NEEDS_ALIASES: Final = 10
NEEDS_SWEEP: Final = 11
CLEARING: Final = 12

NAMED: Final = 1 << 31  # the record's common name is not its sequence hash
SET_MASK: Final = NAMED - 1
FREE_LANE: Final = (1 << 32) - 1
SET_ROOM: Final = 10  # more new sets than one block's change can need

_MIX: Final = uint64(0x9E3779B97F4A7C15)
_MIX_AGAIN: Final = uint64(0xBF58476D1CE4E5B9)


@inlined
def mixed(h):  # type: ignore[no-untyped-def]
    h = (h ^ (h >> uint64(32))) * _MIX
    return h ^ (h >> uint64(29))


@inlined
def of_lane(lane, value):  # type: ignore[no-untyped-def]
    """A hash of a value that belongs to one lane."""
    return mixed(value + uint64(lane + 1) * _MIX_AGAIN)


@inlined
def member_hash(lane, layer):  # type: ignore[no-untyped-def]
    """A set's hash is these of its members, xored."""
    h = uint64(lane * 8 + layer + 1) * _MIX
    h = (h ^ (h >> uint64(30))) * _MIX_AGAIN
    return h ^ (h >> uint64(31))


# -- tables ----------------------------------------------------------------------------------


@inlined
def hash_of(S, table, number):  # type: ignore[no-untyped-def]
    """Of an entry that is in the table."""
    if table == BY_SEQUENCE:
        return mixed(load64(S[SEQUENCES], number))
    if table == BY_NAME:
        return mixed(load64(S[NAMES], number))
    if table == BY_MEMBERS:
        return load64(S[SET_HASHES], number)
    lane = load32(S[ALIAS_LANES], number)
    if table == BY_ALIAS:
        return of_lane(lane, load64(S[ALIAS_NAMES], number))
    return of_lane(lane, uint64(load32(S[ALIAS_RECORDS], number)))


@inlined
def home(h, slots):  # type: ignore[no-untyped-def]
    return int64(((h >> uint64(32)) * uint64(slots)) >> uint64(32))


@inlined
def tag(h, bits):  # type: ignore[no-untyped-def]
    return int64((h & uint64(0xFFFFFFFF)) >> uint64(bits)) << bits


@inlined
def warm(S, table, h):  # type: ignore[no-untyped-def]
    at = TABLES + 3 * table
    prefetch(S[at] + 4 * home(h, S[at + 1]))


@inlined
def insert(S, table, h, number):  # type: ignore[no-untyped-def]
    """The caller made sure of room, and that it is not there."""
    at = TABLES + 3 * table
    address, slots, bits = S[at], S[at + 1], S[at + 2]
    slot = home(h, slots)
    while load32(address, slot) != 0:
        slot += 1
        if slot == slots:
            slot = 0
    store32(address, slot, tag(h, bits) | (number + 1))


@inlined
def erase(S, table, h, number):  # type: ignore[no-untyped-def]
    """Take an entry out, and move up those that it had pushed away."""
    at = TABLES + 3 * table
    address, slots, bits = S[at], S[at + 1], S[at + 2]
    hole = home(h, slots)
    wanted = tag(h, bits) | (number + 1)
    while load32(address, hole) != wanted:
        hole += 1
        if hole == slots:
            hole = 0
    slot = hole
    while True:
        slot += 1
        if slot == slots:
            slot = 0
        entry = load32(address, slot)
        if entry == 0:
            break
        mine = home(hash_of(S, table, (entry & ((1 << bits) - 1)) - 1), slots)
        away, gap = slot - mine, slot - hole
        if away < 0:
            away += slots
        if gap < 0:
            gap += slots
        if away >= gap:
            store32(address, hole, entry)
            hole = slot
    store32(address, hole, 0)


@inlined
def find_record(S, table, words, value):  # type: ignore[no-untyped-def]
    """The record whose word at the address `words` is `value`, or -1. Costs a miss or two."""
    h = mixed(value)
    at = TABLES + 3 * table
    address, slots, bits = S[at], S[at + 1], S[at + 2]
    low = (1 << bits) - 1
    wanted = tag(h, bits)
    slot = home(h, slots)
    while True:
        entry = load32(address, slot)
        if entry == 0:
            return -1
        if entry & ~low == wanted:
            number = (entry & low) - 1
            if load64(words, number) == value:
                return number
        slot += 1
        if slot == slots:
            slot = 0


@inlined
def find_alias(S, table, lane, value):  # type: ignore[no-untyped-def]
    """A lane's alias by its name, or by its record; or -1."""
    if S[ALIASES_LIVE] == 0:
        return -1
    h = of_lane(lane, value)
    at = TABLES + 3 * table
    address, slots, bits = S[at], S[at + 1], S[at + 2]
    low = (1 << bits) - 1
    wanted = tag(h, bits)
    slot = home(h, slots)
    while True:
        entry = load32(address, slot)
        if entry == 0:
            return -1
        if entry & ~low == wanted:
            number = (entry & low) - 1
            if load32(S[ALIAS_LANES], number) == lane:
                if table == BY_ALIAS:
                    if load64(S[ALIAS_NAMES], number) == value:
                        return number
                elif uint64(load32(S[ALIAS_RECORDS], number)) == value:
                    return number
        slot += 1
        if slot == slots:
            slot = 0


# -- sets of holders -------------------------------------------------------------------------


@inlined
def row_of(S, which):  # type: ignore[no-untyped-def]
    return S[SET_ROWS] + 8 * which * LAYERS * S[LANE_WORDS]


@inlined
def is_member(S, which, lane, layer):  # type: ignore[no-untyped-def]
    word = load64(row_of(S, which), layer * S[LANE_WORDS] + (lane >> 6))
    return (word >> uint64(lane & 63)) & uint64(1) != uint64(0)


@inlined
def holds(S, which, lane):  # type: ignore[no-untyped-def]
    """In any tier."""
    found = uint64(0)
    for layer in range(ALIAS_LAYER):
        found |= load64(row_of(S, which), layer * S[LANE_WORDS] + (lane >> 6))
    return (found >> uint64(lane & 63)) & uint64(1) != uint64(0)


@inlined
def has_set_room(S):  # type: ignore[no-untyped-def]
    return S[SETS_LIVE] + SET_ROOM <= S[SETS]


@inlined
def _drafted(S, which):  # type: ignore[no-untyped-def]
    """The row of the next free set, with the members of this one."""
    draft, row = row_of(S, S[SETS_FREE]), row_of(S, which)
    for n in range(LAYERS * S[LANE_WORDS]):
        store64(draft, n, load64(row, n))
    return draft


@inlined
def _settled(S, h):  # type: ignore[no-untyped-def]
    """The set equal to the draft, whose hash this is; or the draft, a set without references."""
    draft = row_of(S, S[SETS_FREE])
    words = LAYERS * S[LANE_WORDS]
    at = TABLES + 3 * BY_MEMBERS
    address, slots, bits = S[at], S[at + 1], S[at + 2]
    low = (1 << bits) - 1
    slot = home(h, slots)
    while True:
        entry = load32(address, slot)
        if entry == 0:
            break
        number = (entry & low) - 1
        if entry & ~low == tag(h, bits) and load64(S[SET_HASHES], number) == h:
            other = row_of(S, number)
            same = True
            for n in range(words):
                if load64(other, n) != load64(draft, n):
                    same = False
                    break
            if same:
                return number
        slot += 1
        if slot == slots:
            slot = 0
    result = S[SETS_FREE]
    S[SETS_FREE] = int64(load64(S[SET_REFERENCES], result)) - 1
    S[SETS_LIVE] += 1
    store64(S[SET_HASHES], result, h)
    store64(S[SET_REFERENCES], result, uint64(0))
    insert(S, BY_MEMBERS, h, result)
    return result


@inlined
def changed_set(S, which, lane, layer):  # type: ignore[no-untyped-def]
    """The set with one member turned over: an existing one, or a new one without references."""
    change = lane * 8 + layer
    if S[MEMO] == which and S[MEMO_CHANGE] == change:
        return S[MEMO_RESULT]
    draft = _drafted(S, which)
    turned = layer * S[LANE_WORDS] + (lane >> 6)
    store64(draft, turned, load64(draft, turned) ^ (uint64(1) << uint64(lane & 63)))
    result = _settled(S, load64(S[SET_HASHES], which) ^ member_hash(lane, layer))
    S[MEMO], S[MEMO_CHANGE], S[MEMO_RESULT] = which, change, result
    return result


@inlined
def set_with(S, which, lanes, lane_count, layer, joins):  # type: ignore[no-untyped-def]
    """The set once all these lanes have joined the layer, or have left it."""
    draft, h = _drafted(S, which), load64(S[SET_HASHES], which)
    for n in range(lane_count):
        lane = load32(lanes, n)
        if is_member(S, which, lane, layer) != joins:
            turned = layer * S[LANE_WORDS] + (lane >> 6)
            store64(draft, turned, load64(draft, turned) ^ (uint64(1) << uint64(lane & 63)))
            h ^= member_hash(lane, layer)
    return _settled(S, h)


@inlined
def move(S, record, which, result):  # type: ignore[no-untyped-def]
    """A record from one set to another; a set that nobody has is given up."""
    store32(S[HOLDERS], record, result | (load32(S[HOLDERS], record) & NAMED))
    references = S[SET_REFERENCES]
    store64(references, result, load64(references, result) + uint64(1))
    left = load64(references, which) - uint64(1)
    store64(references, which, left)
    if left == uint64(0):
        erase(S, BY_MEMBERS, load64(S[SET_HASHES], which), which)
        store64(S[SET_HASHES], which, uint64(0))
        store64(references, which, uint64(S[SETS_FREE] + 1))
        S[SETS_FREE] = which
        S[SETS_LIVE] -= 1
        S[MEMO] = -1


@inlined
def turn_over(S, record, lane, layer):  # type: ignore[no-untyped-def]
    """Make a lane a holder in this layer, or end that it is one. The caller made sure of room."""
    which = load32(S[HOLDERS], record) & SET_MASK
    result = changed_set(S, which, lane, layer)
    move(S, record, which, result)
    if layer < ALIAS_LAYER:
        at = lane * ALIAS_LAYER + layer
        one = uint64(1) if is_member(S, result, lane, layer) else uint64(0xFFFFFFFFFFFFFFFF)
        store64(S[LANE_BLOCKS], at, load64(S[LANE_BLOCKS], at) + one)


@inlined
def members(word, lane):  # type: ignore[no-untyped-def]
    """The first lane of a word that is not 0, and the word without it."""
    return lane + trailing_zeros(word), word & (word - uint64(1))
