"""An index as bytes, for another replica: exact, checked before it replaces anything.

Layout: magic, version, length of the header, XXH3-64 of all that follows; the header (msgpack)
with counts and workers; then the arrays, little-endian, in the order of `_ARRAYS`. Records, sets
and aliases are numbered without gaps, in the order they had.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from router import index_build as build
from router import index_tables as t
from router.index_integrity import check
from router.index_memory import IndexMemory

if TYPE_CHECKING:
    from router.index import WorkerId

VERSION: Final = 2
_MAGIC: Final = b"KVIX"
_HEAD: Final = struct.Struct("<4sHxxIxxxxQ")
_ARRAYS: Final = (
    *(("sequences", "<u8"), ("names", "<u8"), ("holders", "<u4"), ("rows", "<u8")),
    *(("alias_names", "<u8"), ("alias_records", "<u4"), ("alias_lanes", "<u4")),
)


class SnapshotError(Exception):
    """Bytes that are no snapshot of this version, or one that does not fit here."""


class _Header(msgspec.Struct, frozen=True, array_like=True):
    records: int
    sets: int
    aliases: int
    lane_words: int
    workers: list[tuple[int, int] | None]


def pack(memory: IndexMemory, workers: tuple[WorkerId | None, ...]) -> bytes:
    memory.finish_sweeps()
    live = np.flatnonzero(memory.holders)
    sets = np.flatnonzero(memory.set_hashes)
    used = np.flatnonzero(memory.alias_lanes)
    record_numbers = np.zeros(len(memory.holders), dtype=np.uint32)
    record_numbers[live] = np.arange(len(live), dtype=np.uint32)
    set_numbers = np.zeros(len(memory.references), dtype=np.uint32)
    set_numbers[sets] = np.arange(1, len(sets) + 1, dtype=np.uint32)
    held = memory.holders[live]
    named = held & np.uint32(t.NAMED)
    parts: list[NDArray[Any]] = [
        memory.sequences[live],
        np.where(named, memory.names[live], np.uint64(0)),
        set_numbers[held & np.uint32(t.SET_MASK)] | named,
        memory.rows.reshape(-1, memory.row_words)[sets],
        memory.alias_names[used],
        record_numbers[memory.alias_records[used]],
        memory.alias_lanes[used] - np.uint32(1),
    ]
    header = msgspec.msgpack.encode(
        _Header(len(live), len(sets), len(used), int(memory.state[t.LANE_WORDS]), list(workers))
    )
    arrays = zip(parts, _ARRAYS, strict=True)
    body = header + b"".join(part.astype(kind).tobytes() for part, (_, kind) in arrays)
    return _HEAD.pack(_MAGIC, VERSION, len(header), xxhash.xxh3_64_intdigest(body)) + body


def unpack(
    snapshot: bytes, capacity: int, workers_max: int
) -> tuple[IndexMemory, list[WorkerId | None]]:
    """Raises SnapshotError."""
    from router.index import WorkerId

    header, body = _opened(snapshot, workers_max)
    if header.records + header.aliases > capacity:
        raise SnapshotError(
            f"{header.records + header.aliases} blocks and names do not fit into {capacity}"
        )
    workers = [None if w is None else WorkerId(*w) for w in header.workers]
    known = [worker for worker in workers if worker is not None]
    if len(known) > workers_max or len(set(known)) != len(known):
        raise SnapshotError(f"{len(known)} workers, {workers_max} allowed, each once")
    try:
        memory = _filled(header, _parts(header, body), capacity)
        check(memory, tuple(workers))
    except AssertionError as error:
        raise SnapshotError(f"the snapshot contradicts itself: {error}") from error
    return memory, workers


def _opened(snapshot: bytes, workers_max: int) -> tuple[_Header, memoryview]:
    if len(snapshot) < _HEAD.size:
        raise SnapshotError("too short for a snapshot")
    magic, version, header_bytes, checksum = _HEAD.unpack_from(snapshot)
    if magic != _MAGIC or version != VERSION:
        raise SnapshotError(f"no snapshot of version {VERSION}")
    body = memoryview(snapshot)[_HEAD.size :]
    if xxhash.xxh3_64_intdigest(body) != checksum or header_bytes > len(body):
        raise SnapshotError("damaged")
    try:
        header = msgspec.msgpack.decode(body[:header_bytes], type=_Header)
    except msgspec.DecodeError as error:
        raise SnapshotError(f"no header: {error}") from error
    words = header.lane_words
    fits = words == 1 or (words > 1 and words & (words - 1) == 0 and 16 * words < workers_max)
    if not fits or len(header.workers) > 64 * words:
        raise SnapshotError(f"more workers than {workers_max}")
    if min(header.records, header.sets, header.aliases) < 0 or header.sets > header.records:
        raise SnapshotError("a header with impossible counts")
    return header, body[header_bytes:]


def _parts(header: _Header, body: memoryview) -> dict[str, NDArray[Any]]:
    records, aliases = header.records, header.aliases
    row_words = t.LAYERS * header.lane_words
    counts = (records, records, records, header.sets * row_words, aliases, aliases, aliases)
    parts: dict[str, NDArray[Any]] = {}
    start = 0
    for (name, kind), count in zip(_ARRAYS, counts, strict=True):
        end = start + count * np.dtype(kind).itemsize
        if end > len(body):
            raise SnapshotError("shorter than its header says")
        parts[name] = np.frombuffer(body[start:end], dtype=kind)
        start = end
    if start != len(body):
        raise SnapshotError("longer than its header says")
    return parts


def _filled(header: _Header, parts: dict[str, NDArray[Any]], capacity: int) -> IndexMemory:
    """Memory that holds these parts; asserts what kernels rely on, `check` asserts the rest."""
    records, sets, aliases = header.records, header.sets, header.aliases
    which = parts["holders"] & np.uint32(t.SET_MASK)
    assert not records or (which.min() >= 1 and which.max() <= sets), "unknown sets"
    assert not aliases or parts["alias_records"].max() < records, "unknown records"
    lanes = parts["alias_lanes"]
    assert not aliases or lanes.max() < max(1, len(header.workers)), "unknown workers"
    memory = IndexMemory(capacity)
    memory.widen(64 * header.lane_words)
    memory.resize_sets(max(len(memory.references), (sets + t.SET_ROOM) * 5 // 4))
    memory.resize_aliases(max(len(memory.alias_names), aliases * 5 // 4))
    memory.resize_records(max(len(memory.sequences), records * 5 // 4 + 8))
    rows = parts["rows"].reshape(sets, memory.row_words)
    memory.rows.reshape(-1, memory.row_words)[1 : sets + 1] = rows
    memory.references[1 : sets + 1] = np.bincount(which, minlength=sets + 1)[1:]
    for name in ("alias_names", "alias_records", "alias_lanes"):
        getattr(memory, name)[:aliases] = parts[name]
    memory.alias_lanes[:aliases] += np.uint32(1)
    for name in ("sequences", "names", "holders"):
        getattr(memory, name)[:records] = parts[name]
    build.hash_sets(memory.state, sets)
    hashes = memory.set_hashes[1 : sets + 1]
    assert hashes.all() and len(np.unique(hashes)) == sets, "sets that are equal or empty"
    memory.state[t.SETS_END] = memory.state[t.SETS_LIVE] = sets + 1
    memory.state[t.ALIASES_END] = memory.state[t.ALIASES_LIVE] = aliases
    memory.state[t.LIVE] = memory.state[t.CURSOR] = records
    memory.state[t.NAMED_LIVE] = int((parts["holders"] & np.uint32(t.NAMED) != 0).sum())
    build.count_blocks(memory.state)
    for table in range(t.TABLE_COUNT):
        memory.table(table)[:] = 0
        build.begin_table(memory.state, table)
        assert build.fill_table(memory.state, table), "equal blocks, names or aliases"
    return memory
