"""What readers on other nodes are told of this node's host memory.

For each reader a set of keys whose state it has not been told yet: at first all residents, then
whatever changes. What is told is what is the case when it is sent, so changes need no order, many
changes of one key become one, and a reader that has read everything knows exactly what is here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Final

from kvbm.manager import BlockEvents
from kvbm.peers.wire import KEYS_PER_HAVE_MAX, Gone, Have, pack_have
from storage_tiers.base import Key, TierName
from storage_tiers.dram import DramTier

CHANGES_MAX: Final = 1 << 20
_TOLD_AT_ONCE: Final = min(2048, KEYS_PER_HAVE_MAX)  # a frame's worth costs the loop about a ms


class Following:
    """One reader's place. Made by `Contents.follow`."""

    def __init__(self, dram: DramTier) -> None:
        self._dram = dram
        self._untold: dict[Key, None] = dict.fromkeys(dram.all_keys())
        self._limit = len(self._untold) + CHANGES_MAX
        self._changed = asyncio.Event()
        self.is_lost = False  # it reads so slowly that it has to begin anew
        if self._untold:
            self._changed.set()

    def note(self, keys: Sequence[Key]) -> None:
        """These may have come or gone."""
        if self.is_lost:
            return
        self._untold.update(dict.fromkeys(keys))
        if len(self._untold) > self._limit:
            self.is_lost = True
            self._untold.clear()
        self._changed.set()

    async def next(self) -> list[Have | Gone]:
        """What to tell next; waits until there is something. Empty once `is_lost`."""
        while not self._untold and not self.is_lost:
            self._changed.clear()
            await self._changed.wait()
        keys = list(islice(self._untold, _TOLD_AT_ONCE))
        for key in keys:
            del self._untold[key]
        found = self._dram.find(keys)
        here = [chunk for chunk in found if chunk is not None]
        gone = [key for key, chunk in zip(keys, found, strict=True) if chunk is None]
        told: list[Have | Gone] = [pack_have(here)] if here else []
        return [*told, Gone(b"".join(gone))] if gone else told


class Contents:
    """Block events on their way out, with an eye on those of host memory."""

    def __init__(self, onward: BlockEvents) -> None:
        self._onward = onward
        self._following: set[Following] = set()

    def follow(self, dram: DramTier) -> Following:
        following = Following(dram)
        self._following.add(following)
        return following

    def leave(self, following: Following) -> None:
        self._following.discard(following)

    def again(self, keys: Sequence[Key]) -> None:
        """Tell everybody once more whether these are here."""
        self._note(TierName.DRAM, keys)

    def stored(self, tier: TierName, keys: Sequence[Key]) -> None:
        self._note(tier, keys)
        self._onward.stored(tier, keys)

    def removed(self, tier: TierName, keys: Sequence[Key]) -> None:
        self._note(tier, keys)
        self._onward.removed(tier, keys)

    def _note(self, tier: TierName, keys: Sequence[Key]) -> None:
        if tier is TierName.DRAM:
            for following in self._following:
                following.note(keys)
