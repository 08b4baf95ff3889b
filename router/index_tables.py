"""The index's memory as its kernels see it, and the hash tables and holder sets in it.

`S`, an array of words, holds counters and the addresses of everything else. *Records* are blocks:
their sequence hash, the name that is common among their holders where that is another (the
engine's own hash), and the set of who holds it. *Sets* of holders are kept once each, however
many blocks have them: a bit for each lane (worker) in each layer (tier). *Aliases* are names of
single lanes that differ from the record's common one, or that another record has taken.

Tables hold 32-bit entries, `tag | number + 1`: the tag, as many bits as the number leaves, comes
from the hash, so that hardly any entry but the right one is followed. A table is a row of
*segments* of `SLOTS` entries, each probed linearly within itself. It grows by linear hashing, one
segment at a time: with `m` segments, 2^k <= m < 2^(k+1), an entry's segment are the k + 1 lowest
bits of its hash, or the k lowest if they name one of those that are not there yet; segment m takes
what is its own from segment m - 2^k, or gives it back. So no call waits for a table to be built
anew. Segments are 11/16 full when the first of a round is split and 13/16 when the last is.

What is hashed is salted by a random word of each index: clients choose the tokens, and could fill
one segment otherwise.
Importing this module imports numba; it is imported by kernels only.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import int64, njit, uint64

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
SET_REFERENCES: Final = 10  # address: uint64 by set; of a free one the next free, plus 1
SET_HASHES: Final = 11  # address
LOWER: Final = 12  # whether anything was ever stored below G1
LANE_WORDS: Final = 13
ALIASES: Final = 14  # how many there is memory for
ALIASES_LIVE: Final = 15
ALIASES_FREE: Final = 16  # the first free alias, or -1
ALIASES_END: Final = 17  # from here on none was ever used
ALIAS_NAMES: Final = 18  # address: uint64 by alias
ALIAS_RECORDS: Final = 19  # address: uint32 by alias; of a free one the next free, plus 1
ALIAS_LANES: Final = 20  # address: uint32 by alias, plus 1; of a free one 0
LANE_BLOCKS: Final = 21  # address: uint64 by lane, tier
LANE_NUMBERS: Final = 22  # address: uint32, 0, 1, 2, ...: a lane as an array of one lane
MEMO: Final = 23  # the last change of a set: which, what, and what it came to
MEMO_CHANGE: Final = 24
MEMO_RESULT: Final = 25
CAPACITY: Final = 26
LIVE_MAX: Final = 27  # of these many records
ALIASES_MAX: Final = 28
NAMED_LIVE: Final = 29  # records that are NAMED
DYING: Final = 30  # lanes whose worker is gone, and that are in sets still
DYING_LANES: Final = 31  # address: uint64 by word, those that are being swept
SWEEP: Final = 32  # the record up to which they are
SLIDE: Final = 33  # the record up to which all have moved together, or -1
UPKEEP: Final = 34  # whether there is anything to sweep, or to give back
SPARSE: Final = 35  # below so many live records there is
SETS_END: Final = 36  # from here on none was ever used
BITS: Final = 37  # of a number in a table
SALT: Final = 38
STORED: Final = 39  # blocks, ever
REMOVED: Final = 40
MISSING: Final = 41  # blocks that were to be removed and were not there
AT_EVENT: Final = 42  # where a kernel stopped: the event,
AT_NAME: Final = 43  # its first name
AT_TOKEN: Final = 44  # and token's hash,
AT_LANE: Final = 45  # which of its lanes, or -1
AT_BLOCK: Final = 46  # the block
AT_CHAIN: Final = 47  # the sequence hash before it
AT_WORST: Final = 48  # what came of the event for the lanes before
AT_MISSING: Final = 49  # `MISSING` before the event
SOURCE: Final = 50  # the set that blocks are being taken from, for many workers at once, or -1
TARGET: Final = 51  # the set they go to
MOVED: Final = 52  # how many have gone so and are not counted yet for each worker
LACKING: Final = 53  # how many of the workers are not in `SOURCE`

TABLES: Final = 54  # for each these words:
ADDRESS: Final = 0
SEGMENTS: Final = 1
MASK: Final = 2  # the lowest k + 1 bits
COUNT: Final = 3  # entries
MOST: Final = 4  # of entries, until a segment is split
LEAST: Final = 5  # until one is given back
TABLE_WORDS: Final = 6

BY_SEQUENCE: Final = 0
BY_NAME: Final = 1
BY_MEMBERS: Final = 2
BY_ALIAS: Final = 3
BY_OWNER: Final = 4
TABLE_COUNT: Final = 5
WORD_COUNT: Final = TABLES + TABLE_WORDS * TABLE_COUNT

SLOT_BITS: Final = 12
SLOTS: Final = 1 << SLOT_BITS  # of a segment

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
SET_ROOM: Final = 10  # more new sets than one block's change can need

_MIX: Final = uint64(0x9E3779B97F4A7C15)
_MIX_AGAIN: Final = uint64(0xBF58476D1CE4E5B9)


@inlined
def mixed(S, h):  # type: ignore[no-untyped-def]
    h ^= uint64(S[SALT])
    h = (h ^ (h >> uint64(32))) * _MIX
    return h ^ (h >> uint64(29))


@inlined
def of_lane(S, lane, value):  # type: ignore[no-untyped-def]
    """A hash of a value that belongs to one lane."""
    return mixed(S, value + uint64(lane + 1) * _MIX_AGAIN)


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
        return mixed(S, load64(S[SEQUENCES], number))
    if table == BY_NAME:
        return mixed(S, load64(S[NAMES], number))
    if table == BY_MEMBERS:
        return load64(S[SET_HASHES], number)
    lane = load32(S[ALIAS_LANES], number) - 1
    if table == BY_ALIAS:
        return of_lane(S, lane, load64(S[ALIAS_NAMES], number))
    return of_lane(S, lane, uint64(load32(S[ALIAS_RECORDS], number)))


@inlined
def segment(S, table, h):  # type: ignore[no-untyped-def]
    """The address of an entry's segment."""
    at = TABLES + TABLE_WORDS * table
    number = int64(h & uint64(S[at + MASK]))
    if number >= S[at + SEGMENTS]:
        number &= S[at + MASK] >> 1
    return S[at + ADDRESS] + ((4 * number) << SLOT_BITS)


@inlined
def home(h):  # type: ignore[no-untyped-def]
    """Its slot there, if nothing else took it."""
    return int64(h >> uint64(64 - SLOT_BITS))


@inlined
def tag(h, bits):  # type: ignore[no-untyped-def]
    return int64((h & uint64(0xFFFFFFFF)) >> uint64(bits)) << bits


@inlined
def warm(S, table, h):  # type: ignore[no-untyped-def]
    prefetch(segment(S, table, h) + 4 * home(h))


@inlined
def _place(S, address, h, number):  # type: ignore[no-untyped-def]
    slot = home(h)
    while load32(address, slot) != 0:
        slot = (slot + 1) & (SLOTS - 1)
    store32(address, slot, tag(h, S[BITS]) | (number + 1))


@inlined
def limit(S, table):  # type: ignore[no-untyped-def]
    """How full and how empty a table of so many segments may be."""
    at = TABLES + TABLE_WORDS * table
    whole = (S[at + MASK] + 1) >> 1
    S[at + MOST] = (SLOTS // 16) * (11 * whole + 2 * (S[at + SEGMENTS] - whole))
    S[at + LEAST] = (SLOTS // 8) * S[at + SEGMENTS] if S[at + SEGMENTS] > 1 else 0


@njit(nogil=True)
def _split(S, table):  # type: ignore[no-untyped-def]
    """One segment more, with its share of the one that stood for it."""
    at = TABLES + TABLE_WORDS * table
    low = (1 << S[BITS]) - 1
    number = S[at + SEGMENTS]
    source = S[at + ADDRESS] + ((4 * (number & (S[at + MASK] >> 1))) << SLOT_BITS)
    entries = np.empty(SLOTS, dtype=np.int64)
    count = 0
    for slot in range(SLOTS):
        entry = load32(source, slot)
        if entry != 0:
            entries[count] = (entry & low) - 1
            count += 1
            store32(source, slot, 0)
    S[at + SEGMENTS] = number + 1
    if number == S[at + MASK]:
        S[at + MASK] = 2 * S[at + MASK] + 1
    limit(S, table)
    for n in range(count):
        if n + 16 < count:
            _ask(S, table, entries[n + 16])
        h = hash_of(S, table, entries[n])
        _place(S, segment(S, table, h), h, entries[n])


@njit(nogil=True)
def _merge(S, table):  # type: ignore[no-untyped-def]
    """The last segment goes back to where it came from."""
    at = TABLES + TABLE_WORDS * table
    low = (1 << S[BITS]) - 1
    number = S[at + SEGMENTS] - 1
    source = S[at + ADDRESS] + ((4 * number) << SLOT_BITS)
    S[at + SEGMENTS] = number
    if number < (S[at + MASK] + 1) >> 1:
        S[at + MASK] >>= 1
    limit(S, table)
    for slot in range(SLOTS):
        entry = load32(source, slot)
        if entry != 0:
            store32(source, slot, 0)
            h = hash_of(S, table, (entry & low) - 1)
            _place(S, segment(S, table, h), h, (entry & low) - 1)


@inlined
def _ask(S, table, number):  # type: ignore[no-untyped-def]
    """For what an entry's hash is made of."""
    if table == BY_SEQUENCE:
        prefetch(S[SEQUENCES] + 8 * number)
    elif table == BY_NAME:
        prefetch(S[NAMES] + 8 * number)


@inlined
def insert(S, table, h, number):  # type: ignore[no-untyped-def]
    """The caller made sure of room, and that it is not there."""
    _place(S, segment(S, table, h), h, number)
    at = TABLES + TABLE_WORDS * table
    S[at + COUNT] += 1
    if S[at + COUNT] > S[at + MOST]:
        _split(S, table)


@inlined
def erase(S, table, h, number):  # type: ignore[no-untyped-def]
    """Take an entry out, and move up those that it had pushed away."""
    address, bits = segment(S, table, h), S[BITS]
    low = (1 << bits) - 1
    hole = home(h)
    wanted = tag(h, bits) | (number + 1)
    while load32(address, hole) != wanted:
        hole = (hole + 1) & (SLOTS - 1)
    slot = hole
    while True:
        slot = (slot + 1) & (SLOTS - 1)
        entry = load32(address, slot)
        if entry == 0:
            break
        away = (slot - home(hash_of(S, table, (entry & low) - 1))) & (SLOTS - 1)
        if away >= (slot - hole) & (SLOTS - 1):
            store32(address, hole, entry)
            hole = slot
    store32(address, hole, 0)
    at = TABLES + TABLE_WORDS * table
    S[at + COUNT] -= 1
    if S[at + COUNT] < S[at + LEAST]:
        _merge(S, table)


@inlined
def find_record(S, table, words, value):  # type: ignore[no-untyped-def]
    """The record whose word at the address `words` is `value`, or -1. Costs a miss or two."""
    h = mixed(S, value)
    address, bits = segment(S, table, h), S[BITS]
    low = (1 << bits) - 1
    wanted = tag(h, bits)
    slot = home(h)
    while True:
        entry = load32(address, slot)
        if entry == 0:
            return -1
        if entry & ~low == wanted:
            number = (entry & low) - 1
            if load64(words, number) == value:
                return number
        slot = (slot + 1) & (SLOTS - 1)


@inlined
def renumber(S, table, h, number, to):  # type: ignore[no-untyped-def]
    """An entry's number is another now."""
    address, slot, bits = segment(S, table, h), home(h), S[BITS]
    wanted = tag(h, bits) | (number + 1)
    while load32(address, slot) != wanted:
        slot = (slot + 1) & (SLOTS - 1)
    store32(address, slot, tag(h, bits) | (to + 1))


@inlined
def find_alias(S, table, lane, value):  # type: ignore[no-untyped-def]
    """A lane's alias by its name, or by its record; or -1."""
    if S[ALIASES_LIVE] == 0:
        return -1
    h = of_lane(S, lane, value)
    address, bits = segment(S, table, h), S[BITS]
    low = (1 << bits) - 1
    wanted = tag(h, bits)
    slot = home(h)
    while True:
        entry = load32(address, slot)
        if entry == 0:
            return -1
        if entry & ~low == wanted:
            number = (entry & low) - 1
            if load32(S[ALIAS_LANES], number) == lane + 1:
                if table == BY_ALIAS:
                    if load64(S[ALIAS_NAMES], number) == value:
                        return number
                elif uint64(load32(S[ALIAS_RECORDS], number)) == value:
                    return number
        slot = (slot + 1) & (SLOTS - 1)


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
def _next_set(S):  # type: ignore[no-untyped-def]
    return S[SETS_FREE] if S[SETS_FREE] >= 0 else S[SETS_END]


@inlined
def drafted(S, which):  # type: ignore[no-untyped-def]
    """The row of the next free set, with the members of this one."""
    draft, row = row_of(S, _next_set(S)), row_of(S, which)
    for n in range(LAYERS * S[LANE_WORDS]):
        store64(draft, n, load64(row, n))
    return draft


@inlined
def _is_equal(S, row, other):  # type: ignore[no-untyped-def]
    different = uint64(0)
    for n in range(LAYERS * S[LANE_WORDS]):
        different |= load64(other, n) ^ load64(row, n)
    return different == uint64(0)


@inlined
def settled(S, h):  # type: ignore[no-untyped-def]
    """The set equal to the draft, whose hash this is; or the draft, a set without references."""
    result = _next_set(S)
    address, bits = segment(S, BY_MEMBERS, h), S[BITS]
    low = (1 << bits) - 1
    slot = home(h)
    while True:
        entry = load32(address, slot)
        if entry == 0:
            break
        number = (entry & low) - 1
        alike = entry & ~low == tag(h, bits) and load64(S[SET_HASHES], number) == h
        if alike and _is_equal(S, row_of(S, result), row_of(S, number)):
            return number
        slot = (slot + 1) & (SLOTS - 1)
    if result == S[SETS_END]:
        S[SETS_END] += 1
    else:
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
    draft = drafted(S, which)
    turned = layer * S[LANE_WORDS] + (lane >> 6)
    store64(draft, turned, load64(draft, turned) ^ (uint64(1) << uint64(lane & 63)))
    result = settled(S, load64(S[SET_HASHES], which) ^ member_hash(lane, layer))
    S[MEMO], S[MEMO_CHANGE], S[MEMO_RESULT] = which, change, result
    return result


@inlined
def set_with(S, which, lanes, lane_count, layer, joins):  # type: ignore[no-untyped-def]
    """The set once all these lanes have joined the layer, or have left it."""
    draft, h = drafted(S, which), load64(S[SET_HASHES], which)
    for n in range(lane_count):
        lane = load32(lanes, n)
        if is_member(S, which, lane, layer) != joins:
            turned = layer * S[LANE_WORDS] + (lane >> 6)
            store64(draft, turned, load64(draft, turned) ^ (uint64(1) << uint64(lane & 63)))
            h ^= member_hash(lane, layer)
    return settled(S, h)


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
