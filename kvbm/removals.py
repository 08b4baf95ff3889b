"""Which chunks left which tier lately, when and why: so that a miss can be explained.

A table of fixed size, indexed by the keys themselves, which are digests: a newer removal takes the
place of an older one that falls on the same row. Costs 18 bytes a row however many chunks go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from storage_tiers.base import KEY_BYTES, Key, RemovalReason, TierName

ROWS: Final = 1 << 17

_TIERS: Final = tuple(TierName)
_REASONS: Final = tuple(RemovalReason)
_ROW: Final = np.dtype([("mark", "<u8"), ("at", "<f8"), ("tier", "u1"), ("reason", "u1")])


@dataclass(frozen=True, slots=True)
class Removal:
    """Chunks of a request that left the same tier for the same reason."""

    tier: TierName
    reason: RemovalReason
    chunks: int
    last_at: float  # seconds since 1970


class Removals:
    """One event loop calls it. `rows` is a power of two."""

    def __init__(self, rows: int = ROWS, clock: Callable[[], float] = time.time) -> None:
        self._table = np.zeros(rows, dtype=_ROW)
        self._clock = clock

    def add(self, tier: TierName, keys: Sequence[Key], reason: RemovalReason) -> None:
        rows, marks = self._find(keys)
        entry = (0, self._clock(), _TIERS.index(tier), _REASONS.index(reason))
        self._table[rows] = entry
        self._table["mark"][rows] = marks

    def explain(self, keys: Sequence[Key]) -> list[Removal]:
        """What is remembered of these keys' latest removals, most chunks first."""
        if not keys:
            return []
        rows, marks = self._find(keys)
        known = self._table[rows]
        known = known[(known["mark"] == marks) & (known["at"] > 0)]
        found: list[Removal] = []
        kinds, chunks = np.unique(known[["tier", "reason"]], return_counts=True)
        for (tier, reason), count in zip(kinds.tolist(), chunks.tolist(), strict=True):
            of_kind = known[(known["tier"] == tier) & (known["reason"] == reason)]
            last_at = float(of_kind["at"].max())
            found.append(Removal(_TIERS[tier], _REASONS[reason], count, last_at))
        return sorted(found, key=lambda removal: -removal.chunks)

    def _find(self, keys: Sequence[Key]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Each key's row, and what tells it from others there."""
        assert KEY_BYTES == 16
        halves = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
        return halves[:, 0] & np.uint64(len(self._table) - 1), halves[:, 1]
