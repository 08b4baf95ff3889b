"""Whether all parts of an index agree: run by tests, and on every snapshot before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from router import index_build as build
from router import index_tables as t
from router.index_memory import IndexMemory

if TYPE_CHECKING:
    from router.index import WorkerId


def check(memory: IndexMemory, workers: tuple[WorkerId | None, ...]) -> None:
    """Asserts. Cost: a pass over everything, and every table is built a second time."""
    state = memory.state
    live = np.flatnonzero(memory.holders)
    held = memory.holders[live]
    which = held & np.uint32(t.SET_MASK)
    used = np.flatnonzero(memory.alias_lanes)
    assert len(live) == state[t.LIVE] <= state[t.CAPACITY], "live records"
    assert len(used) == state[t.ALIASES_LIVE], "live aliases"
    assert len(live) + len(used) <= state[t.CAPACITY], "capacity"
    assert (which > 0).all(), "a record without holders is free"
    _check_sets(memory, which, workers)
    _check_aliases(memory, which, live, used)
    named = int((held & np.uint32(t.NAMED) != 0).sum())
    assert named == state[t.NAMED_LIVE], "records with names of their own"
    entries = (len(live), named, int(state[t.SETS_LIVE]), len(used), len(used))
    for table, count in enumerate(entries):
        filled = memory.table(table) != 0
        assert int(filled.sum()) == count == state[_count_word(table)], f"entries of table {table}"
        assert build.check_table(state, table), f"an entry of table {table} is lost"
    assert build.check_names(state), "a worker's name for two blocks"


def _count_word(table: int) -> int:
    return t.TABLES + t.TABLE_WORDS * table + t.COUNT


def _bits(memory: IndexMemory) -> NDArray[Any]:
    """By set, layer and lane."""
    words = int(memory.state[t.LANE_WORDS])
    rows = memory.rows.astype("<u8").view(np.uint8).reshape(-1, t.LAYERS, 8 * words)
    return np.unpackbits(rows, axis=2, bitorder="little")


def _check_sets(
    memory: IndexMemory, which: NDArray[Any], workers: tuple[WorkerId | None, ...]
) -> None:
    live = memory.set_hashes != 0
    assert not live[0], "the empty set has members"
    assert int(live.sum()) + 1 == memory.state[t.SETS_LIVE], "live sets"
    references = np.bincount(which, minlength=len(live))
    assert (memory.references[live] == references[live]).all(), "references of sets"
    assert (references[live] > 0).all(), "a set that nobody has"
    assert not references[~live].any(), "a set that is free"
    sets = np.flatnonzero(live)
    known = np.array([w is not None for w in workers], dtype=bool)
    living = known.copy()
    known[list(memory.dying)] = True
    blocks = np.zeros((memory.row_words // t.LAYERS * 64, t.ALIAS_LAYER), dtype=np.int64)
    bits = _bits(memory)[sets]
    assert not bits[:, :, len(known) :].any(), "members that are no workers"
    assert not bits[:, :, : len(known)][:, :, ~known].any(), "members that have left"
    assert bits[:, : t.ALIAS_LAYER].any(axis=(1, 2)).all(), "a set without a tier"
    held = bits[:, : t.ALIAS_LAYER].any(axis=1)
    assert not (bits[:, t.ALIAS_LAYER] & ~held & 1).any(), "an alias of who holds nothing"
    blocks += np.einsum("slw,s->wl", bits[:, : t.ALIAS_LAYER].astype(np.int64), references[sets])
    counted = memory.lane_blocks.reshape(-1, t.ALIAS_LAYER)[: len(living)][living]
    assert (counted.astype(np.int64) == blocks[: len(living)][living]).all(), "blocks by worker"
    if blocks[:, 1:].any():
        assert memory.state[t.LOWER], "lower tiers are not looked at"
    assert build.check_hashes(memory.state), "hashes of sets"


def _check_aliases(
    memory: IndexMemory, which: NDArray[Any], live: NDArray[Any], used: NDArray[Any]
) -> None:
    """Each alias's lane is in the alias layer of its record, and the other way round."""
    records, lanes = memory.alias_records[used], memory.alias_lanes[used].astype(np.int64) - 1
    assert (memory.holders[records] != 0).all(), "an alias of a free record"
    owned = memory.holders[records] & np.uint32(t.SET_MASK)
    words = int(memory.state[t.LANE_WORDS])
    rows = memory.rows.reshape(-1, t.LAYERS, words)
    members = rows[owned, t.ALIAS_LAYER, lanes >> 6] >> (lanes & 63).astype(np.uint64)
    assert (members & np.uint64(1) == 1).all(), "an alias that its set does not know"
    known = _bits(memory)[which, t.ALIAS_LAYER].sum() if len(live) else 0
    assert int(known) == len(used), "as many aliases as sets know"
