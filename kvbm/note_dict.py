"""A notebook in dictionaries: the plain implementation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from kvbm.manager import BlockEvents
from kvbm.note import is_note
from storage_tiers.base import Key, TierName

_BITS: Final = {tier: 1 << place for place, tier in enumerate(TierName)}


class NoteDict:
    """Block events on their way out, and the notes of what they say is kept."""

    def __init__(self, onward: BlockEvents) -> None:
        self._onward = onward
        self._notes: dict[Key, bytes] = {}
        self._tiers: dict[Key, int] = {}  # that have the chunk, by `_BITS`

    def __len__(self) -> int:
        return len(self._notes)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._notes)

    def learn(self, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        self._notes.update((k, note) for k, note in zip(keys, notes, strict=True) if is_note(note))

    def note_of(self, key: Key) -> bytes:
        return self._notes.get(key, b"")

    def stored(self, tier: TierName, keys: Sequence[Key]) -> None:
        for key in keys:
            self._tiers[key] = self._tiers.get(key, 0) | _BITS[tier]
        self._onward.stored(tier, keys)

    def removed(self, tier: TierName, keys: Sequence[Key]) -> None:
        for key in keys:
            if left := self._tiers.pop(key, 0) & ~_BITS[tier]:
                self._tiers[key] = left
            else:
                self._notes.pop(key, None)
        self._onward.removed(tier, keys)
