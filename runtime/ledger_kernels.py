"""What `runtime.ledger` does in compiled code: rows found, made, marked, hashed and freed.

`state` holds counts and addresses. A row is six words: key (two), sequence hash of the block
before, place of the hashes of its blocks' tokens (the hash itself where there is one), count, bits,
flags and domain, and the next row of its bucket. There are as many buckets as there ever were rows
(first row + 1, 0 for none); they grow by one at a time, the next in turn being split in two (linear
hashing), so that no call moves everything. Hashes of runs of one length lie in one array
(`CLASS_WORDS` words about each). Free rows and places are linked through their own first word.
Importing this module compiles: seconds, once a machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numba import int64, types, uint64
from numpy.typing import NDArray

from runtime.hashing import SEED
from runtime.native import WORDS, inlined, kernel, load32, load64, store32, store64
from runtime.xxh3 import of_two_words

# Words of `state`.
ROWS: Final = 0  # address
ROW_END: Final = 1  # rows below it have been used
ROW_FREE: Final = 2  # the first free one of those + 1
ROWS_LIVE: Final = 3
TABLE: Final = 4  # address
BUCKETS: Final = 5
HALF: Final = 6  # the largest power of two that is not above BUCKETS
CLASSES: Final = 7  # address
RING: Final = 8  # address
RING_SIZE: Final = 9
RING_HEAD: Final = 10
RING_COUNT: Final = 11
BARE: Final = 12  # rows with a bit and without hashes
BLOCKS: Final = 13  # by bit: blocks of rows that have it
BITS: Final = 8
STATE_WORDS: Final = BLOCKS + BITS

ROW_WORDS: Final = 6
CLASS_WORDS: Final = 4  # address, end, first free place + 1, how many are free
RUN_WORDS: Final = 5  # domain, whether there is a block before, its name, first block, blocks
NOTE_WORDS: Final = 3  # before the hashes: version, parent?, count; domain; parent

_COUNT: Final = 0xFFFF
_BITS_AT: Final = 16
_USED: Final = 1 << 24
_PARENT: Final = 1 << 25
_QUEUED: Final = 1 << 26
_MIX: Final = uint64(0x9E3779B97F4A7C15)
_STEP: Final = uint64(0xC2B2AE3D27D4EB4F)
_SEED: Final = uint64(SEED)
_ZERO: Final = uint64(0)
_I64: Final = types.int64

Change = Callable[[NDArray[np.int64], int, int, int, int], int]


@inlined
def _bucket(state, low, high):  # type: ignore[no-untyped-def]
    hashed = int64(((low ^ (high * _STEP)) * _MIX) >> uint64(32))
    half = state[HALF]
    bucket = hashed & (2 * half - 1)
    return bucket if bucket < state[BUCKETS] else bucket - half


@inlined
def _next(state, row):  # type: ignore[no-untyped-def]
    return load32(state[ROWS], 2 * (row * ROW_WORDS + 5)) - 1


@inlined
def _set_next(state, row, other):  # type: ignore[no-untyped-def]
    store32(state[ROWS], 2 * (row * ROW_WORDS + 5), other + 1)


@inlined
def _found(state, low, high):  # type: ignore[no-untyped-def]
    """The key's row, or -1."""
    rows = state[ROWS]
    row = load32(state[TABLE], _bucket(state, low, high)) - 1
    while row >= 0:
        if load64(rows, row * ROW_WORDS) == low and load64(rows, row * ROW_WORDS + 1) == high:
            return row
        row = _next(state, row)
    return row


@inlined
def _split(state):  # type: ignore[no-untyped-def]
    """One more bucket; its rows are some of those that are in the one in turn."""
    rows, table, half = state[ROWS], state[TABLE], state[HALF]
    last = state[BUCKETS]
    row = load32(table, last - half) - 1
    store32(table, last - half, 0)
    store32(table, last, 0)
    state[BUCKETS] += 1
    if state[BUCKETS] == 2 * half:
        state[HALF] = 2 * half
    while row >= 0:
        following = _next(state, row)
        base = row * ROW_WORDS
        bucket = _bucket(state, load64(rows, base), load64(rows, base + 1))
        _set_next(state, row, load32(table, bucket) - 1)
        store32(table, bucket, row + 1)
        row = following


@inlined
def _meta(state, row):  # type: ignore[no-untyped-def]
    return load32(state[ROWS], 2 * (row * ROW_WORDS + 4))


@inlined
def _set_meta(state, row, meta):  # type: ignore[no-untyped-def]
    store32(state[ROWS], 2 * (row * ROW_WORDS + 4), meta)


@inlined
def _domain(state, row):  # type: ignore[no-untyped-def]
    return load32(state[ROWS], 2 * (row * ROW_WORDS + 4) + 1)


@inlined
def _made(state, low, high):  # type: ignore[no-untyped-def]
    """The key's row, made if there is none. There is room for one."""
    found = _found(state, low, high)
    if found >= 0:
        return found
    rows = state[ROWS]
    row = state[ROW_FREE] - 1
    if row >= 0:
        state[ROW_FREE] = int64(load64(rows, row * ROW_WORDS))
    else:
        row = state[ROW_END]
        state[ROW_END] += 1
    state[ROWS_LIVE] += 1
    if state[ROWS_LIVE] > state[BUCKETS]:
        _split(state)
    store64(rows, row * ROW_WORDS, low)
    store64(rows, row * ROW_WORDS + 1, high)
    store64(rows, row * ROW_WORDS + 2, _ZERO)
    store64(rows, row * ROW_WORDS + 3, _ZERO)
    store64(rows, row * ROW_WORDS + 4, uint64(_USED))
    bucket = _bucket(state, low, high)
    _set_next(state, row, load32(state[TABLE], bucket) - 1)
    store32(state[TABLE], bucket, row + 1)
    return row


@inlined
def _hashes(state, row, count):  # type: ignore[no-untyped-def]
    """Where its blocks' hashes are."""
    own = state[ROWS] + 8 * (row * ROW_WORDS + 3)
    if count == 1:
        return own
    pool = int64(load64(state[CLASSES], CLASS_WORDS * count))
    return pool + 8 * count * int64(load64(own, 0))


@inlined
def _take_place(state, row, count):  # type: ignore[no-untyped-def]
    """Room for its hashes; there is some."""
    if count > 1:
        classes = state[CLASSES]
        pool = int64(load64(classes, CLASS_WORDS * count))
        place = int64(load64(classes, CLASS_WORDS * count + 2)) - 1
        if place >= 0:
            store64(classes, CLASS_WORDS * count + 2, load64(pool, place * count))
            free = load64(classes, CLASS_WORDS * count + 3)
            store64(classes, CLASS_WORDS * count + 3, free - uint64(1))
        else:
            place = int64(load64(classes, CLASS_WORDS * count + 1))
            store64(classes, CLASS_WORDS * count + 1, uint64(place + 1))
        store64(state[ROWS], row * ROW_WORDS + 3, uint64(place))
    return _hashes(state, row, count)


@inlined
def _queue(state, row, meta):  # type: ignore[no-untyped-def]
    """It has no bit: it is forgotten when enough others have none either. There is room."""
    if meta & _QUEUED == 0:
        at = (state[RING_HEAD] + state[RING_COUNT]) % state[RING_SIZE]
        store32(state[RING], at, row)
        state[RING_COUNT] += 1
        _set_meta(state, row, meta | _QUEUED)


@inlined
def _free(state, row):  # type: ignore[no-untyped-def]
    """Forget a row."""
    rows, table = state[ROWS], state[TABLE]
    bucket = _bucket(state, load64(rows, row * ROW_WORDS), load64(rows, row * ROW_WORDS + 1))
    other = load32(table, bucket) - 1
    if other == row:
        store32(table, bucket, _next(state, row) + 1)
    else:
        while _next(state, other) != row:
            other = _next(state, other)
        _set_next(state, other, _next(state, row))
    count = _meta(state, row) & _COUNT
    if count > 1:
        classes = state[CLASSES]
        store64(_hashes(state, row, count), 0, load64(classes, CLASS_WORDS * count + 2))
        place = load64(rows, row * ROW_WORDS + 3)
        store64(classes, CLASS_WORDS * count + 2, place + uint64(1))
        free = load64(classes, CLASS_WORDS * count + 3)
        store64(classes, CLASS_WORDS * count + 3, free + uint64(1))
    store64(rows, row * ROW_WORDS, uint64(state[ROW_FREE]))
    store64(rows, row * ROW_WORDS + 4, _ZERO)
    state[ROW_FREE] = row + 1
    state[ROWS_LIVE] -= 1


@inlined
def _count_blocks(state, bits, count):  # type: ignore[no-untyped-def]
    for bit in range(BITS):
        if bits >> bit & 1:
            state[BLOCKS + bit] += count


@kernel(_I64(WORDS, _I64, _I64, _I64, _I64, _I64, _I64))
def learn(state, count, keys, notes, width, domains, late):  # type: ignore[no-untyped-def]
    """Give rows their hashes: `width` words a note. How many rows had a bit before, their numbers
    among `keys` written to `late`."""
    found = 0
    for n in range(count):
        row = _made(state, load64(keys, 2 * n), load64(keys, 2 * n + 1))
        meta = _meta(state, row)
        if meta & _COUNT:
            continue
        note = notes + 8 * width * n
        blocks = width - NOTE_WORDS
        hashes = _take_place(state, row, blocks)
        for block in range(blocks):
            store64(hashes, block, load64(note, NOTE_WORDS + block))
        store64(state[ROWS], row * ROW_WORDS + 2, load64(note, 2))
        meta |= blocks
        if load64(note, 0) >> uint64(8) & uint64(0xFF):
            meta |= _PARENT
        store32(state[ROWS], 2 * (row * ROW_WORDS + 4) + 1, load32(domains, n))
        _set_meta(state, row, meta)
        bits = meta >> _BITS_AT & 0xFF
        if bits:
            state[BARE] -= 1
            _count_blocks(state, bits, blocks)
            store64(late, found, uint64(n))
            found += 1
        else:
            _queue(state, row, meta)
    return found


@kernel(_I64(WORDS, _I64, _I64, _I64, _I64))
def mark(state, bit, count, keys, out):  # type: ignore[no-untyped-def]
    """Set a bit; rows are made where there are none. How many have hashes and had not this bit,
    their rows written to `out`."""
    found = 0
    for n in range(count):
        row = _made(state, load64(keys, 2 * n), load64(keys, 2 * n + 1))
        meta = _meta(state, row)
        if meta >> (_BITS_AT + bit) & 1:
            continue
        _set_meta(state, row, meta | int64(1) << (_BITS_AT + bit))
        blocks = meta & _COUNT
        if blocks:
            state[BLOCKS + bit] += blocks
            store64(out, found, uint64(row))
            found += 1
        elif meta >> _BITS_AT & 0xFF == 0:
            state[BARE] += 1
    return found


@kernel(_I64(WORDS, _I64, _I64, _I64, _I64))
def clear(state, bit, count, keys, out):  # type: ignore[no-untyped-def]
    """Take a bit back. How many had it and have hashes, their rows written to `out`: they are good
    until the next `trim`."""
    found = 0
    for n in range(count):
        row = _found(state, load64(keys, 2 * n), load64(keys, 2 * n + 1))
        if row < 0:
            continue
        meta = _meta(state, row)
        if meta >> (_BITS_AT + bit) & 1 == 0:
            continue
        meta &= ~(int64(1) << (_BITS_AT + bit))
        _set_meta(state, row, meta)
        blocks = meta & _COUNT
        if blocks:
            state[BLOCKS + bit] -= blocks
            store64(out, found, uint64(row))
            found += 1
        if meta >> _BITS_AT & 0xFF == 0:
            if not blocks:
                state[BARE] -= 1
            _queue(state, row, meta)
    return found


@kernel(types.void(WORDS, _I64))
def trim(state, slack):  # type: ignore[no-untyped-def]
    """Forget rows without a bit, but for about the latest `slack`."""
    while state[RING_COUNT] > slack:
        row = load32(state[RING], state[RING_HEAD])
        state[RING_HEAD] = (state[RING_HEAD] + 1) % state[RING_SIZE]
        state[RING_COUNT] -= 1
        meta = _meta(state, row) & ~_QUEUED
        _set_meta(state, row, meta)
        if meta >> _BITS_AT & 0xFF == 0:
            _free(state, row)


@kernel(types.void(WORDS, _I64, _I64, _I64))
def find(state, count, keys, out):  # type: ignore[no-untyped-def]
    """Each key's row, or -1."""
    for n in range(count):
        store64(out, n, uint64(_found(state, load64(keys, 2 * n), load64(keys, 2 * n + 1))))


@inlined
def _chained(parent, meta, hash_):  # type: ignore[no-untyped-def]
    """The first block's name."""
    return of_two_words(parent, hash_, 16, _SEED) if meta & _PARENT else hash_


@kernel(types.uint64(WORDS, _I64))
def end_of(state, row):  # type: ignore[no-untyped-def]
    """The name of its last block; it has one."""
    meta = _meta(state, row)
    blocks = meta & _COUNT
    hashes = _hashes(state, row, blocks)
    name = _chained(load64(state[ROWS], row * ROW_WORDS + 2), meta, load64(hashes, 0))
    for block in range(1, blocks):
        name = of_two_words(name, load64(hashes, block), 16, _SEED)
    return name


@kernel(_I64(WORDS, _I64, _I64))
def count_blocks(state, count, rows):  # type: ignore[no-untyped-def]
    total = 0
    for n in range(count):
        total += _meta(state, int64(load64(rows, n))) & _COUNT
    return total


@kernel(_I64(WORDS, _I64, _I64, _I64, _I64, _I64, _I64, _I64))
def join(state, count, rows, chained, most, names, tokens, runs):  # type: ignore[no-untyped-def]
    """Names and tokens' hashes of all blocks, and how many runs they are: of one domain, `most`
    blocks unless one row has more, and if `chained` each block following the one before it."""
    run = -1
    written = 0
    name = _ZERO
    for n in range(count):
        row = int64(load64(rows, n))
        meta = _meta(state, row)
        parent = load64(state[ROWS], row * ROW_WORDS + 2)
        blocks = meta & _COUNT
        domain = _domain(state, row)
        base = runs + 8 * RUN_WORDS * run
        if (
            run < 0
            or int64(load64(base, 0)) != domain
            or int64(load64(base, 4)) + blocks > most
            or (chained and (meta & _PARENT == 0 or parent != name))
        ):
            run += 1
            base = runs + 8 * RUN_WORDS * run
            store64(base, 0, uint64(domain))
            store64(base, 1, uint64(1 if meta & _PARENT else 0))
            store64(base, 2, parent)
            store64(base, 3, uint64(written))
            store64(base, 4, _ZERO)
        hashes = _hashes(state, row, blocks)
        for block in range(blocks):
            hash_ = load64(hashes, block)
            follows = of_two_words(name, hash_, 16, _SEED)
            name = follows if block else _chained(parent, meta, hash_)
            store64(names, written, name)
            store64(tokens, written, hash_)
            written += 1
        store64(base, 4, load64(base, 4) + uint64(blocks))
    return run + 1


@kernel(_I64(WORDS, _I64, _I64, _I64, _I64))
def count_groups(state, start, most, bits, groups):  # type: ignore[no-untyped-def]
    """Add to `groups` (domain x `bits` + bit) the blocks of rows from `start` on; where to go on,
    which is after about `most` blocks or at the end."""
    total = 0
    row = start
    while row < state[ROW_END] and total < most:
        meta = _meta(state, row)
        blocks = meta & _COUNT
        for bit in range(bits):
            if meta >> (_BITS_AT + bit) & 1:
                group = _domain(state, row) * bits + bit
                store64(groups, group, load64(groups, group) + uint64(blocks))
                total += blocks
        row += 1
        if not blocks:
            total += 1  # passing it takes time too
    return row


@kernel(types.void(WORDS, _I64, _I64, _I64, _I64, _I64, _I64))
def fill_groups(state, start, end, bits, places, parents, tokens):  # type: ignore[no-untyped-def]
    """Write each block's parent (0: none) and tokens' hash at its group's next place."""
    for row in range(start, end):
        meta = _meta(state, row)
        blocks = meta & _COUNT
        held = meta >> _BITS_AT & 0xFF
        if not blocks or not held:
            continue
        hashes = _hashes(state, row, blocks)
        first = load64(state[ROWS], row * ROW_WORDS + 2) if meta & _PARENT else _ZERO
        for bit in range(bits):
            if held >> bit & 1 == 0:
                continue
            group = _domain(state, row) * bits + bit
            at = int64(load64(places, group))
            parent = first
            for block in range(blocks):
                hash_ = load64(hashes, block)
                store64(parents, at, parent)
                store64(tokens, at, hash_)
                if block or meta & _PARENT:
                    parent = of_two_words(parent, hash_, 16, _SEED)
                else:
                    parent = hash_
                at += 1
            store64(places, group, uint64(at))
