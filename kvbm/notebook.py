"""Which chunks this node keeps in which tier, and the note of each: a `NoteBook` in columns.

56 bytes a chunk and its hashes (`runtime.ledger`). Of keys in no tier only the latest few are
remembered: their notes come just before the word that they are kept, and a chunk that is written
from one tier to another may be in neither for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.manager import BlockEvents
from kvbm.note import NOTE_BYTES_MAX, VERSION, Note
from runtime.ledger import KEY_WORDS, KEYS_AT_ONCE_MAX, Group, Keys, Ledger, Run
from storage_tiers.base import Key, TierName

SLACK: Final = 1 << 16
EVENT_BLOCKS_MAX: Final = 4096
TIERS: Final = (TierName.DRAM, TierName.SSD, TierName.S3)
_BIT: Final = {tier: bit for bit, tier in enumerate(TIERS)}
_HEAD_WORDS: Final = 3
_HEAD_BYTES: Final = 8 * _HEAD_WORDS

Words = npt.NDArray[np.uint64]


class Notebook:
    """One thread calls it. Keys of one call of `stored` or `removed`: KEYS_AT_ONCE_MAX at most."""

    def __init__(self, slack: int = SLACK) -> None:
        self._ledger = Ledger(slack=slack, run_blocks_max=EVENT_BLOCKS_MAX)
        self.refused_total = 0

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def bare(self) -> int:
        """Chunks that are kept, and whose notes are not known."""
        return self._ledger.bare

    @property
    def used_bytes(self) -> int:
        return self._ledger.used_bytes

    def blocks(self, tier: TierName) -> int:
        return self._ledger.blocks(_BIT[tier])

    # -- notes ---------------------------------------------------------------------------

    def learn(self, keys: Sequence[Key], notes: Sequence[bytes]) -> list[Key]:
        """One note a key, empty if it has none. Those of the keys that were in a tier before."""
        sizes = [len(note) for note in notes]
        late: list[Key] = []
        for size in set(sizes) - {0}:
            if size < _HEAD_BYTES + 8 or size > NOTE_BYTES_MAX or size % 8:
                self.refused_total += sizes.count(size)
                continue
            those = [index for index, other in enumerate(sizes) if other == size]
            for start in range(0, len(those), KEYS_AT_ONCE_MAX):
                part = those[start : start + KEYS_AT_ONCE_MAX]
                late += self._learn_equal([keys[n] for n in part], [notes[n] for n in part])
        return late

    def note_of(self, key: Key) -> bytes:
        row = int(self._ledger.rows_of(_words_of([key]))[0])
        found = None if row < 0 else self._ledger.note(row)
        return b"" if found is None else Note(*found).encode()

    # -- residencies ---------------------------------------------------------------------

    def stored(self, tier: TierName, keys: Sequence[Key]) -> list[Run]:
        """What that adds to the tier, of chunks whose notes are known."""
        rows = self._ledger.mark(_BIT[tier], _words_of(keys))
        return self._ledger.stored(rows)

    def removed(self, tier: TierName, keys: Sequence[Key]) -> list[Run]:
        """What that takes from the tier, of chunks whose notes are known."""
        rows = self._ledger.clear(_BIT[tier], _words_of(keys))
        return self._ledger.removed(rows)

    def trim(self) -> None:
        """Forget keys in no tier, but for the latest. Call it when all is told that is known."""
        self._ledger.trim()

    def kept(self, keys: Sequence[Key]) -> list[tuple[TierName, Run]]:
        """What these are, in every tier that they are in."""
        rows = self._ledger.rows_of(_words_of(keys))
        rows = rows[rows >= 0]
        return [
            (tier, run)
            for bit, tier in enumerate(TIERS)
            for run in self._ledger.stored(self._ledger.having(bit, rows))
        ]

    def groups(self, blocks: int) -> Iterator[list[tuple[TierName, Group]]]:
        """Everything that is kept, about so many blocks at a time: see `Ledger.groups`."""
        for groups in self._ledger.groups(len(TIERS), blocks):
            yield [(TIERS[group.bit], group) for group in groups]

    def check_integrity(self) -> None:
        self._ledger.check_integrity()

    # -- below ---------------------------------------------------------------------------

    def _learn_equal(self, keys: Sequence[Key], notes: Sequence[bytes]) -> list[Key]:
        """Of notes that are equally long."""
        words: Words = np.frombuffer(b"".join(notes), "<u8").reshape(len(notes), -1)
        heads = words[:, 0]
        count = words.shape[1] - _HEAD_WORDS
        sound = (heads & np.uint64(0xFF) == VERSION) & (
            heads >> np.uint64(16) & np.uint64(0xFFFF) == count
        )
        domains, numbers = self._domains(words[:, 1])
        sound &= numbers[domains] >= 0
        self.refused_total += len(notes) - int(np.count_nonzero(sound))
        those = np.flatnonzero(sound)
        given = [keys[index] for index in those.tolist()]
        late = self._ledger.learn(
            _words_of(given), words[those], numbers[domains[those]].astype(np.uint32)
        )
        return [given[index] for index in late.tolist()]

    def _domains(self, domains: Words) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which of the numbers each has; -1 is none."""
        if (domains == domains[0]).all():
            unique, which = domains[:1], np.zeros(len(domains), np.int64)
        else:
            unique, which = np.unique(domains, return_inverse=True)
        found = [self._ledger.number_of(domain) for domain in unique.tolist()]
        return which, np.array([-1 if number is None else number for number in found], np.int64)


class NoteKeeper:
    """A notebook where there is no event plane: nodes that share the bucket may have routers.

    A `NoteBook`, and `BlockEvents` on their way out.
    """

    def __init__(self, onward: BlockEvents) -> None:
        self.notebook = Notebook()
        self._onward = onward

    def learn(self, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        self.notebook.learn(keys, notes)

    def note_of(self, key: Key) -> bytes:
        return self.notebook.note_of(key)

    def stored(self, tier: TierName, keys: Sequence[Key]) -> None:
        self._enter(self.notebook.stored, tier, keys)
        self._onward.stored(tier, keys)

    def removed(self, tier: TierName, keys: Sequence[Key]) -> None:
        self._enter(self.notebook.removed, tier, keys)
        self._onward.removed(tier, keys)

    def _enter(
        self,
        change: Callable[[TierName, Sequence[Key]], object],
        tier: TierName,
        keys: Sequence[Key],
    ) -> None:
        if tier in TIERS:
            for at in range(0, len(keys), KEYS_AT_ONCE_MAX):
                change(tier, keys[at : at + KEYS_AT_ONCE_MAX])
            self.notebook.trim()


def _words_of(keys: Sequence[Key]) -> Keys:
    return np.frombuffer(b"".join(keys), "<u8").reshape(-1, KEY_WORDS)
