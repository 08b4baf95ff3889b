"""A receipt per lookup: what of a request hit where, why the rest missed, and what came of it.

Written by the engine's session as things happen, read by operators (`kvbm why`). The latest are
kept, within a bound in bytes; writing one costs a few array operations, whatever the keys.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.governor import NOTHING, Verdict
from kvbm.manager import Arrivals, Ticket, Wanted
from kvbm.protocol import COMING, HERE, PRESENT, SOURCES, Outcome, Pace
from kvbm.removals import Removal, Removals
from storage_tiers.base import TierName

KEPT_BYTES_MAX: Final = 4 << 20
_RECEIPT_BYTES: Final = 1280
_GROUP_BYTES: Final = 640
_REMOVAL_BYTES: Final = 128
"""What a receipt, each of its groups, and each removal in those take at most."""

Places = npt.NDArray[np.uint8]

_SOURCE_NAMES: Final = {number: tier.value for tier, number in SOURCES.items()}


@dataclass(slots=True)
class GroupReceipt:
    """One cache group's chunks; every chunk asked for is in exactly one of the counts.

    Those of `coming` are told apart further as they arrive.
    """

    tokens_per_chunk: int
    window: int
    chunk_bytes: int
    asked: int
    kept: dict[str, int]  # by the first tier that has it, whatever becomes of it
    missing: int  # in no tier
    removed: list[Removal]  # what is known of the missing ones
    first_missing: int | None  # position
    behind_gap: int  # kept, but something before is missing
    skipped: dict[str, int]  # kept and usable, but sooner computed; by tier
    outside_window: int  # not needed
    queue_full: int
    here: int  # in host memory, held for the request
    coming: int  # brought up for it


@dataclass(slots=True)
class Receipt:
    """One lookup. Times are seconds since 1970, durations seconds."""

    request: str
    engine: str
    asked_at: float
    groups: list[GroupReceipt]
    verdict: Verdict
    pace: Pace
    answered_s: float = 0.0
    refused: str = ""  # why nothing was looked up
    landed: Counter[str] = field(default_factory=Counter)  # by tier
    failed: int = 0  # its tier could not give it
    crowded: int = 0  # host memory had no room
    last_arrival_s: float | None = None
    late: int = 0  # had not come when the ticket was closed
    closed_s: float | None = None
    outcome: Outcome | None = None

    @property
    def size(self) -> int:
        """What it takes of the bound, in bytes."""
        removals = sum(len(group.removed) for group in self.groups)
        return _RECEIPT_BYTES + _GROUP_BYTES * len(self.groups) + _REMOVAL_BYTES * removals


class Receipts:
    """The latest ones. `tiers` are the lower tiers in order. One event loop calls it."""

    def __init__(
        self,
        tiers: Sequence[TierName],
        removals: Removals | None = None,
        *,
        bytes_max: int = KEPT_BYTES_MAX,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._tiers = [tier.value for tier in (TierName.DRAM, *tiers)]
        self._removals = Removals(rows=1) if removals is None else removals
        self._bytes_max = bytes_max
        self._clock = clock
        self._kept: deque[Receipt] = deque()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def open(
        self, request: str, engine: str, pace: Pace, groups: Sequence[Wanted], ticket: Ticket
    ) -> Receipt:
        """A lookup was answered with this ticket."""
        written: list[GroupReceipt] = []
        base = 0
        for group, places in zip(groups, ticket.places, strict=True):
            states = ticket.states[base : base + len(group.keys)]
            written.append(self._of_group(group, places, states, ticket.verdict))
            base += len(group.keys)
        return self._keep(Receipt(request, engine, self._clock(), written, ticket.verdict, pace))

    def refuse(self, request: str, engine: str, pace: Pace, why: str) -> None:
        """A lookup was answered with misses only."""
        receipt = Receipt(request, engine, self._clock(), [], NOTHING, pace)
        receipt.refused = why
        self._keep(receipt)

    def arrived(self, receipt: Receipt, arrivals: Arrivals) -> None:
        receipt.last_arrival_s = self._clock() - receipt.asked_at
        receipt.landed.update(_SOURCE_NAMES[source] for _, source, _ in arrivals.landed)
        receipt.crowded += arrivals.crowded
        receipt.failed += len(arrivals.failed) - arrivals.crowded

    def close(self, receipt: Receipt, late: int) -> None:
        """The ticket is closed while so many of its chunks are still coming."""
        receipt.late = late
        receipt.closed_s = self._clock() - receipt.asked_at

    def latest(self, count: int) -> list[Receipt]:
        """Newest first."""
        return [self._kept[-1 - index] for index in range(min(count, len(self._kept)))]

    def find(self, request: str) -> list[Receipt]:
        """Of requests named so, or whose name begins with it, or contains it; newest first.

        The first of these rules that finds any decides.
        """
        rules: tuple[Callable[[str], bool], ...] = (
            lambda name: name == request,
            lambda name: name.startswith(request),
            lambda name: request in name,
        )
        for rule in rules:
            if found := [receipt for receipt in reversed(self._kept) if rule(receipt.request)]:
                return found
        return []

    def check_integrity(self) -> None:
        assert self.used_bytes == sum(receipt.size for receipt in self._kept)
        for receipt in self._kept:
            for group in receipt.groups:
                used = group.here + group.coming + group.outside_window + group.queue_full
                skipped = sum(group.skipped.values())
                assert group.asked == group.missing + group.behind_gap + skipped + used

    # -- below ---------------------------------------------------------------------------

    def _keep(self, receipt: Receipt) -> Receipt:
        self._kept.append(receipt)
        self.used_bytes += receipt.size
        while self.used_bytes > self._bytes_max and len(self._kept) > 1:
            self.used_bytes -= self._kept.popleft().size
        return receipt

    def _of_group(
        self, group: Wanted, places: Places, state_bytes: bytes, verdict: Verdict
    ) -> GroupReceipt:
        states = np.frombuffer(state_bytes, dtype=np.uint8)
        indexes = np.arange(len(places))
        missing = np.flatnonzero(places == 0)
        end = -(-verdict.tokens // group.tokens_per_chunk)
        usable_end = -(-verdict.usable_tokens // group.tokens_per_chunk)
        is_kept = places > 0
        # Neither in host memory nor on its way there, though before the end of what is loaded.
        is_left = is_kept & (indexes < end) & (states == PRESENT)
        start = max(0, end - group.window - 1) if group.window else 0
        return GroupReceipt(
            tokens_per_chunk=group.tokens_per_chunk,
            window=group.window,
            chunk_bytes=group.chunk_bytes,
            asked=len(places),
            kept=self._by_tier(places[is_kept]),
            missing=len(missing),
            removed=self._removals.explain([group.keys[index] for index in missing]),
            first_missing=int(missing[0]) if len(missing) else None,
            behind_gap=int((is_kept & (indexes >= usable_end)).sum()),
            skipped=self._by_tier(places[is_kept & (indexes >= end) & (indexes < usable_end)]),
            outside_window=int((is_left & (indexes < start)).sum()),
            queue_full=int((is_left & (indexes >= start)).sum()),
            here=int((states == HERE).sum()),
            coming=int((states == COMING).sum()),
        )

    def _by_tier(self, places: Places) -> dict[str, int]:
        """Chunks by tier, of places counted from 1."""
        counts = np.bincount(places, minlength=1)[1:].tolist()
        return {tier: count for tier, count in zip(self._tiers, counts, strict=False) if count}
