"""The index's arrays: they nearly double when full, in place, and shrink when mostly empty.

`state` is the word array that kernels take (`index_tables.S`). Between kernels every array is
reachable from here; a kernel runs to its end before the next resize, so addresses in `state` are
always those of live arrays. No resize copies what is big or builds a table anew.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from router import index_build as build
from router import index_tables as t
from router import index_upkeep as kernels
from runtime.native import Growing, address

RECORDS_MIN: Final = 64
SETS_MIN: Final = 32
ALIASES_MIN: Final = 16
CAPACITY_MAX: Final = 1 << 30
WORD_LANES: Final = 64

_BIG: Final = 1 << 16
_SWEPT_FOR_ROOM: Final = 1 << 14
_PINNED: Final = 1 << 60  # references of the empty set, which is never given up

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]


class IndexMemory:
    """Room for `capacity` blocks at most, names of their own included."""

    sequences: U64
    names: U64
    holders: U32
    rows: U64
    references: U64
    set_hashes: U64
    alias_names: U64
    alias_records: U32
    alias_lanes: U32  # plus 1
    lane_blocks: U64
    lane_numbers: U32
    dying_lanes: U64

    def __init__(self, capacity: int) -> None:
        assert 0 < capacity <= CAPACITY_MAX
        self.state: NDArray[np.int64] = np.zeros(t.WORD_COUNT, dtype=np.int64)
        self._records_max = capacity * 8 // 7 + RECORDS_MIN
        self.state[t.CAPACITY] = capacity
        self.state[t.BITS] = self._records_max.bit_length()
        self.state[t.SALT] = secrets.randbits(63)
        self.state[t.LANE_WORDS] = self.state[t.SETS_END] = self.state[t.SETS_LIVE] = 1
        self.state[[t.AT_LANE, t.SLIDE, t.MEMO, t.SETS_FREE, t.ALIASES_FREE]] = -1
        self.dying: set[int] = set()
        self._sweeping: set[int] = set()
        self._growing = {name: Growing(kind) for name, _, kind in _ARRAYS}
        self._growing |= {f"table {n}": Growing(np.uint32) for n in range(t.TABLE_COUNT)}
        self._resize_lanes(1)
        self.resize_records(RECORDS_MIN)
        self.resize_sets(SETS_MIN)
        self.resize_aliases(ALIASES_MIN)
        self.references[0] = _PINNED
        for table in range(t.TABLE_COUNT):
            build.begin_table(self.state, table)
        build.fill_table(self.state, t.BY_MEMBERS)

    @property
    def live(self) -> int:
        return int(self.state[t.LIVE])

    @property
    def held(self) -> int:
        """Records that somebody holds who is not gone."""
        if not self.dying:
            return self.live
        end = int(self.state[t.SETS_END])
        going = np.zeros(int(self.state[t.LANE_WORDS]), dtype=np.uint64)
        for lane in self.dying:
            going[lane // WORD_LANES] |= np.uint64(1 << lane % WORD_LANES)
        rows = self.rows.reshape(-1, t.LAYERS, len(going))[1:end]
        gone = ~(rows & ~going).any(axis=(1, 2)) & (self.set_hashes[1:end] != 0)
        return self.live - int(self.references[1:end][gone].sum())

    @property
    def is_crowded(self) -> bool:
        """As many workers are to be swept out as have ever been here at once."""
        return 2 * len(self.dying) > int(self.state[t.LANE_WORDS]) * WORD_LANES

    @property
    def row_words(self) -> int:
        return t.LAYERS * int(self.state[t.LANE_WORDS])

    @property
    def allocated_bytes(self) -> int:
        """Address space of all arrays; pages never touched cost nothing."""
        return sum(growing.array.nbytes for growing in self._growing.values())

    def table(self, number: int) -> U32:
        """Its segments, one behind the other."""
        return self._growing[f"table {number}"].array

    def make_room(self, lacking: int) -> None:
        """After a kernel stopped for this reason."""
        if lacking == t.NEEDS_RECORDS:
            self.resize_records(_grown(len(self.sequences)))
        elif lacking == t.NEEDS_SETS:
            self.resize_sets(_grown(len(self.references)))
        elif lacking == t.NEEDS_ALIASES:
            self.resize_aliases(_grown(len(self.alias_names)))
        else:
            assert lacking == t.NEEDS_SWEEP and self.dying
            self.upkeep(_SWEPT_FOR_ROOM)

    def bury(self, lane: int) -> None:
        """Its worker is gone: the lane is to be swept out, and nobody's until then."""
        self.dying.add(lane)
        self.state[t.DYING] = len(self.dying)
        self.state[t.SLIDE], self.state[t.UPKEEP] = -1, 1

    def upkeep(self, records: int) -> None:
        """Do some of what was put off, a pass over so many records of it."""
        state = self.state
        if self.dying:
            self._sweep(records)
        elif state[t.SLIDE] >= 0:
            kernels.slide(state, records)
            if state[t.SLIDE] == state[t.RECORDS]:
                self.resize_records(
                    max(RECORDS_MIN, 2 * self.live, int(state[t.CURSOR]) + 1), keep_cursor=True
                )
                self._give_back()
        elif self.live == 0:
            self.resize_records(RECORDS_MIN)
            self._give_back()
            state[t.CURSOR] = state[t.UPKEEP] = 0
        elif self.live < state[t.SPARSE]:
            state[t.SLIDE] = state[t.CURSOR] = 0
        else:
            state[t.UPKEEP] = 0

    def finish_sweeps(self) -> None:
        while self.dying:
            self._sweep(len(self.sequences))

    def resize_records(self, count: int, *, keep_cursor: bool = False) -> None:
        """To fewer: those that are left out must be free."""
        count = min(count, self._records_max)
        if not keep_cursor:
            self.state[t.CURSOR] = min(count, int(self.state[t.RECORDS]))
        for name in ("sequences", "names", "holders"):
            self._resize(name, count)
        self.state[t.RECORDS], self.state[t.SLIDE] = count, -1
        self.state[t.LIVE_MAX] = min(count * 7 // 8, int(self.state[t.CAPACITY]) + 1)
        self.state[t.SPARSE] = count // 4 if count > RECORDS_MIN else 0
        self._resize_tables(count, t.BY_SEQUENCE, t.BY_NAME)

    def resize_sets(self, count: int) -> None:
        """To fewer: those that are left out must never have been used."""
        self._resize("rows", count * self.row_words)
        self._resize("references", count)
        self._resize("set_hashes", count)
        self.state[t.SETS], self.state[t.MEMO] = count, -1
        self._resize_tables(count, t.BY_MEMBERS)

    def resize_aliases(self, count: int) -> None:
        """To fewer: those that are left out must never have been used."""
        for name in ("alias_names", "alias_records", "alias_lanes"):
            self._resize(name, count)
        self.state[t.ALIASES] = count
        self.state[t.ALIASES_MAX] = min(count, int(self.state[t.CAPACITY]) + 1)
        self._resize_tables(count, t.BY_ALIAS, t.BY_OWNER)

    def widen(self, lanes: int) -> None:
        """Rows of sets with room for so many lanes."""
        before = int(self.state[t.LANE_WORDS])
        words = before
        while words * WORD_LANES < lanes:
            words *= 2
        if words == before:
            return
        sets = len(self.references)
        shaped = np.zeros((sets, t.LAYERS, words), dtype=np.uint64)
        shaped[:, :, :before] = self.rows.reshape(-1, t.LAYERS, before)
        self.state[t.LANE_WORDS] = words
        self._resize("rows", sets * self.row_words)
        self.rows[:] = shaped.reshape(-1)
        self._resize_lanes(words)

    def _sweep(self, records: int) -> None:
        if not self._sweeping:
            self._sweeping = set(self.dying)
            self.state[t.SWEEP] = 0
            for lane in self._sweeping:
                self.dying_lanes[lane // WORD_LANES] |= np.uint64(1 << lane % WORD_LANES)
        while not kernels.sweep(self.state, records):
            self.make_room(t.NEEDS_SETS)
        if self.state[t.SWEEP] == self.state[t.RECORDS]:
            blocks = self.lane_blocks.reshape(-1, t.ALIAS_LAYER)
            blocks[list(self._sweeping)] = 0
            self.dying_lanes[:] = 0
            self.dying -= self._sweeping
            self._sweeping = set()
            self.state[t.DYING] = len(self.dying)

    def _give_back(self) -> None:
        """What sets and aliases took, once there are none: their numbers are not moved."""
        state = self.state
        if state[t.SETS_LIVE] == 1:
            state[t.SETS_END], state[t.SETS_FREE] = 1, -1
            self.set_hashes[1:] = 0
            self.resize_sets(SETS_MIN)
        if state[t.ALIASES_LIVE] == 0:
            state[t.ALIASES_END], state[t.ALIASES_FREE] = 0, -1
            self.alias_lanes[:] = 0
            self.resize_aliases(ALIASES_MIN)

    def _resize_lanes(self, words: int) -> None:
        self._resize("lane_blocks", words * WORD_LANES * t.ALIAS_LAYER)
        self._resize("lane_numbers", words * WORD_LANES)
        self._resize("dying_lanes", words)
        self.lane_numbers[:] = np.arange(len(self.lane_numbers))

    def _resize_tables(self, entries: int, *tables: int) -> None:
        """Room for so many, in an address space that is touched as they come."""
        for table in tables:
            at = t.TABLES + t.TABLE_WORDS * table
            segments = max(segments_for(entries), int(self.state[at + t.SEGMENTS]))
            growing = self._growing[f"table {table}"]
            growing.resize(segments * t.SLOTS)
            self.state[at + t.ADDRESS] = address(growing.array)

    def _resize(self, name: str, count: int) -> None:
        setattr(self, name, None)
        growing = self._growing[name]
        growing.resize(count)
        setattr(self, name, growing.array)
        self.state[_WORD_OF[name]] = address(growing.array)


_ARRAYS: Final[tuple[tuple[str, int, Any], ...]] = (
    ("sequences", t.SEQUENCES, np.uint64),
    ("names", t.NAMES, np.uint64),
    ("holders", t.HOLDERS, np.uint32),
    ("rows", t.SET_ROWS, np.uint64),
    ("references", t.SET_REFERENCES, np.uint64),
    ("set_hashes", t.SET_HASHES, np.uint64),
    ("alias_names", t.ALIAS_NAMES, np.uint64),
    ("alias_records", t.ALIAS_RECORDS, np.uint32),
    ("alias_lanes", t.ALIAS_LANES, np.uint32),
    ("lane_blocks", t.LANE_BLOCKS, np.uint64),
    ("lane_numbers", t.LANE_NUMBERS, np.uint32),
    ("dying_lanes", t.DYING_LANES, np.uint64),
)
_WORD_OF: Final = {name: word for name, word, _ in _ARRAYS}


def segments_for(entries: int) -> int:
    """As many as a table can have by the time it has so many entries; see `index_tables.limit`."""
    sixteenths = -(-16 * entries // t.SLOTS)
    whole = 1
    while 22 * whole < sixteenths:
        whole *= 2
    extra = min(max(0, -(-(sixteenths - 11 * whole) // 2)), whole)
    return whole + extra + 1


def _grown(count: int) -> int:
    return 2 * count if count < _BIG else count * 9 // 5
