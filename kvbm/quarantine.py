"""What was taken out of use because its bytes were wrong: the latest of it, for operators.

Tiers tell their listener that a key is gone as corrupt; who saw the outcome of the load says why.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from storage_tiers.base import Key, SetAside, TierName

ENTRIES_MAX: Final = 1024
_WHY: Final = {TierName.DRAM: "the bytes in host memory do not match their checksum"}
_WHY_ELSEWHERE: Final = "the bytes that were read are not the chunk's"
_WHY_BEFORE: Final = f"{_WHY_ELSEWHERE}; found before the daemon was restarted"


@dataclass(frozen=True, slots=True)
class Quarantined:
    tier: TierName
    key: Key
    at: float  # seconds since 1970
    why: str
    held_bytes: int = 0  # of the tier, out of use because of it


class Quarantine:
    """The last `ENTRIES_MAX`, oldest first; `total` counts all of them. One event loop calls it."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entries: deque[Quarantined] = deque(maxlen=ENTRIES_MAX)
        self.total = 0

    def add(self, tier: TierName, keys: Sequence[Key]) -> None:
        """These keys left the tier as corrupt."""
        why = _WHY.get(tier, _WHY_ELSEWHERE)
        now = self._clock()
        self._entries.extend(Quarantined(tier, key, now, why) for key in keys)
        self.total += len(keys)

    def explain(self, tier: TierName, key: Key, why: str) -> None:
        """What exactly was wrong with the key that left last. Cost: linear in the entries."""
        for index in range(len(self._entries) - 1, -1, -1):
            entry = self._entries[index]
            if (entry.tier, entry.key) == (tier, key):
                self._entries[index] = replace(entry, why=why)
                return

    def recall(self, tier: TierName, extents: Sequence[SetAside]) -> None:
        """What an earlier daemon set aside. Not in `total`, which is this one's."""
        recalled = [Quarantined(tier, e.key, e.since, _WHY_BEFORE) for e in extents]
        known = sorted([*recalled, *self._entries], key=lambda entry: entry.at)
        self._entries = deque(known, maxlen=ENTRIES_MAX)

    def forget(self, keys: Collection[Key] | None) -> int:
        """Take these off the list, all if None; how many entries that were."""
        kept = [] if keys is None else [e for e in self._entries if e.key not in keys]
        gone = len(self._entries) - len(kept)
        self._entries = deque(kept, maxlen=ENTRIES_MAX)
        return gone

    def entries(self) -> list[Quarantined]:
        return list(self._entries)
