"""The index's arrays: they nearly double when full and go back to the system when mostly empty.

`state` is the word array that kernels take (`index_tables.S`). Between kernels every array is
reachable from here; a kernel runs to its end before the next resize, so addresses in `state` are
always those of live arrays.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from router import index_build as build
from router import index_tables as t
from runtime.native import address, zeros

RECORDS_MIN: Final = 64
SETS_MIN: Final = 32
ALIASES_MIN: Final = 16
CAPACITY_MAX: Final = 1 << 30
WORD_LANES: Final = 64

_BIG: Final = 1 << 16
_PINNED: Final = 1 << 60  # references of the empty set, which is never given up

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]


class IndexMemory:
    """Room for `capacity` blocks at most, names of their own included."""

    def __init__(self, capacity: int) -> None:
        assert 0 < capacity <= CAPACITY_MAX
        self.state: NDArray[np.int64] = np.zeros(t.WORD_COUNT, dtype=np.int64)
        self.state[t.CAPACITY] = capacity
        self.state[t.LANE_WORDS] = 1
        self.state[t.AT_LANE] = -1
        self.tables: list[U32] = [zeros(1, np.uint32) for _ in range(t.TABLE_COUNT)]
        self.sequences: U64 = zeros(0, np.uint64)
        self.names: U64 = zeros(0, np.uint64)
        self.holders: U32 = zeros(0, np.uint32)
        self.rows: U64 = zeros(0, np.uint64)
        self.references: U64 = zeros(0, np.uint64)
        self.set_hashes: U64 = zeros(0, np.uint64)
        self.alias_names: U64 = zeros(0, np.uint64)
        self.alias_records: U32 = zeros(0, np.uint32)
        self.alias_lanes: U32 = zeros(0, np.uint32)
        self.lane_blocks: U64 = zeros(WORD_LANES * t.ALIAS_LAYER, np.uint64)
        self.lane_numbers: U32 = np.arange(WORD_LANES, dtype=np.uint32)
        self._publish()
        self.resize_aliases(ALIASES_MIN)
        self.resize_sets(SETS_MIN)
        self.resize_records(RECORDS_MIN)

    @property
    def live(self) -> int:
        return int(self.state[t.LIVE])

    @property
    def row_words(self) -> int:
        return t.LAYERS * int(self.state[t.LANE_WORDS])

    @property
    def allocated_bytes(self) -> int:
        """Address space of all arrays; pages never touched cost nothing."""
        return sum(array.nbytes for array in self._arrays())

    def make_room(self, lacking: int) -> None:
        """After a kernel stopped for this reason."""
        if lacking == t.NEEDS_RECORDS:
            self.resize_records(_grown(len(self.sequences)))
        elif lacking == t.NEEDS_SETS:
            self.resize_sets(_grown(len(self.references)))
        else:
            assert lacking == t.NEEDS_ALIASES
            self.resize_aliases(_grown(len(self.alias_names)))

    def give_back(self) -> None:
        """Shrink what is mostly empty. Costs as much as the removals that made it so."""
        if _is_sparse(self.live, len(self.sequences), RECORDS_MIN):
            self.resize_records(max(RECORDS_MIN, 2 * self.live))
        sets = int(self.state[t.SETS_LIVE])
        if _is_sparse(sets, len(self.references), SETS_MIN):
            self.resize_sets(max(SETS_MIN, 2 * sets))
        aliases = int(self.state[t.ALIASES_LIVE])
        if _is_sparse(aliases, len(self.alias_names), ALIASES_MIN):
            self.resize_aliases(max(ALIASES_MIN, 2 * aliases))

    def resize_records(self, count: int) -> None:
        """To fewer: the live ones move together, in their order."""
        self._drop_tables(t.BY_SEQUENCE, t.BY_NAME)
        if count < len(self.sequences):
            live = np.flatnonzero(self.holders)
            moved = zeros(len(self.holders), np.uint32)
            moved[live] = np.arange(len(live), dtype=np.uint32)
            used = self.alias_lanes != t.FREE_LANE
            self.alias_records[used] = moved[self.alias_records[used]]
            kept: Any = live
            self.state[t.CURSOR] = len(live)
        else:
            kept = slice(None)
            self.state[t.CURSOR] = len(self.sequences)
        self.sequences = _copied(self.sequences, kept, count)
        self.names = _copied(self.names, kept, count)
        self.holders = _copied(self.holders, kept, count)
        self.state[t.RECORDS] = count
        self.state[t.LIVE_MAX] = min(count * 7 // 8, int(self.state[t.CAPACITY]) + 1)
        self._make_tables(count * 11 // 10, count, t.BY_SEQUENCE, t.BY_NAME)
        self._build(t.BY_SEQUENCE, t.BY_NAME)
        self._make_tables(len(self.alias_names) * 3 // 2, len(self.alias_names), t.BY_OWNER)
        self._build(t.BY_OWNER)

    def resize_sets(self, count: int) -> None:
        self._drop_tables(t.BY_MEMBERS)
        used = self.set_hashes != 0
        used[:1] = True
        kept = np.flatnonzero(used)
        if count < len(self.references):
            moved = np.zeros(len(used), dtype=np.uint32)
            moved[kept] = np.arange(len(kept), dtype=np.uint32)
            named = self.holders & np.uint32(t.NAMED)
            self.holders[:] = moved[self.holders & np.uint32(t.SET_MASK)] | named
            targets = np.arange(len(kept))
        else:
            targets = kept
        rows = zeros(count * self.row_words, np.uint64).reshape(count, -1)
        rows[targets] = self.rows.reshape(-1, self.row_words)[kept]
        hashes, references = zeros(count, np.uint64), zeros(count, np.uint64)
        hashes[targets] = self.set_hashes[kept]
        references[targets] = self.references[kept]
        self.rows, self.set_hashes, self.references = rows.reshape(-1), hashes, references
        if not len(kept):
            self.references[0] = _PINNED
        self.index_sets()

    def index_sets(self) -> None:
        """Make the free list and the table anew, from the hashes."""
        count = len(self.references)
        free = np.flatnonzero(self.set_hashes == 0)[1:]  # the first is the empty set
        following = np.zeros(len(free), dtype=np.uint64)
        following[:-1] = free[1:] + 1
        self.references[free] = following
        self.state[t.SETS] = count
        self.state[t.SETS_LIVE] = count - len(free)
        self.state[t.SETS_FREE] = free[0] if len(free) else -1
        self.state[t.MEMO] = -1
        self._make_tables(2 * count, count, t.BY_MEMBERS)
        self._build(t.BY_MEMBERS)

    def resize_aliases(self, count: int) -> None:
        self._drop_tables(t.BY_ALIAS, t.BY_OWNER)
        used = np.flatnonzero(self.alias_lanes != t.FREE_LANE)
        live = len(used)
        self.alias_names = _copied(self.alias_names, used, count)
        self.alias_records = _copied(self.alias_records, used, count)
        self.alias_lanes = _copied(self.alias_lanes, used, count)
        self.alias_lanes[live:] = t.FREE_LANE
        self.alias_records[live:] = np.arange(live + 2, count + 2, dtype=np.uint32)
        self.alias_records[-1:] = 0
        self.state[t.ALIASES] = count
        self.state[t.ALIASES_LIVE] = live
        self.state[t.ALIASES_FREE] = live if live < count else -1
        self.state[t.ALIASES_MAX] = min(count, int(self.state[t.CAPACITY]) + 1)
        self._make_tables(count * 3 // 2, count, t.BY_ALIAS, t.BY_OWNER)
        self._build(t.BY_ALIAS, t.BY_OWNER)

    def rebuild(self) -> bool:
        """Make all tables but the sets' anew from what the arrays hold; False if any is double."""
        self.resize_aliases(len(self.alias_names))
        self.resize_records(len(self.sequences))
        for table in (t.BY_SEQUENCE, t.BY_NAME, t.BY_ALIAS, t.BY_OWNER):
            self.tables[table][:] = 0
            if not build.build_table(self.state, table, True):
                return False
        return True

    def widen(self, lanes: int) -> None:
        """Rows of sets with room for so many lanes."""
        before = int(self.state[t.LANE_WORDS])
        words = before
        while words * WORD_LANES < lanes:
            words *= 2
        if words == before:
            return
        rows = zeros(len(self.references) * t.LAYERS * words, np.uint64)
        shaped = rows.reshape(-1, t.LAYERS, words)
        shaped[:, :, :before] = self.rows.reshape(-1, t.LAYERS, before)
        blocks = zeros(words * WORD_LANES * t.ALIAS_LAYER, np.uint64)
        blocks[: len(self.lane_blocks)] = self.lane_blocks
        self.rows, self.lane_blocks = rows, blocks
        self.lane_numbers = np.arange(words * WORD_LANES, dtype=np.uint32)
        self.state[t.LANE_WORDS] = words
        self._publish()

    def _drop_tables(self, *tables: int) -> None:
        """Before their successors are made, so that both never exist at once."""
        for table in tables:
            self.tables[table] = zeros(1, np.uint32)

    def _make_tables(self, slots: int, numbers: int, *tables: int) -> None:
        for table in tables:
            self.tables[table] = zeros(slots, np.uint32)
            at = t.TABLES + 3 * table
            self.state[at + 1] = slots
            self.state[at + 2] = numbers.bit_length()
        self._publish()

    def _build(self, *tables: int) -> None:
        for table in tables:
            if table in {t.BY_SEQUENCE, t.BY_NAME}:
                build.build_records(self.state, table)
            else:
                build.build_table(self.state, table, False)

    def _publish(self) -> None:
        """The addresses, after arrays have changed."""
        state = self.state
        state[t.SEQUENCES] = address(self.sequences)
        state[t.NAMES] = address(self.names)
        state[t.HOLDERS] = address(self.holders)
        state[t.SET_ROWS] = address(self.rows)
        state[t.SET_REFERENCES] = address(self.references)
        state[t.SET_HASHES] = address(self.set_hashes)
        state[t.ALIAS_NAMES] = address(self.alias_names)
        state[t.ALIAS_RECORDS] = address(self.alias_records)
        state[t.ALIAS_LANES] = address(self.alias_lanes)
        state[t.LANE_BLOCKS] = address(self.lane_blocks)
        state[t.LANE_NUMBERS] = address(self.lane_numbers)
        for table, entries in enumerate(self.tables):
            state[t.TABLES + 3 * table] = address(entries)

    def _arrays(self) -> list[NDArray[Any]]:
        return [
            *(self.sequences, self.names, self.holders),
            *(self.rows, self.references, self.set_hashes),
            *(self.alias_names, self.alias_records, self.alias_lanes),
            self.lane_blocks,
            *self.tables,
        ]


def _grown(count: int) -> int:
    return 2 * count if count < _BIG else count * 9 // 5


def _is_sparse(live: int, count: int, least: int) -> bool:
    return count > least and live < count // 4


def _copied(source: NDArray[Any], kept: Any, count: int) -> NDArray[Any]:
    taken = source[kept]
    target = zeros(count, source.dtype)
    target[: len(taken)] = taken
    return target
