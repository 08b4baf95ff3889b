"""The in-memory index of a tier that evicts: which chunks it has, where, who holds them.

A chunk's row takes 64 bytes, its entry in the hash table 8 to 16, its flags one; the eviction
policy has columns of its own. Rows are addressed by *record*, a small number that stands for the
chunk until it has left and nobody holds it any more.

Looking up and holding many chunks is a few vector operations, whatever their number; single ones
go through plain memory views, which are faster there.
"""

from __future__ import annotations

import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from storage_tiers.admission import Admission
from storage_tiers.base import KEY_BYTES, Chunk, Key, tenant_of
from storage_tiers.leaves import NONE
from storage_tiers.policy import EvictionPolicy

PLACE_UNIT: Final = 4096
"""Places are multiples of this many bytes, so that 32 bits reach 16 TiB."""
CHUNK_BYTES_MAX: Final = (1 << 32) - 1
"""What a row has room for."""
DEPTH_DOUBLES: Final = 1024
"""Position at which computing a chunk costs twice as much as at the start of its sequence.

Attention's part grows with what came before; 16 k tokens of 16 a chunk are where it equals the
rest in models of a few billion parameters (4 x depth x width against 24 x width squared).
"""

_KEY: Final = struct.Struct("<QQ")
# A row: key, parent (zeros: none), checksum, tag, place / PLACE_UNIT, length, position, pins.
_ROW: Final = struct.Struct("<16s16sQQIIII")
_WORDS: Final = _ROW.size // 8  # a row as 64-bit words: key 0-1, parent 2-3, checksum 4, tag 5
_CHECKSUM, _TAG = 4, 5
_HALVES: Final = _ROW.size // 4  # a row as 32-bit words
_PLACE, _LENGTH, _POSITION, _PINS = 12, 13, 14, 15

_RESIDENT: Final = 1
_SEALED: Final = 2
_GONE: Final = 4  # removed while it was held
_KEPT: Final = 8  # removed, and its place is not to be freed
_MARKED: Final = 16  # touched since the tier last looked

_ROWS_MIN: Final = 1024
_NO_PARENT: Final = bytes(KEY_BYTES)


class ChunkIndex:
    """Chunks by key, with the policy that says which of them goes first.

    `free` is called with a chunk's place once it has left and nobody holds it. `now_s` is any
    clock; that it never goes back is seen to here.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        free: Callable[[int], None],
        *,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.policy = policy
        self._free = free
        self._clock = now_s
        self._latest_s = 0.0
        self._count = 0
        self.tenant_bytes = array("q", [0]) * 256
        """Bytes of chunks by their tenants' tags."""
        self._unused = array("i")  # records given back, to be used again
        self._end = 0  # records below it have been used
        self.marked = 0
        """How many were marked and not taken yet."""
        self._words: NDArray[np.uint64] = np.zeros((0, _WORDS), dtype=np.uint64)
        self._flags: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        self._make_rows(_ROWS_MIN)
        self._make_table(2 * _ROWS_MIN)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: Key) -> bool:
        return self.record(key) != NONE

    # -- looking up ----------------------------------------------------------------------

    def record(self, key: Key) -> int:
        """The record of one resident chunk, or NONE."""
        table, words, mask = self._table_view, self._word_view, self._mask
        low, high = _KEY.unpack(key)
        entry = low & mask
        while record := table[entry]:
            at = (record - 1) * _WORDS
            if words[at] == low and words[at + 1] == high:
                found: int = record - 1
                return found
            entry = entry + 1 & mask
        return NONE

    def records(self, keys: Sequence[Key]) -> NDArray[np.int64]:
        """The record of each key, or NONE."""
        if not keys:
            return np.zeros(0, dtype=np.int64)
        wanted = np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)
        low, high = wanted[:, 0], wanted[:, 1]
        lows, highs, table = self._words[:, 0], self._words[:, 1], self._table
        entries = (low & np.uint64(self._mask)).astype(np.int64)
        found = table[entries].astype(np.int64) - 1
        # The row of NONE is the last one, whose key does not matter: NONE is an answer already.
        other = (found != NONE) & ((lows[found] != low) | (highs[found] != high))
        seeking = np.flatnonzero(other)
        while seeking.size:
            entries[seeking] = entries[seeking] + 1 & self._mask
            next_ = table[entries[seeking]].astype(np.int64) - 1
            found[seeking] = next_
            other = (next_ != NONE) & (
                (lows[next_] != low[seeking]) | (highs[next_] != high[seeking])
            )
            seeking = seeking[other]
        return found

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        """The chunk of each key, or None."""
        if len(keys) == 1:
            record = self.record(keys[0])
            return [None if record == NONE else self.chunk(record)]
        found = self.records(keys).tolist()
        return [None if record == NONE else self.chunk(record) for record in found]

    def parent(self, chunk: Chunk) -> int:
        """The record of a chunk's resident parent, or NONE. The chunk need not be resident.

        A link counts only if it points to a lower position, so that no input makes a circle.
        """
        if chunk.parent is None:
            return NONE
        above = self.record(chunk.parent)
        if above == NONE or self._half(above, _POSITION) >= chunk.position:
            return NONE
        return above

    def some(self, start: int, count: int) -> tuple[list[Key], int]:
        """Keys of the chunks among `count` records from `start`, and where to go on; 0: the end.

        Walks all chunks in no order; one that comes or goes meanwhile may be met or not.
        """
        end = min(start + count, self._end)
        here = np.flatnonzero(self._flags[start:end] & _RESIDENT) + start
        return [self.key(record) for record in here.tolist()], 0 if end == self._end else end

    def places(self) -> NDArray[np.uint64]:
        """Where every resident chunk lies, in no order."""
        here = np.flatnonzero(self._flags[: self._end] & _RESIDENT)
        return self.rows(here)[0]

    def all_keys(self) -> list[Key]:
        """All keys, in no order."""
        return self.some(0, self._end)[0]

    def coldest_first(self, keys: Sequence[Key]) -> list[int]:
        """Records of those here by the second of their last use, children before their parents.

        A parent counts as used when the last of its descendants among these was.
        """
        records = [record for record in self.records(keys).tolist() if record != NONE]
        deepest_first = sorted(records, key=lambda record: -self._half(record, _POSITION))
        used = {record: self.policy.used_s(record) for record in deepest_first}
        for record in deepest_first:
            parent = self.parent(self.chunk(record))
            if parent in used:
                used[parent] = max(used[parent], used[record])
        return sorted(deepest_first, key=lambda record: used[record])

    # -- one record ----------------------------------------------------------------------

    def key(self, record: int) -> Key:
        at = record * _ROW.size
        return Key(bytes(self._bytes[at : at + KEY_BYTES]))

    def chunk(self, record: int) -> Chunk:
        key, parent, checksum, _, _, length, position, _ = _ROW.unpack_from(
            self._bytes, record * _ROW.size
        )
        above = None if parent == _NO_PARENT else Key(parent)
        return Chunk(Key(key), length, checksum, above, position)

    def place(self, record: int) -> int:
        """Where it lies, in bytes."""
        return self._half(record, _PLACE) * PLACE_UNIT

    def length(self, record: int) -> int:
        return self._half(record, _LENGTH)

    def checksum(self, record: int) -> int:
        return self._word_view[record * _WORDS + _CHECKSUM]

    def tag(self, record: int) -> int:
        """64 bits for the tier's own use."""
        return self._word_view[record * _WORDS + _TAG]

    def set_tag(self, record: int, tag: int) -> None:
        self._word_view[record * _WORDS + _TAG] = tag

    def pins(self, record: int) -> int:
        """How many hold it."""
        return self._half(record, _PINS)

    def is_resident(self, record: int) -> bool:
        """False for a chunk that has left while somebody holds it."""
        return bool(self._flag_view[record] & _RESIDENT)

    def is_sealed(self, record: int) -> bool:
        """Whether its checksum is known."""
        return bool(self._flag_view[record] & _SEALED)

    def seal(self, record: int, checksum: int) -> None:
        self._word_view[record * _WORDS + _CHECKSUM] = checksum
        self._flag_view[record] |= _SEALED

    def mark(self, record: int) -> None:
        """Remember that its tag changed, until `take_marked`."""
        self.marked += not self._flag_view[record] & _MARKED
        self._flag_view[record] |= _MARKED

    def take_marked(self, count_max: int) -> list[int]:
        """Records that were marked, no longer so. Linear, a byte a record."""
        taken = np.flatnonzero(self._flags[: self._end] & _MARKED)[:count_max]
        self._flags[taken] &= np.uint8(0xFF ^ _MARKED)
        self.marked -= len(taken)
        records: list[int] = taken.tolist()
        return records

    # -- many records --------------------------------------------------------------------

    def rows(self, records: NDArray[np.int64]) -> tuple[NDArray[np.uint64], ...]:
        """Place in bytes, length and tag of each."""
        halves = self._halves[records]
        places = halves[:, _PLACE].astype(np.uint64) * np.uint64(PLACE_UNIT)
        return places, halves[:, _LENGTH].astype(np.uint64), self._words[records, _TAG]

    def pin_all(self, records: NDArray[np.int64]) -> None:
        """Hold each of these different records."""
        self._halves[records, _PINS] += np.uint32(1)

    def unpin_all(self, records: NDArray[np.int64]) -> None:
        """Let go of each of these different records."""
        pins = self._halves[records, _PINS]
        assert pins.all(), "let go of without being held"
        self._halves[records, _PINS] = pins - np.uint32(1)
        ended = (pins == 1) & (self._flags[records] & _GONE != 0)
        for record in records[ended].tolist():
            self._end_of(record)

    def pin(self, record: int) -> None:
        """Hold a chunk: it is not offered for eviction, and if removed it keeps its place."""
        self._half_view[record * _HALVES + _PINS] += 1

    def unpin(self, record: int) -> None:
        pins = self._half_view[record * _HALVES + _PINS]
        assert pins > 0, "let go of without being held"
        self._half_view[record * _HALVES + _PINS] = pins - 1
        if pins == 1 and self._flag_view[record] & _GONE:
            self._end_of(record)

    # -- coming and going ----------------------------------------------------------------

    def add(self, chunk: Chunk, place: int, tag: int = 0, *, sealed: bool = True) -> int:
        """A chunk has arrived; its record. Parents before children, as far as that can be."""
        assert self.record(chunk.key) == NONE, "a key has one residency"
        parent = self.parent(chunk)
        record = self._put(chunk, place, tag, sealed=sealed)
        self.policy.inserted(
            record,
            fingerprint(chunk.key),
            self._now(),
            parent=parent,
            cost_s=relative_cost(chunk),
            size_bytes=chunk.length,
        )
        return record

    def restore(self, arrivals: Sequence[tuple[Chunk, int, int]], used_s: Sequence[float]) -> None:
        """Fill an empty index with (chunk, place, tag), from the least to the most recently used.

        `used_s`: when each was used last, in seconds of this index's clock; it does not fall.
        """
        assert not self._end, "restore comes first"
        for chunk, place, tag in arrivals:
            self._put(chunk, place, tag, sealed=True)
        self.policy.restore(
            [self.parent(chunk) for chunk, _, _ in arrivals],
            used_s,
            costs_s=[relative_cost(chunk) for chunk, _, _ in arrivals],
            sizes_bytes=[chunk.length for chunk, _, _ in arrivals],
        )

    def remove(self, record: int, *, keep_place: bool = False) -> None:
        """A chunk leaves. Its place is freed now or by who lets go of it last, or never."""
        key = self.key(record)
        self._unhash(key)
        self._count -= 1
        self.tenant_bytes[tenant_of(key)] -= self.length(record)
        self.marked -= bool(self._flag_view[record] & _MARKED)
        self._flag_view[record] = _GONE | (_KEPT if keep_place else 0)
        self.policy.removed(record, fingerprint(key))
        if not self.pins(record):
            self._end_of(record)

    def remove_all(self, records: Sequence[int]) -> None:
        """Several leave at once. Linear in all records, once, if any has children that stay."""
        if len(records) > 1:
            self.policy.detach(records)
            records = sorted(records, key=lambda record: -self._half(record, _POSITION))
        for record in records:
            self.remove(record)

    def touch(self, keys: Sequence[Key]) -> tuple[list[int], list[Key]]:
        """A request uses these, a sequence's deepest first.

        Returns the records of those that are here, and the keys that are not.
        """
        now_s, hit = self._now(), self.policy.hit
        words = self._word_view
        here: list[int] = []
        absent: list[Key] = []
        for key, record in zip(keys, self.records(keys).tolist(), strict=True):
            if record == NONE:
                absent.append(key)
                continue
            hit(record, words[record * _WORDS] or 1, now_s)
            here.append(record)
        return here, absent

    def admits(self, admission: Admission, chunk: Chunk, *, full: bool) -> bool:
        """Whether to store a chunk; `full` says that another would have to go for it."""
        return admission.admits(
            fingerprint(chunk.key),
            self._now(),
            parent=self.parent(chunk),
            cost_s=relative_cost(chunk),
            size_bytes=chunk.length,
            full=full,
        )

    def evictable(self, tried_max: int | None = None) -> Iterator[int]:
        """Records in the order in which to evict them, without those that somebody holds.

        The caller removes what it was given or goes on, and does nothing else meanwhile. The walk
        ends after `tried_max` records.
        """
        for record in islice(self.policy.victims(), tried_max):
            if not self._half(record, _PINS):
                yield record

    def check_integrity(self) -> None:
        """Assert that table, rows and policy agree. Cost: linear."""
        self.policy.check_integrity()
        here = [r for r in range(self._end) if self._flag_view[r] & _RESIDENT]
        assert len(here) == self._count
        tenant_bytes = [0] * 256
        for record in here:
            tenant_bytes[tenant_of(self.key(record))] += self.length(record)
        assert tenant_bytes == self.tenant_bytes.tolist()
        assert all(self.record(self.key(record)) == record for record in here)
        assert sorted(r - 1 for r in self._table.tolist() if r) == here
        assert self.marked == sum(bool(flag & _MARKED) for flag in self._flag_view[: self._end])
        held = [r for r in range(self._end) if self._flag_view[r] & _GONE]
        assert all(self.pins(record) for record in held)
        assert sorted([*here, *held, *self._unused]) == list(range(self._end))

    # -- below ---------------------------------------------------------------------------

    def _half(self, record: int, field: int) -> int:
        return self._half_view[record * _HALVES + field]

    def _now(self) -> float:
        self._latest_s = max(self._latest_s, self._clock())
        return self._latest_s

    def _put(self, chunk: Chunk, place: int, tag: int, *, sealed: bool) -> int:
        """A row and an entry of the hash table for a chunk."""
        record = self._unused.pop() if self._unused else self._end
        if record == self._end:
            if record == len(self._flags):
                self._grow()
            self._end += 1
        _ROW.pack_into(
            self._bytes,
            record * _ROW.size,
            chunk.key,
            chunk.parent or _NO_PARENT,
            chunk.checksum,
            tag,
            place // PLACE_UNIT,
            chunk.length,
            chunk.position,
            0,
        )
        self._flag_view[record] = _RESIDENT | (_SEALED if sealed else 0)
        self._count += 1
        self.tenant_bytes[tenant_of(chunk.key)] += chunk.length
        table, mask = self._table_view, self._mask
        entry = int.from_bytes(chunk.key[:8], "little") & mask
        while table[entry]:
            entry = entry + 1 & mask
        table[entry] = record + 1
        return record

    def _end_of(self, record: int) -> None:
        """Nobody holds a chunk that has left: its place and its record are free."""
        kept = self._flag_view[record] & _KEPT
        self._flag_view[record] = 0
        self._unused.append(record)
        if not kept:
            self._free(self.place(record))

    def _unhash(self, key: Key) -> None:
        """Take an entry out and close the gap, so that each is reached from its home."""
        table, words, mask = self._table_view, self._word_view, self._mask
        record = self.record(key)
        assert record != NONE, "only a resident chunk is removed"
        gap = int.from_bytes(key[:8], "little") & mask
        while table[gap] != record + 1:
            gap = gap + 1 & mask
        entry = gap
        while other := table[entry := entry + 1 & mask]:
            home = words[(other - 1) * _WORDS] & mask
            if (entry - home & mask) >= (entry - gap & mask):
                table[gap] = other
                gap = entry
        table[gap] = 0

    def _make_rows(self, count: int) -> None:
        """Room for so many records. New pages cost memory only once they are used."""
        words = np.zeros((count, _WORDS), dtype=np.uint64)
        flags = np.zeros(count, dtype=np.uint8)
        words[: self._end] = self._words[: self._end]
        flags[: self._end] = self._flags[: self._end]
        self._words = words
        self._halves = words.view(np.uint32)
        self._flags = flags
        self._bytes = words.data.cast("B")
        self._word_view = self._bytes.cast("Q")
        self._half_view = self._bytes.cast("I")
        self._flag_view = flags.data

    def _make_table(self, entries: int) -> None:
        """An empty hash table: record + 1 for each entry, 0 for none; never more than half full."""
        self._table = np.zeros(entries, dtype=np.int32)
        self._table_view = self._table.data
        self._mask = entries - 1

    def _grow(self) -> None:
        """Twice as many rows and table entries."""
        here = np.flatnonzero(self._flags & _RESIDENT)
        self._make_rows(2 * len(self._flags))
        self._make_table(2 * len(self._table))
        homes = (self._words[here, 0] & np.uint64(self._mask)).astype(np.int64)
        order = np.argsort(homes, kind="stable")
        # In the order of their homes each takes its home or the first entry after the one before.
        steps = np.arange(len(order))
        entries = np.maximum.accumulate(homes[order] - steps) + steps
        inside = entries <= self._mask
        self._table[entries[inside]] = here[order[inside]] + 1
        for record in here[order[~inside]].tolist():  # these go round to the table's start
            entry = 0
            while self._table_view[entry]:
                entry += 1
            self._table_view[entry] = record + 1


def relative_cost(chunk: Chunk) -> float:
    """What computing a chunk again costs, in a unit that bytes of other chunks share."""
    return chunk.length * (1 + chunk.position / DEPTH_DOUBLES)


def fingerprint(key: Key) -> int:
    """What policies know a key by: 64 bits, not 0."""
    return int.from_bytes(key[:8], "little") or 1
