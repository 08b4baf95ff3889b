"""A tier in miniature: what its policy would keep of sampled keys in so many bytes (Waldspurger et
al., ATC'17). A sample of one key in a hundred through a hundredth of the room finds about the part
of its uses that all keys would find in all of it, by whatever policy the tier has.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage_tiers.chunk_index import DEPTH_DOUBLES
from storage_tiers.leaves import NONE
from storage_tiers.policy import EvictionPolicy

USE: Final = np.dtype(
    [
        ("at_s", "<f8"),
        ("total", "<u8"),  # uses of all keys so far that were asked for, this one's request with
        ("chain", "<u8"),  # consecutive uses with the same number are of one sequence, root first
        ("key", "<u8"),
        ("word", "<u8"),  # the other half of the key
        ("bytes", "<u4"),
        ("position", "<u4"),
        ("tokens", "<f4"),
        ("prefill_s", "<f4"),
        ("asked", "?"),  # else stored without being asked for
    ]
)
Uses = NDArray[Any]  # of USE
_TURN: Final = 8  # sequences, some milliseconds at most


def replay(uses: Uses, policy: EvictionPolicy, room_bytes: float) -> NDArray[np.bool_]:
    """Which of the uses find their chunk, and all before it; what is not found is stored.

    Every chunk is let in. Cost: 5 to 30 microseconds a use, by the policy.
    """
    tier = _Miniature(policy, room_bytes)
    found = np.zeros(len(uses), dtype=np.bool_)
    if not len(uses):
        return found
    bounds = np.flatnonzero(np.diff(uses["chain"], prepend=~uses["chain"][0])).tolist()
    times = uses["at_s"].tolist()
    keys, sizes, positions = (uses[name].tolist() for name in ("key", "bytes", "position"))
    asked = uses["asked"].tolist()
    for number, (start, end) in enumerate(zip(bounds, [*bounds[1:], len(uses)], strict=True)):
        depth = tier.use(
            times[start],
            keys[start:end],
            sizes[start:end],
            positions[start:end],
            is_asked=asked[start],
        )
        found[start : start + depth] = True
        if number % _TURN == 0:
            time.sleep(0)  # who serves engines on another thread need not ask for the interpreter
    return found


class _Miniature:
    def __init__(self, policy: EvictionPolicy, room_bytes: float) -> None:
        self._policy = policy
        self._left = room_bytes
        self._record_of: dict[int, int] = {}
        self._chunks: list[tuple[int, int]] = []  # by record: key, bytes
        self._unused: list[int] = []

    def use(
        self,
        now_s: float,
        keys: list[int],
        sizes: list[int],
        positions: list[int],
        *,
        is_asked: bool,
    ) -> int:
        """How many of a sequence's chunks are here without a gap; then all are, if they fit.

        Not a use of those that are here if they are only stored: they were asked for just before.
        """
        record_of, policy = self._record_of, self._policy
        depth = next((i for i, key in enumerate(keys) if key not in record_of), len(keys))
        for key in reversed(keys[:depth] if is_asked else []):
            policy.hit(record_of[key], key or 1, now_s)
        held = {record_of[key] for key in keys if key in record_of}
        parent = record_of[keys[depth - 1]] if depth else NONE
        for key, size, position in zip(keys[depth:], sizes[depth:], positions[depth:], strict=True):
            record = record_of.get(key, NONE)
            if record == NONE:
                if not self._make_room(size, held):
                    break
                record = self._unused.pop() if self._unused else len(self._chunks)
                if record == len(self._chunks):
                    self._chunks.append((key, size))
                self._chunks[record] = key, size
                record_of[key] = record
                held.add(record)
                self._left -= size
                cost_s = size * (1 + position / DEPTH_DOUBLES)
                policy.inserted(
                    record, key or 1, now_s, parent=parent, cost_s=cost_s, size_bytes=size
                )
            parent = record
        return depth

    def _make_room(self, size: int, held: set[int]) -> bool:
        while self._left < size:
            victim = next((v for v in self._policy.victims() if v not in held), NONE)
            if victim == NONE:
                return False  # the sequence alone is larger
            key, freed = self._chunks[victim]
            self._policy.removed(victim, key or 1)
            del self._record_of[key]
            self._unused.append(victim)
            self._left += freed
        return True
