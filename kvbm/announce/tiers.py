"""Residencies of G2, G3 and G4 on their way to routers: from keys and notes to events.

Tiers and sessions call `stored`, `removed` and `learn` between two awaits; that costs them a list
append and, for notes, some 0.3 us each. A little later, behind what engines wait for, the changes
are entered in the notebook and told in the same moment, a few dozen chunks at a time, so that the
event loop is never held for longer than about `SLICE_S`. What one listing of a bucket brings at
once may be more than is worth telling one by one: it is entered silently, and the stream skips a
number, so that routers take the whole anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, Literal

from kvbm.announce.status import TiersStatus
from kvbm.announce.stream import Stream
from kvbm.manager import BlockEvents
from kvbm.note import owner_of
from kvbm.notebook import Notebook
from runtime.events.node_stream import Rows
from runtime.events.router_event import Removed, StorageTier, Stored, hashes
from runtime.ledger import Run
from storage_tiers.base import Key, TierName

SLICE_S: Final = 0.001
CHUNKS_AT_ONCE: Final = 64
SILENT_CHUNKS_AT_ONCE: Final = 1024
BACKLOG_MAX: Final = 1 << 16
"""Chunks that may wait to be told one by one."""
OWNERS_MAX: Final = 1 << 12

Change = Literal["stored", "removed", "late"]

STORAGE_TIER: Final = {
    TierName.DRAM: StorageTier.HOST_PINNED,
    TierName.SSD: StorageTier.DISK,
    TierName.S3: StorageTier.EXTERNAL,
}


class TierAnnouncer:
    """A `NoteBook` and `BlockEvents` that passes residencies on. Called from one event loop."""

    def __init__(
        self,
        stream: Stream,
        node: str,
        onward: BlockEvents,
        *,
        linger_s: float,
        backlog_max: int = BACKLOG_MAX,
    ) -> None:
        self.notebook = Notebook()
        self._stream = stream
        self._node = node
        self._onward = onward
        self._linger_s = linger_s
        self._backlog_max = backlog_max
        self._waiting: deque[tuple[Change, TierName, Sequence[Key]]] = deque()
        self._waiting_chunks = 0
        self._taken = 0  # chunks of the first that waits that are told already
        self._silent = False
        self._timer: asyncio.Handle | None = None
        self._owners: dict[int, int] = {}

    # -- what tiers and sessions tell ----------------------------------------------------

    def learn(self, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        if late := self.notebook.learn(keys, notes):
            self._add("late", TierName.DRAM, late)
        self._schedule()  # what is never kept is forgotten then

    def note_of(self, key: Key) -> bytes:
        return self.notebook.note_of(key)

    def stored(self, tier: TierName, keys: Sequence[Key]) -> None:
        self._add("stored", tier, keys)
        self._onward.stored(tier, keys)

    def removed(self, tier: TierName, keys: Sequence[Key]) -> None:
        self._add("removed", tier, keys)
        self._onward.removed(tier, keys)

    # -- what is told --------------------------------------------------------------------

    def flush(self) -> None:
        """Tell everything now, however long it takes: at the end, or in tests."""
        while self._waiting:
            self._step()
        self._end_round()

    def owner(self, domain: int) -> int:
        """Whose the node's blocks of a domain are."""
        found = self._owners.get(domain)
        if found is None:
            if len(self._owners) >= OWNERS_MAX:
                self._owners.clear()
            found = self._owners[domain] = owner_of(self._node, domain)
        return found

    def rows(self, blocks: int) -> Iterator[list[Rows]]:
        """Everything that is kept and was told, about so many blocks at a time."""
        for groups in self.notebook.groups(blocks):
            yield [
                Rows(
                    self.owner(group.domain),
                    0,
                    "cache_owner",
                    STORAGE_TIER[tier],
                    group.parents.astype("<u8", copy=False).tobytes(),
                    group.tokens.astype("<u8", copy=False).tobytes(),
                )
                for tier, group in groups
            ]

    def status(self) -> TiersStatus:
        return TiersStatus(
            blocks={tier.value: self.notebook.blocks(tier) for tier in STORAGE_TIER},
            waiting_chunks=self._waiting_chunks,
            unannounced_chunks=self.notebook.bare,
            refused_total=self.notebook.refused_total,
            used_bytes=self.notebook.used_bytes,
        )

    # -- below ---------------------------------------------------------------------------

    def _add(self, change: Change, tier: TierName, keys: Sequence[Key]) -> None:
        if not keys or tier not in STORAGE_TIER:
            return  # a peer's memory is the peer's to announce
        self._waiting.append((change, tier, keys))
        self._waiting_chunks += len(keys)
        self._silent = self._silent or self._waiting_chunks > self._backlog_max
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._linger_s, self._work)

    def _work(self) -> None:
        self._timer = None
        end = time.perf_counter() + SLICE_S
        while self._waiting:
            self._step()
            if time.perf_counter() > end:
                break
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(0, self._work)
        else:
            self._end_round()

    def _step(self) -> None:
        """Enter and tell some changes of one kind; nothing is awaited in between."""
        change, tier, keys = self._take(SILENT_CHUNKS_AT_ONCE if self._silent else CHUNKS_AT_ONCE)
        match change:
            case "stored":
                runs = self.notebook.stored(tier, keys)
                self._tell_stored([(tier, run) for run in runs])
            case "removed":
                for run in self.notebook.removed(tier, keys):
                    self._publish(Removed(run.names), tier, run.domain)
            case "late":
                self._tell_stored(self.notebook.kept(keys))

    def _take(self, most: int) -> tuple[Change, TierName, Sequence[Key]]:
        """The first changes of one kind in one tier."""
        change, tier, _ = self._waiting[0]
        found: list[Key] = []
        while self._waiting and len(found) < most and self._waiting[0][:2] == (change, tier):
            keys = self._waiting[0][2]
            part = keys[self._taken : self._taken + most - len(found)]
            found += part
            self._taken += len(part)
            if self._taken == len(keys):
                self._waiting.popleft()
                self._taken = 0
        self._waiting_chunks -= len(found)
        return change, tier, found

    def _tell_stored(self, found: Sequence[tuple[TierName, Run]]) -> None:
        for tier, run in found:
            self._publish(Stored(run.parent, run.names, run.tokens), tier, run.domain)

    def _publish(self, data: Stored | Removed, tier: TierName, domain: int) -> None:
        if not self._silent:
            self._stream.publish(self.owner(domain), 0, data, STORAGE_TIER[tier], "cache_owner")

    def _end_round(self) -> None:
        """Everything is told."""
        self.notebook.trim()
        if self._silent:
            self._silent = False
            self._stream.skip()
            # The gap shows with the next event; it says nothing itself.
            none = Removed(hashes([]))
            self._stream.publish(self.owner(0), 0, none, StorageTier.HOST_PINNED, "cache_owner")
