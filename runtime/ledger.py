"""Which runs of blocks are held, and what routers are to be told of them: columns, not objects.

A run is one or more blocks that follow each other, under a key of 16 bytes: a chunk kept outside
the engine, or one block of an engine under the engine's own name. For each there is a row of 48
bytes, 4 to 8 in the table, and 8 for each block's hash where there are several; up to eight bits
say where it is held. A row whose last bit goes is kept for a while, so that a run which moves from
one place to another is not forgotten on its way: until `trim`, and then the latest `slack`.

A call costs a few microseconds, and 0.1 to 0.5 more for each key, and about 10 ns a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime import ledger_kernels as k
from runtime.hashing import Hashes
from runtime.native import address, zeros

KEY_WORDS: Final = 2
RUN_BLOCKS_MAX: Final = 4096
DOMAINS_MAX: Final = 1 << 16
KEYS_AT_ONCE_MAX: Final = 1 << 14
_ROWS_MIN: Final = 256
_POOL_BYTES_MIN: Final = 1 << 13
_RING_MIN: Final = 256

Keys = NDArray[np.uint64]
"""Shape (count, 2)."""
Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    domain: int
    parent: int | None  # name of the block before the first
    names: Hashes
    tokens: Hashes


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Blocks of one domain that have one bit."""

    domain: int
    bit: int
    parents: Hashes  # 0: none
    tokens: Hashes


class Ledger:
    """One thread calls it. Keys of one call are at most KEYS_AT_ONCE_MAX."""

    def __init__(self, *, slack: int, run_blocks_max: int) -> None:
        """`run_blocks_max`: most that `stored` and `removed` put into one run."""
        self._slack = slack
        self._run_blocks_max = run_blocks_max
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._state: Numbers = np.zeros(k.STATE_WORDS, np.int64)
        self._classes: Words = np.zeros(k.CLASS_WORDS * (RUN_BLOCKS_MAX + 1), np.uint64)
        self._pools: dict[int, Words] = {}
        self._ring: NDArray[np.uint32] = zeros(0, np.uint32)
        self._domains: list[int] = []
        self._numbers: dict[int, int] = {}
        self._state[k.CLASSES] = address(self._classes)
        self._state[k.BUCKETS] = self._state[k.HALF] = 1
        self._rows: Words = zeros(0, np.uint64)
        self._table: NDArray[np.uint32] = zeros(0, np.uint32)
        self._resize(_ROWS_MIN)

    def __len__(self) -> int:
        """Rows, held or not."""
        return int(self._state[k.ROWS_LIVE])

    @property
    def bare(self) -> int:
        """Runs that are held, and of which only the key is known."""
        return int(self._state[k.BARE])

    def blocks(self, bit: int) -> int:
        """Held with this bit, by runs that are known."""
        return int(self._state[k.BLOCKS + bit])

    @property
    def used_bytes(self) -> int:
        """Memory that has been written to."""
        row_bytes = 8 * k.ROW_WORDS * int(self._state[k.ROW_END])
        pools = sum(8 * n * int(self._classes[k.CLASS_WORDS * n + 1]) for n in self._pools)
        return row_bytes + self._table.nbytes + pools

    # -- changes -------------------------------------------------------------------------

    def number_of(self, domain: int) -> int | None:
        """What a domain goes by in `learn`; None if there are too many."""
        number = self._numbers.get(domain)
        if number is None and len(self._domains) < DOMAINS_MAX:
            number = self._numbers[domain] = len(self._domains)
            self._domains.append(domain)
        return number

    def learn(self, keys: Keys, notes: Words, domains: NDArray[np.uint32]) -> Numbers:
        """What the runs consist of; a run that is known stays as it was.

        `notes`, shape (count, 3 + blocks): the words of `kvbm.note`, of which the second is taken
        from `domains`. Returns the indexes of those that were held already.
        """
        count, width = notes.shape
        assert len(keys) == len(domains) == count and 0 < width - k.NOTE_WORDS <= RUN_BLOCKS_MAX
        self._make_room(count)
        self._make_waiting_room(count)
        self._make_places(width - k.NOTE_WORDS, count)
        late: Numbers = np.empty(count, np.int64)
        keys, notes = np.ascontiguousarray(keys), np.ascontiguousarray(notes)
        numbers = np.ascontiguousarray(domains)
        found = k.learn(
            self._state,
            count,
            address(keys),
            address(notes),
            width,
            address(numbers),
            address(late),
        )
        return late[:found]

    def mark(self, bit: int, keys: Keys) -> Numbers:
        """Set a bit. The rows that had not got it, of runs that are known, in order."""
        self._make_room(len(keys))
        return self._changed(k.mark, bit, keys)

    def clear(self, bit: int, keys: Keys) -> Numbers:
        """Take it back. The rows that had it, of runs that are known, in order; good until
        `trim`."""
        self._make_waiting_room(len(keys))
        return self._changed(k.clear, bit, keys)

    def trim(self) -> None:
        """Forget what has no bit, but for the latest `slack`. Call it again and again."""
        k.trim(self._state, self._slack)

    # -- reading -------------------------------------------------------------------------

    def rows_of(self, keys: Keys) -> Numbers:
        """Each key's row, or -1."""
        rows: Numbers = np.empty(len(keys), np.int64)
        keys = np.ascontiguousarray(keys)
        k.find(self._state, len(keys), address(keys), address(rows))
        return rows

    def having(self, bit: int, rows: Numbers) -> Numbers:
        """Those of the rows that have the bit and are known."""
        metas = self._rows[rows * k.ROW_WORDS + 4]
        known = metas & np.uint64(0xFFFF) != 0
        found: Numbers = rows[known & (metas >> np.uint64(16 + bit) & np.uint64(1) != 0)]
        return found

    def stored(self, rows: Numbers) -> list[Run]:
        """What those rows are: neighbours that follow each other as one run."""
        return self._joined(rows, chained=True)

    def removed(self, rows: Numbers) -> list[Run]:
        """The same, neighbours of one domain as one run whether they follow each other or not."""
        return self._joined(rows, chained=False)

    def end_of(self, row: int) -> int:
        """The name of the last block of a run that is known."""
        return int(k.end_of(self._state, row))

    def domain(self, row: int) -> int:
        """Of a run that is known."""
        return self._domains[int(self._rows[row * k.ROW_WORDS + 4]) >> 32]

    def note(self, row: int) -> tuple[int, int | None, Hashes] | None:
        """Domain, parent and tokens' hashes; None if it is not known."""
        base = row * k.ROW_WORDS
        parent, place, meta = (int(word) for word in self._rows[base + 2 : base + 5])
        count = meta & 0xFFFF
        if not count:
            return None
        if count == 1:
            hashes = self._rows[base + 3 : base + 4]
        else:
            hashes = self._pools[count][place * count : (place + 1) * count]
        return self._domains[meta >> 32], parent if meta >> 25 & 1 else None, hashes.copy()

    def groups(self, bits: int, blocks: int) -> Iterator[list[Group]]:
        """Everything held with the first `bits` bits, about so many blocks at a time.

        What changes between two steps may be met or not; what does not is met once, because a row
        stays where it is for as long as it has a bit.
        """
        start = 0
        while start < int(self._state[k.ROW_END]):
            counts: Words = np.zeros(max(1, len(self._domains)) * bits, np.uint64)
            end = k.count_groups(self._state, start, blocks, bits, address(counts))
            ends = np.cumsum(counts)
            places = ends - counts
            total = int(ends[-1])
            parents, tokens = np.empty(total, np.uint64), np.empty(total, np.uint64)
            k.fill_groups(
                self._state, start, end, bits, address(places), address(parents), address(tokens)
            )
            starts = ends - counts
            yield [
                Group(
                    self._domains[number // bits],
                    number % bits,
                    parents[int(starts[number]) : int(ends[number])],
                    tokens[int(starts[number]) : int(ends[number])],
                )
                for number in np.flatnonzero(counts).tolist()
            ]
            start = end

    def check_integrity(self) -> None:
        """Assert that rows, table, ring and counts agree. Linear."""
        rows = self._rows[: int(self._state[k.ROW_END]) * k.ROW_WORDS].reshape(-1, k.ROW_WORDS)
        metas = rows[:, 4]
        used = metas >> np.uint64(24) & np.uint64(1) != 0
        counts = (metas & np.uint64(0xFFFF)).astype(np.int64)
        held = metas >> np.uint64(16) & np.uint64(0xFF)
        assert used.sum() == len(self) <= self._state[k.BUCKETS] <= len(self._table) + 1
        here = np.flatnonzero(used)
        assert (self.rows_of(rows[here, :2]) == here).all(), "each key leads to its row"
        assert self.bare == ((held != 0) & (counts == 0) & used).sum()
        for bit in range(k.BITS):
            assert (
                self.blocks(bit)
                == counts[used & (held >> np.uint64(bit) & np.uint64(1) != 0)].sum()
            )
        queued = metas >> np.uint64(26) & np.uint64(1) != 0
        assert (used & (held == 0) & ~queued).sum() == 0, "what has no bit waits to be forgotten"
        assert (used & queued).sum() == self._state[k.RING_COUNT]
        for count, pool in self._pools.items():
            places = rows[used & (counts == count), 3]
            assert len(set(places.tolist())) == len(places) <= len(pool) // count

    # -- below ---------------------------------------------------------------------------

    def _changed(self, change: k.Change, bit: int, keys: Keys) -> Numbers:
        assert len(keys) <= KEYS_AT_ONCE_MAX
        out: Numbers = np.empty(len(keys), np.int64)
        keys = np.ascontiguousarray(keys)
        return out[: change(self._state, bit, len(keys), address(keys), address(out))]

    def _joined(self, rows: Numbers, *, chained: bool) -> list[Run]:
        count = len(rows)
        if not count:
            return []
        rows = np.ascontiguousarray(rows)
        total = k.count_blocks(self._state, count, address(rows))
        names, tokens = np.empty(total, np.uint64), np.empty(total, np.uint64)
        runs = np.empty((count, k.RUN_WORDS), np.uint64)
        found = k.join(
            self._state,
            count,
            address(rows),
            chained,
            self._run_blocks_max,
            address(names),
            address(tokens),
            address(runs),
        )
        return [
            Run(
                self._domains[domain],
                parent if has_parent else None,
                names[first : first + length],
                tokens[first : first + length],
            )
            for domain, has_parent, parent, first, length in runs[:found].tolist()
        ]

    def _make_room(self, count: int) -> None:
        assert count <= KEYS_AT_ONCE_MAX
        size = len(self._rows) // k.ROW_WORDS
        wanted = len(self) + count
        if wanted > size:
            self._resize(max(2 * size, 1 << (wanted - 1).bit_length()))

    def _make_waiting_room(self, count: int) -> None:
        """In the ring of rows that may be forgotten."""
        waiting, size = int(self._state[k.RING_COUNT]), len(self._ring)
        if waiting + count > size:
            order = (int(self._state[k.RING_HEAD]) + np.arange(waiting)) % max(1, size)
            ring = zeros(max(2 * size, waiting + count, _RING_MIN), np.uint32)
            ring[:waiting] = self._ring[order]
            self._ring = ring
            self._state[k.RING] = address(ring)
            self._state[k.RING_SIZE] = len(ring)
            self._state[k.RING_HEAD] = 0

    def _resize(self, size: int) -> None:
        rows = zeros(size * k.ROW_WORDS, np.uint64)
        rows[: len(self._rows)] = self._rows
        table = zeros(size, np.uint32)
        table[: len(self._table)] = self._table
        self._rows, self._table = rows, table
        self._state[k.ROWS] = address(rows)
        self._state[k.TABLE] = address(table)

    def _make_places(self, blocks: int, count: int) -> None:
        if blocks == 1:
            return  # the hash is in the row
        pool = self._pools.get(blocks)
        at = k.CLASS_WORDS * blocks
        _, end, _, free = self._classes[at : at + k.CLASS_WORDS].tolist()
        wanted = end + max(0, count - free)
        size = 0 if pool is None else len(pool) // blocks
        if wanted > size:
            size = max(2 * size, wanted, _POOL_BYTES_MIN // (8 * blocks))
            grown = zeros(size * blocks, np.uint64)
            if pool is not None:
                grown[: len(pool)] = pool
            self._pools[blocks] = grown
            self._classes[at] = address(grown)
