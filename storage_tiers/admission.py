"""Which chunks are worth storing: decided before a tier spends its bandwidth and wear on them.

`Ghosts` remembers fingerprints of chunks that passed, in a table of a power of two entries, in
which a newer entry overwrites an older one with the same place. Nothing here is random.
"""

from __future__ import annotations

from array import array
from typing import Final, Protocol

SLOTS_MIN: Final = 256


class Admission(Protocol):
    """The seam; a tier without one stores everything.

    `key` as in `EvictionPolicy`; `parent` is a record of the tier's policy or -1.
    """

    def admits(
        self, key: int, now_s: float, *, parent: int, cost_s: float, size_bytes: int, full: bool
    ) -> bool:
        """Whether to store this chunk; `full` says that another would have to go for it."""
        ...


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
