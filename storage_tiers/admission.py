"""What is known of chunks that are not resident, and which of them are worth storing.

`Ghosts` remembers fingerprints of chunks that passed, `Survival` learns from a sample of them when
chunks come back. Both are tables of a power of two entries, never more than there are residents
(256 at least), in which a newer entry overwrites an older one with the same place.
Admission decides before a tier spends its bandwidth and wear on a chunk. Nothing here is random.
"""

from __future__ import annotations

from array import array
from math import log2
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

SLOTS_MIN: Final = 256
TURNS: Final = 6
"""Classes by how many requests have extended this path one after the other; the last is open."""
GROWTHS: Final = 9
"""Classes by octave of how many chunks the last request added; the last is open."""
CLASSES: Final = TURNS * GROWTHS * 2
AGES: Final = 48
"""Ages are told apart by half octaves of seconds; 48 of them are half a year."""
OBSERVATIONS_PRIOR: Final = 8.0
"""Observations after which a class's own record weighs as much as what all classes say."""
REUSE_PRIOR: Final = 0.05
"""Chance of reuse in each half octave before anything is known: falls as 1/age, which is LRU."""
OBSERVATIONS_KEPT: Final = 65536
"""Observations (or two tables' worth, if more) after which old ones weigh half."""
FIT_EVERY_MIN: Final = 256


class Admission(Protocol):
    """The seam. `key` as in `EvictionPolicy`; `parent` is a record of the tier's policy or -1."""

    def admits(
        self, key: int, now_s: float, *, parent: int, cost_s: float, size_bytes: int, full: bool
    ) -> bool:
        """Whether to store this chunk; `full` says that another would have to go for it."""
        ...


class AdmitAll:
    """Everything is stored."""

    def admits(
        self, key: int, now_s: float, *, parent: int, cost_s: float, size_bytes: int, full: bool
    ) -> bool:
        return True


class AdmitSeenTwice:
    """What is offered a second time is stored, as long as its first offer is remembered.

    `offers_remembered` bounds it, 8 bytes each, rounded down to a power of two.
    """

    def __init__(self, offers_remembered: int) -> None:
        self._offered = Ghosts()
        self._offered.fit_to(offers_remembered)

    def admits(
        self, key: int, now_s: float, *, parent: int, cost_s: float, size_bytes: int, full: bool
    ) -> bool:
        if key in self._offered:
            return True
        self._offered.add(key)
        return False


class Worths(Protocol):
    """What value admission asks of the eviction policy of its tier; `ValuePolicy` answers."""

    def arrival_worth(self, now_s: float, parent: int, cost_s: float, size_bytes: int) -> float: ...

    def victim_worth(self, now_s: float) -> float: ...


class AdmitValue:
    """A chunk is stored if it is worth at least what would go for it (TinyLFU, ACM ToS 2017)."""

    def __init__(self, policy: Worths) -> None:
        self._policy = policy

    def admits(
        self, key: int, now_s: float, *, parent: int, cost_s: float, size_bytes: int, full: bool
    ) -> bool:
        if not full:
            return True
        worth = self._policy.arrival_worth(now_s, parent, cost_s, size_bytes)
        return worth >= self._policy.victim_worth(now_s)


class Ghosts:
    """A set of fingerprints that forgets: 8 bytes each. A key of 0 is never in it."""

    def __init__(self) -> None:
        self._keys = array("Q", bytes(8 * SLOTS_MIN))
        self._mask = SLOTS_MIN - 1

    def __contains__(self, key: int) -> bool:
        return self._keys[key & self._mask] == key != 0

    def __len__(self) -> int:
        return self._mask + 1

    def add(self, key: int) -> None:
        self._keys[key & self._mask] = key

    def fit_to(self, count: int) -> None:
        """Grow to the largest power of two that is not more than this. Cost: linear, if it does."""
        size = self._mask + 1
        while 2 * size <= count:
            size *= 2
        if size == self._mask + 1:
            return
        kept, self._keys, self._mask = self._keys, array("Q", bytes(8 * size)), size - 1
        for key in kept:
            self._keys[key & self._mask] = key


def class_of(turn: int, fresh: int, tail: int) -> int:
    """What the last request on a path says of it.

    turn: how many requests extended it one after the other. fresh: chunks the last one added.
    tail: 1 for the last chunk of a request, to which nothing was ever added.
    """
    growth = fresh.bit_length()
    if growth >= GROWTHS:  # not min(): this runs for every use of every chunk
        growth = GROWTHS - 1
    turn = min(turn, TURNS)
    return ((turn - 1) * GROWTHS + growth) * 2 + tail


def turn_of(kind: int) -> int:
    return kind // (2 * GROWTHS) + 1


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
    actuarial life table. A class of which little was seen follows all classes together times
    its own factor of more or fewer events. 13 bytes for each probe.
    """

    def __init__(self) -> None:
        self._mask = SLOTS_MIN - 1
        self._keys = array("Q", bytes(8 * SLOTS_MIN))
        self._ticks = array("I", bytes(4 * SLOTS_MIN))
        self._classes = array("B", bytes(SLOTS_MIN))
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
        if residents < 2 * len(self):
            return
        waiting = zip(self._keys, self._ticks, self._classes, strict=True)
        size = 2 * len(self)
        self._mask = size - 1
        self._keys = array("Q", bytes(8 * size))
        self._ticks = array("I", bytes(4 * size))
        self._classes = array("B", bytes(size))
        for key, tick, kind in waiting:
            slot = key >> 6 & self._mask
            self._keys[slot], self._ticks[slot], self._classes[slot] = key, tick, kind

    def seen(self, key: int, tick: int) -> int:
        """A key is used. The class of its probe, which ends, or -1 if there is none."""
        slot = key >> 6 & self._mask
        if self._keys[slot] != key:
            return -1
        kind = self._classes[slot]
        self._used[kind * AGES + age_index(tick - self._ticks[slot])] += 1
        self._keys[slot] = 0
        self._steps += 1
        return kind

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

    def _fit(self, tick: int) -> None:
        """Life tables of all classes, and what a chunk is worth at each age. Cost: a few ms."""
        shape = (CLASSES, AGES)
        used = np.frombuffer(self._used).reshape(shape)
        lost = np.frombuffer(self._lost).reshape(shape)
        left = lost + self._waiting(tick).reshape(shape)
        at_risk = np.cumsum((used + left)[:, ::-1], axis=1)[:, ::-1] - left / 2
        prior = OBSERVATIONS_PRIOR
        together = (used.sum(0) + prior * REUSE_PRIOR) / (at_risk.sum(0) + prior)
        # Events against those expected if the class were like all: an indirect standardisation.
        factor = (used.sum(1) + prior) / (at_risk @ together + prior)
        likely = np.minimum(factor[:, None] * together, 0.9)
        reuse = (used + prior * likely) / (at_risk + prior)
        self.worth = gittins(reuse).ravel().tolist()
        every = max(FIT_EVERY_MIN, len(self) // 8)
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
        kinds = np.frombuffer(self._classes, dtype=np.uint8)[alive].astype(np.int64)
        return np.bincount(kinds * AGES + index, minlength=CLASSES * AGES)


def gittins(reuse: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hits per second of space, from each age on, if one gives up at the best later age.

    `reuse` is the chance of reuse within each age's interval, by class. This is the Gittins index
    (J. R. Stat. Soc. B 41, 1979) of one chunk; LHD (NSDI'18) is the same rate without giving up.
    """
    width_s = np.diff(np.exp2(np.arange(AGES + 1) / 2))
    best = np.empty_like(reuse)
    for age in range(AGES):
        alive = np.cumprod(1 - reuse[:, age:], axis=1)
        before = np.concatenate([np.ones((len(reuse), 1)), alive[:, :-1]], axis=1)
        spent_s = np.cumsum((before + alive) / 2 * width_s[age:], axis=1)
        best[:, age] = ((1 - alive) / spent_s).max(axis=1)
    return best
