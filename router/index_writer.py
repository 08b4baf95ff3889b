"""The one who writes to an index: events are gathered and applied by one call.

Whoever needs the index as it is by all that was gathered takes it from `settled`. So the order is
always that in which events came, whoever applies them.
"""

from __future__ import annotations

from typing import Final

from router.changes import Changes
from router.index import Index, Tier
from runtime.events.router_event import StorageTier

TIER_OF: Final = {
    StorageTier.DEVICE: Tier.G1,
    StorageTier.HOST_PINNED: Tier.G2,
    StorageTier.DISK: Tier.G3,
    StorageTier.EXTERNAL: Tier.G4,
}


class IndexWriter:
    """Used from one thread."""

    def __init__(self, index: Index) -> None:
        self.changes = Changes()
        self._index = index

    def flush(self) -> None:
        """Apply what was gathered."""
        if len(self.changes):
            self._index.apply(self.changes)
            self.changes.forget()

    def settled(self) -> Index:
        self.flush()
        return self._index
