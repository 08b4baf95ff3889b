"""How many of the chunks that engines ask for would be found, were a tier of another size?

Fed by the block manager with every lookup, after it was answered. Keeps how deep in an LRU stack
what was asked for lay (`storage_tiers.reuse`), as sums by depth that fade with time; the latest
sampled uses themselves, for `what_if`; and where the chunks really were, to hold the curve against.

Along a sequence the chunks before are used later than those behind. So what LRU finds of a request
has no gaps, and a chunk that it finds is one that can be loaded.

What lies beyond a size is counted, and hits are all lookups less these: a chunk that everybody asks
for and that is not in the sample is then no error (SHARDS-adj in the paper).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvbm.governor import Chain, Places
from kvbm.protocol import Pace
from storage_tiers.base import Chunk
from storage_tiers.miniature import USE, Uses
from storage_tiers.reuse import ReuseSample, Words, rate_of, words_of

PARTS: Final = 32
"""Of the sample. How far they are apart says how far the whole may be from the truth."""
ERRORS: Final = 2.3
"""Standard errors in a bound: 97 % by Student's t, with one degree less than there are parts."""
OCTAVE: Final = 32
"""Depths that are told apart within a factor of two."""
LOWEST: Final = 12  # 2**LOWEST bytes and less are one depth
DEPTHS: Final = 40 * OCTAVE  # and from here on, 4 PiB, one more: never, or out of reach
USES_PER_KEY: Final = 4
"""That are kept."""
USES_TOLD: Final = 1 << 15
"""For a bound on what it takes to have them go through tiers in miniature."""
_REBASE: Final = 1 / 16  # of the window, after which sums are faded

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and how far the truth may be from it on either side."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Recent:
    """The latest uses of the sampled keys, oldest first."""

    uses: Uses
    first: int  # the ones before it are only for what is known by then
    asked: int  # chunks, sampled or not, from `first` on
    seconds: float  # that these took
    rate: float  # part of all keys that is sampled


class Curve:
    """Not thread-safe: the daemon's event loop calls it. Memory: 400 bytes a key, and half a MB."""

    def __init__(
        self,
        keys_max: int,
        reach_bytes: int,
        window_s: float,
        *,
        rate_max: float = 1.0,
        taken_bytes: Callable[[int], int] = lambda length: length,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`window_s`: what was asked for so long ago counts 1/e; `taken_bytes`: by a chunk;
        `rate_max`: as for `ReuseSample`."""
        self.sample = ReuseSample(keys_max, reach_bytes, rate_max)
        self.window_s = window_s
        self._taken_bytes = taken_bytes
        self._clock = clock
        self._began = self._base = clock()  # what is counted at `_base` has weight 1
        self.asked_total = 0
        self.sampled_total = 0
        self._asked = 0.0  # chunks
        self._asked_bytes = 0.0
        self._depths = np.zeros((DEPTHS + 1, PARTS))  # chunks
        self._places = np.zeros(1)  # chunks by where they were: 0 nowhere, 1 host memory, ...
        self._log = np.zeros(USES_PER_KEY * keys_max, dtype=USE)  # a ring
        self._logged = 0  # uses, ever
        self._chains = 0

    # -- what happens --------------------------------------------------------------------

    def asked(self, chains: Sequence[Chain], places: Places, pace: Pace) -> None:
        """A request was looked up and found in these places; its chunks are used now.

        Cost: some 100 microseconds, and one or two for each key that is sampled.
        """
        now_s = self._clock()
        weight = self._weight(now_s)
        kept = [(c, p) for c, p in zip(chains, places, strict=True) if c.keys and c.chunk_bytes]
        if not kept:
            return
        for _, found in kept:
            counts = np.bincount(found)
            self._places.resize(max(len(counts), len(self._places)), refcheck=False)
            self._places[: len(counts)] += counts * weight
        words = np.concatenate([words_of(chain.keys) for chain, _ in kept])
        lengths = [len(chain.keys) for chain, _ in kept]
        taken = [self._taken_bytes(chain.chunk_bytes) for chain, _ in kept]
        sizes = np.repeat(np.array(taken, dtype=np.int64), lengths)
        self._asked += len(words) * weight
        self._asked_bytes += float(sizes.sum()) * weight
        self.asked_total += len(words)
        used = self.sample.use(words[::-1], sizes[::-1])
        if not len(used.indexes):
            return
        self.sampled_total += len(used.indexes)
        indexes = len(words) - 1 - used.indexes[::-1]  # in order again
        depths, parts = _number(used.depths[::-1]), part_of(words[indexes, 1])
        np.add.at(self._depths, (depths, parts), weight / used.rate)
        uses = np.zeros(len(indexes), dtype=USE)
        group = np.searchsorted(np.cumsum(lengths), indexes, side="right")
        uses["position"] = positions = indexes - np.array([0, *np.cumsum(lengths)])[group]
        uses["asked"] = True
        # Several groups of a model keep KV of the same tokens; windows come on top.
        whole = sum(not chain.window for chain, _ in kept)
        shares = [(not whole or not chain.window) / (whole or len(kept)) for chain, _ in kept]
        length = np.array([chain.tokens_per_chunk for chain, _ in kept])[group]
        uses["tokens"] = tokens = length * np.array(shares)[group]
        before = positions * length + length / 2  # `Pace.prefill_s`, of each chunk
        uses["prefill_s"] = (pace.token_s + pace.pair_s * before) * tokens
        self._write(now_s, uses, words[indexes], sizes[indexes], group)

    def stored(self, chunks: Sequence[Chunk]) -> None:
        """Chunks that an engine computed, parents first, are the latest used."""
        if not chunks:
            return
        words = words_of([chunk.key for chunk in chunks])
        sizes = np.array([self._taken_bytes(chunk.length) for chunk in chunks], dtype=np.int64)
        used = self.sample.use(words[::-1], sizes[::-1])
        if not len(used.indexes):
            return
        indexes = len(words) - 1 - used.indexes[::-1]
        uses = np.zeros(len(indexes), dtype=USE)
        positions = np.array([chunk.position for chunk in chunks])
        uses["position"] = positions[indexes]
        sequence = np.cumsum(np.diff(positions, prepend=positions[0]) != 1)
        self._write(self._clock(), uses, words[indexes], sizes[indexes], sequence[indexes])

    def _write(
        self,
        now_s: float,
        uses: Uses,
        words: Words,
        sizes: NDArray[np.int64],
        group: NDArray[np.int64],
    ) -> None:
        uses["at_s"], uses["total"] = now_s, self.asked_total
        uses["key"], uses["word"] = words[:, 0], words[:, 1]
        uses["bytes"] = np.minimum(sizes, (1 << 32) - 1)
        uses["chain"] = self._chains + group
        self._chains += int(group.max(initial=0)) + 1
        places = (self._logged + np.arange(len(uses))) % len(self._log)
        self._log[places] = uses
        self._logged += len(uses)

    # -- what is asked -------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began

    def uses(self) -> Recent:
        """What is kept of the latest uses, by the sample as it is now. Cost: linear in it."""
        kept = min(self._logged, len(self._log))
        uses = self._log[(self._logged - kept + np.arange(kept)) % len(self._log)]
        since_s = self._clock() - self.window_s
        if self._logged > kept:
            since_s = max(since_s, float(uses["at_s"][kept // 2]))
        before = int(np.searchsorted(uses["at_s"], since_s))
        asked = self.asked_total - (int(uses["total"][before - 1]) if before else 0)
        seconds = self._clock() - max(since_s, self._began)
        most = self.sample.most
        keys, counts = np.unique(uses["key"][uses["key"] <= np.uint64(most)], return_counts=True)
        kept_keys = max(1, int(np.searchsorted(np.cumsum(counts), USES_TOLD, side="right")))
        if kept_keys < len(keys):
            most = int(keys[kept_keys]) - 1
        told = uses["key"] <= np.uint64(most)
        first = int(np.count_nonzero(told[:before]))
        return Recent(uses[told], first, asked, seconds, rate_of(most))

    def hit_rates(self, sizes_bytes: Sequence[float]) -> list[Estimate]:
        """Part of the chunks asked for that an LRU cache of each size finds."""
        sums = np.cumsum(self._depths, axis=0)
        in_all = sums.sum(axis=1)
        asked = max(self._asked, 1e-300)
        found: list[Estimate] = []
        for size_bytes in sizes_bytes:
            beyond = (sums[-1] - _at(sums, size_bytes)) / asked
            value = min(1.0, max(0.0, 1.0 - float(beyond.sum()))) if self._asked else 0.0
            error = ERRORS * spread_of(beyond, self.sample.rate)
            slack = self._sideways(in_all, size_bytes)
            found.append(Estimate(value, math.hypot(error, slack)))
        return found

    def sideways(self, size_bytes: float) -> float:
        """What of the hit rate may lie on the other side of a size so few sampled keys measure."""
        return self._sideways(np.cumsum(self._depths.sum(axis=1)), size_bytes)

    @property
    def chunk_bytes(self) -> float:
        """Of a chunk asked for, on average; 1 if none was."""
        return self._asked_bytes / self._asked if self._asked else 1.0

    def found(self) -> list[float]:
        """Part of the chunks asked for that really were in each place: 0 nowhere, 1 G2, ..."""
        parts: list[float] = (self._places / max(float(self._places.sum()), 1e-300)).tolist()
        return parts

    def check_integrity(self) -> None:
        """Assert that all sums are of the same lookups. Cost: linear."""
        self.sample.check_integrity()
        assert np.isclose(self._places.sum(), self._asked)
        assert self.sampled_total <= self.asked_total
        assert (self._depths >= 0).all()

    # -- below ---------------------------------------------------------------------------

    def _sideways(self, sums: Numbers, size_bytes: float) -> float:
        # The n keys that fill a size are known to 1 / sqrt(n).
        count = max(1.0, size_bytes * self.sample.rate / self.chunk_bytes)
        part = min(1.0, ERRORS * math.sqrt((1 - self.sample.rate) / count))
        # A size falls between two depths that are told apart: up to one of these on top.
        part = max(part, 2 ** (1 / OCTAVE) - 1)
        less, here, more = (float(_at(sums, size_bytes * by)) for by in (1 - part, 1, 1 + part))
        return max(more - here, here - less) / max(self._asked, 1e-300)

    def _weight(self, now_s: float) -> float:
        """Of what happens now."""
        passed = (now_s - self._base) / self.window_s
        if passed < _REBASE:
            return math.exp(passed)
        faded = math.exp(-passed)
        self._asked *= faded
        self._asked_bytes *= faded
        self._depths *= faded
        self._places *= faded
        self._base = now_s
        return 1.0


def part_of(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Of the sample, by the second half of keys."""
    return (words % np.uint64(PARTS)).astype(np.int64)


def spread_of(by_part: Numbers, rate: float) -> float:
    """Standard error of the sum, by how far the parts of the sample are apart.

    Nothing is left to chance in the part of all keys that is sampled.
    """
    return float(by_part.std(ddof=1)) * math.sqrt(PARTS * (1 - rate))


def _number(depths: Numbers) -> NDArray[np.int64]:
    numbers = (np.log2(np.maximum(depths, 1.0)) - LOWEST) * OCTAVE
    return np.asarray(np.clip(numbers, 0, DEPTHS), dtype=np.int64)


def _at(sums: Numbers, size_bytes: float) -> Numbers:
    """The running sum up to this size; within one number's span as if it were even."""
    if size_bytes <= 0:
        return np.zeros_like(sums[0])
    place = (math.log2(size_bytes) - LOWEST) * OCTAVE
    at = min(max(math.floor(place), 0), DEPTHS - 1)
    inside = min(max(place - at, 0.0), 1.0)
    before = sums[at - 1] if at else np.zeros_like(sums[0])
    return np.asarray(before + (sums[at] - before) * inside)
