"""When chunks come back, learnt from the requests that went by, and what they are worth until then.

Chunks are told apart by what is known of the request that used them last (`class_of`), or, where
many requests shared them and then went apart, by how many (`shared_class`). Nothing is random.
"""

from __future__ import annotations

from array import array
from math import log2
from typing import Final

import numpy as np
from numpy.typing import NDArray

PROBES_MIN: Final = 16384
RESIDENTS_PER_PROBE: Final = 8
TURNS: Final = 6
"""Classes by how many requests have extended this path one after the other; the last is open."""
GROWTHS: Final = 9
"""Classes by octave of how many chunks the last request added; the last is open."""
GAPS: Final = 6
"""Classes by how long before it the path was used: not at all, then three octaves of seconds."""
SHARED: Final = 6
"""Classes by octave of how often a chunk was used that several requests went on from."""
PATHS: Final = TURNS * GROWTHS * GAPS * 2
CLASSES: Final = PATHS + SHARED
AGES: Final = 48
"""Ages are told apart by half octaves of seconds; 48 of them are half a year."""
SPANS: Final = 12
"""Parts of all ages, within which the effect of the gap is the same."""
OBSERVATIONS_PRIOR: Final = 24.0
"""Observations after which a class's own record weighs as much as what is said without it."""
REUSE_PRIOR: Final = 0.05
"""Chance of reuse in each half octave before anything is known: falls as 1/age, which is LRU."""
OBSERVATIONS_KEPT: Final = 65536
"""Observations (or two tables' worth, if more) after which old ones weigh half."""
FIT_EVERY_MIN: Final = 64
REUSE_MAX: Final = 1 - 1e-6
"""Nothing is certain: so no age has chance 0 of being reached."""
ROUNDS: Final = 3
"""Of fitting the factors, each to what the others leave to explain."""


def class_of(turn: int, fresh: int, gap_s: int, tail: int) -> int:
    """What the last request on a path says of it.

    turn: how many requests extended it one after the other. fresh: chunks the last one added.
    gap_s: seconds since the one before, or -1. tail: 1 for the last chunk of a request, to which
    nothing was ever added.
    """
    growth = fresh.bit_length()
    if growth >= GROWTHS:  # not min(): this runs for every new chunk
        growth = GROWTHS - 1
    turn = min(turn, TURNS)
    gap = 0 if gap_s < 0 else 1 + gap_s.bit_length() // 3
    if gap >= GAPS:
        gap = GAPS - 1
    return (((turn - 1) * GROWTHS + growth) * GAPS + gap) * 2 + tail


def shared_class(uses: int) -> int:
    """Of a chunk that this many requests used, of which several went on in different ways."""
    return PATHS + min(uses.bit_length() - 2, SHARED - 1)


def turn_of(kind: int) -> int:
    """The `turn` of a class; 0 where it has none."""
    return kind // (2 * GAPS * GROWTHS) + 1 if kind < PATHS else 0


def age_index(age_s: int) -> int:
    if age_s < len(_NEAR):
        return _NEAR[age_s]
    index = int(2 * log2(age_s + 1))
    return index if index < AGES else AGES - 1


_NEAR: Final = bytes(int(2 * log2(age_s + 1)) for age_s in range(4096))


class Survival:
    """When chunks of each class come back, learnt from probes: keys that wait for their next use.

    A probe ends when its key is used (an event) or its place is taken (it left the study at that
    age). From these and the probes that still wait comes the chance of reuse at each age, by the
    actuarial life table. 14 bytes for each probe; a power of two of them, `PROBES_MIN` or at most
    one for every eight residents.
    """

    def __init__(self) -> None:
        self._allot(PROBES_MIN)
        self._used = array("d", bytes(8 * CLASSES * AGES))
        self._lost = array("d", bytes(8 * CLASSES * AGES))
        self._steps = 0
        self._fit_at = 0
        self.worth: list[float] = []
        """Index by class * AGES + age_index: hits per second for which a chunk stays."""
        self._fit(0)

    def __len__(self) -> int:
        return self._mask + 1

    def fit_to(self, residents: int) -> None:
        """Double the table when there are twice as many residents. Cost: linear, if it does."""
        if residents < 2 * RESIDENTS_PER_PROBE * len(self):
            return
        waiting = zip(self._keys, self._ticks, self._classes, strict=True)
        self._allot(2 * len(self))
        for key, tick, kind in waiting:
            slot = key >> 6 & self._mask
            self._keys[slot], self._ticks[slot], self._classes[slot] = key, tick, kind

    def seen(self, key: int, tick: int) -> tuple[int, int] | None:
        """A key is used. Class and age in seconds of its probe, which ends, if there was one."""
        slot = key >> 6 & self._mask
        if self._keys[slot] != key:
            return None
        kind, age_s = self._classes[slot], max(tick - self._ticks[slot], 0)
        self._used[kind * AGES + age_index(age_s)] += 1
        self._keys[slot] = 0
        self._steps += 1
        return kind, age_s

    def probe(self, key: int, tick: int, kind: int) -> None:
        """Wait for the next use of a key that was used at `tick` and belongs to this class."""
        slot = key >> 6 & self._mask
        held = self._keys[slot]
        if held and held != key:
            age_s = max(tick - self._ticks[slot], 0)
            self._lost[self._classes[slot] * AGES + age_index(age_s)] += 1
        self._keys[slot], self._ticks[slot], self._classes[slot] = key, tick, kind
        self._steps += 1
        if self._steps >= self._fit_at:
            self._fit(tick)

    def forget(self, key: int) -> None:
        """Withdraw a probe that was set too early; it counts as nothing."""
        slot = key >> 6 & self._mask
        if self._keys[slot] == key:
            self._keys[slot] = 0

    def _allot(self, size: int) -> None:
        self._mask = size - 1
        self._keys = array("Q", bytes(8 * size))
        self._ticks = array("I", bytes(4 * size))
        self._classes = array("H", bytes(2 * size))

    def _fit(self, tick: int) -> None:
        """Life tables of all classes, and what a chunk is worth at each age. Cost: some ms."""
        shape = (CLASSES, AGES)
        used = np.frombuffer(self._used).reshape(shape)
        lost = np.frombuffer(self._lost).reshape(shape)
        left = lost + self._waiting(tick).reshape(shape)
        at_risk = np.cumsum((used + left)[:, ::-1], axis=1)[:, ::-1] - left / 2
        self.worth = gittins(reuse_chances(used, at_risk)).ravel().tolist()
        every = max(FIT_EVERY_MIN, min(self._steps // 4, len(self) // 16))
        self._fit_at = self._steps + every
        keep = 0.5 ** (every / max(OBSERVATIONS_KEPT, 2 * len(self)))
        used *= keep
        lost *= keep

    def _waiting(self, tick: int) -> NDArray[np.int64]:
        """How many probes wait now, by class and age."""
        alive = np.frombuffer(self._keys, dtype=np.uint64) != 0
        since = np.frombuffer(self._ticks, dtype=np.uint32)[alive].astype(np.int64)
        ages_s = np.maximum(tick - since, 0)
        index = np.minimum(2 * np.log2(ages_s + 1), AGES - 1).astype(np.int64)
        kinds = np.frombuffer(self._classes, dtype=np.uint16)[alive].astype(np.int64)
        return np.bincount(kinds * AGES + index, minlength=CLASSES * AGES)


Table = NDArray[np.float64]


def reuse_chances(used: Table, at_risk: Table) -> Table:
    """The chance of reuse of each class (row) in each age's interval (column), given both counts.

    A class of which little was seen follows a product of factors, one for each thing that is known
    of it, so that a combination never seen takes from each what others show. Each factor is events
    against those expected from the others alone, with the same number of imagined ones to
    either: an indirect standardisation.
    """
    path = (TURNS, GROWTHS, GAPS, 2, SPANS, AGES // SPANS)
    likely = np.empty_like(used)
    likely[:PATHS] = _product(
        used[:PATHS].reshape(path), at_risk[:PATHS].reshape(path), ((0,), (1,), (2, 4), (3, 4))
    ).reshape(PATHS, AGES)
    shared = (SHARED, SPANS, AGES // SPANS)
    likely[PATHS:] = _product(
        used[PATHS:].reshape(shared), at_risk[PATHS:].reshape(shared), ((0,),)
    ).reshape(SHARED, AGES)
    own = (used.sum(1) + OBSERVATIONS_PRIOR) / ((at_risk * likely).sum(1) + OBSERVATIONS_PRIOR)
    likely = np.minimum(likely * own[:, None], 0.9)
    reuse: Table = (used + OBSERVATIONS_PRIOR * likely) / (at_risk + OBSERVATIONS_PRIOR)
    return reuse


def _product(used: Table, at_risk: Table, kept: tuple[tuple[int, ...], ...]) -> Table:
    """A chance by age (the last two axes) times a factor for each of these sets of axes."""
    axes = range(used.ndim)
    age = (used.ndim - 2, used.ndim - 1)
    others = [tuple(a for a in axes if a not in keep) for keep in (age, *kept)]
    events = [used.sum(other, keepdims=True) + OBSERVATIONS_PRIOR for other in others]
    events[0] += OBSERVATIONS_PRIOR * (REUSE_PRIOR - 1)
    factors = [np.array(REUSE_PRIOR)] + [np.array(1.0)] * len(kept)
    for _ in range(ROUNDS):
        for index, other in enumerate(others):
            expected = at_risk
            for factor in factors[:index] + factors[index + 1 :]:
                expected = expected * factor
            factors[index] = events[index] / (
                expected.sum(other, keepdims=True) + OBSERVATIONS_PRIOR
            )
    likely = np.ones_like(used)
    for factor in factors:
        likely = likely * factor
    return likely


def gittins(reuse: Table) -> Table:
    """Hits per second of space, from each age on, if one gives up at the best later age.

    `reuse` is the chance of reuse within each age's interval, by class. This is the Gittins index
    (J. R. Stat. Soc. B 41, 1979) of one chunk; LHD (NSDI'18) is the same rate without giving up.
    """
    width_s = np.diff(np.exp2(np.arange(AGES + 1) / 2))
    alive = np.ones((len(reuse), AGES + 1))
    np.cumprod(1 - np.minimum(reuse, REUSE_MAX), axis=1, out=alive[:, 1:])
    ahead_s = np.zeros_like(alive)  # expected, from each age's beginning to the last age's end
    spent_s = (alive[:, :-1] + alive[:, 1:]) / 2 * width_s
    ahead_s[:, :-1] = np.cumsum(spent_s[:, ::-1], axis=1)[:, ::-1]
    best = np.empty_like(reuse)
    for age in range(AGES):
        hits = alive[:, age, None] - alive[:, age + 1 :]
        best[:, age] = (hits / (ahead_s[:, age, None] - ahead_s[:, age + 1 :])).max(axis=1)
    return best
