"""How long ago, in bytes of other chunks, was this chunk used last? Measured on a sample of keys.

SHARDS (Waldspurger et al., FAST'15), with a bound on keys: a key is in the sample if its hash is
below a threshold, so all its uses are or none; the threshold falls whenever the sample has too
many. Our keys are hashes already. Depths beyond `reach_bytes` are not told apart from never: keys
that far down are forgotten, so what is remembered is of recent traffic, however long it goes on.

A depth is what an LRU cache must hold, in bytes, for the use to be a hit. Uses of one call are
measured before any of them counts, as a lookup finds what there is before it changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from storage_tiers.base import KEY_BYTES, Key

KEYS_MIN: Final = 256

_SIDE: Final = 128  # slots in a row, of which the sums are kept
_AT_ONCE: Final = 1024  # depths that are computed in one go, for a bound on memory
_KEPT: Final = 7 / 8  # of the most keys, when some must go
_WORD: Final = 1 << 64

Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Uses:
    """The sampled ones of some uses, in the order given: arrays of equal length."""

    indexes: NDArray[np.int64]  # which of the keys given
    depths: NDArray[np.float64]  # bytes; infinite if not used within reach
    rate: float  # part of all keys that is sampled


def words_of(keys: Sequence[Key]) -> Words:
    """Keys as two 64-bit words each."""
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, KEY_BYTES // 8)


def rate_of(most: int) -> float:
    """Part of all keys whose hash is no higher."""
    return (most + 1) / _WORD


class ReuseSample:
    """Recently used keys of the sample, by recency. About 200 bytes a key; not thread-safe."""

    def __init__(self, keys_max: int, reach_bytes: int, rate_max: float = 1.0) -> None:
        """`rate_max`: no larger part of all keys is sampled, however few there are."""
        assert keys_max >= KEYS_MIN and 0 < rate_max <= 1
        self.keys_max = keys_max
        self.reach_bytes = reach_bytes
        self.most = max(0, min(_WORD, round(_WORD * rate_max)) - 1)
        """The highest hash that is sampled; a hash is the first half of a key."""
        self._slot_of: dict[int, int] = {}
        # Uses in their order, a slot each; the slot of a key's earlier use is empty. Twice the
        # keys, so that room is made no oftener than once for each of them; a call needs at most
        # `_batch` more.
        self._batch = keys_max // 2
        rows = -(-(2 * keys_max + self._batch) // _SIDE)
        self._keys = np.zeros(rows * _SIDE, dtype=np.uint64)
        self._sizes = np.zeros((rows, _SIDE), dtype=np.int64)  # 0: empty
        self._sums = np.zeros(rows, dtype=np.int64)  # of the sizes in a row
        self._end = 0

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def rate(self) -> float:
        """Part of all keys that is sampled."""
        return rate_of(self.most)

    def use(self, words: Words, sizes: NDArray[np.int64]) -> Uses:
        """These keys are used, the last one latest; `sizes` in bytes, not 0.

        Of a key given twice the last one counts.

        Cost: a few microseconds for the keys, some tens if any is sampled, a fraction of one for
        each that is. Once for every so many sampled keys, some milliseconds.
        """
        low = words[:, 0]
        indexes = self._sampled(low)
        while len(indexes) > self._batch:
            self._lower(len(indexes))
            indexes = self._sampled(low)
        if self._end + len(indexes) > len(self._keys):
            self._pack()
        rate, keys = self.rate, low[indexes]
        depths = np.full(len(indexes), np.inf)
        if len(indexes):
            find = self._slot_of.get
            slots = np.array([find(key, -1) for key in keys.tolist()], dtype=np.int64)
            known = np.flatnonzero(slots >= 0)
            slots = slots[known]
            depths[known] = self._above(slots) / rate + sizes[indexes[known]]
            np.subtract.at(self._sums, slots // _SIDE, self._sizes.ravel()[slots])
            self._sizes.ravel()[slots] = 0
            self._append(keys, sizes[indexes])
            if len(self._slot_of) > self.keys_max:
                self._forget()
        return Uses(indexes, depths, rate)

    def check_integrity(self) -> None:
        """Assert that slots, sums and names agree. Cost: linear."""
        live = np.flatnonzero(self._sizes.ravel())
        assert self._slot_of == dict(zip(self._keys[live].tolist(), live.tolist(), strict=True))
        assert len(self._slot_of) <= self.keys_max and self._end <= len(self._keys)
        assert not len(live) or live[-1] < self._end
        assert all(key <= self.most for key in self._slot_of)
        assert np.array_equal(self._sizes.sum(axis=1), self._sums)

    # -- below ---------------------------------------------------------------------------

    def _sampled(self, low: NDArray[np.uint64]) -> NDArray[np.int64]:
        indexes = np.flatnonzero(low <= np.uint64(self.most))
        last = dict(zip(low[indexes].tolist(), indexes.tolist(), strict=True))
        if len(last) == len(indexes):
            return indexes
        return np.array(sorted(last.values()), dtype=np.int64)

    def _above(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of the sampled keys that were used later than those in the slots."""
        rows, columns = slots // _SIDE, slots % _SIDE
        later_rows = self._sums.sum() - np.cumsum(self._sums)
        above: NDArray[np.int64] = later_rows[rows]
        for start in range(0, len(slots), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            is_later = np.arange(_SIDE) > columns[some, None]
            above[some] += np.where(is_later, self._sizes[rows[some]], 0).sum(axis=1)
        return above

    def _append(self, keys: NDArray[np.uint64], sizes: NDArray[np.int64]) -> None:
        slots = np.arange(self._end, self._end + len(keys))
        self._end += len(keys)
        self._keys[slots] = keys
        self._sizes.ravel()[slots] = sizes
        np.add.at(self._sums, slots // _SIDE, sizes)
        self._slot_of.update(zip(keys.tolist(), slots.tolist(), strict=True))

    def _forget(self) -> None:
        """Keys out of reach go; if too many are left, the threshold falls."""
        room = int(self.keys_max * _KEPT)
        live = np.flatnonzero(self._sizes.ravel())
        sizes = self._sizes.ravel()[live]
        above = sizes.sum() - np.cumsum(sizes)
        live = live[above <= self.reach_bytes * self.rate]
        if len(live) > room:
            keys = self._keys[live]
            self.most = int(np.partition(keys, room)[room]) - 1
            live = live[keys <= np.uint64(self.most)]
        self._keep(live)

    def _lower(self, count: int) -> None:
        """Sample so much less that `count` uses of one call become about half of `_batch`."""
        self.most = int(self.most * (self._batch / 2 / count))
        self._pack()

    def _pack(self) -> None:
        """The slots of all that is sampled, without gaps."""
        live = np.flatnonzero(self._sizes.ravel())
        self._keep(live[self._keys[live] <= np.uint64(self.most)])

    def _keep(self, live: NDArray[np.int64]) -> None:
        """These slots' keys, in their order, and no others."""
        keys, sizes = self._keys[live], self._sizes.ravel()[live]
        self._sizes[:] = 0
        self._sums[:] = 0
        self._slot_of.clear()
        self._end = 0
        self._append(keys, sizes)
