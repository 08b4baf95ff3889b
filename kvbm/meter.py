"""What the block manager counts. The daemon gives it to Prometheus; tests read it directly."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from storage_tiers.base import TierName


class Meter(Protocol):
    """Counters only: cheap, never raising, called on the event loop."""

    def lookup(self, tier: TierName, outcome: str, chunks: int) -> None:
        """Chunks an engine asked for: outcome "hit" or "miss"."""
        ...

    def transfer(self, source: str, target: str, size: int, seconds: float) -> None:
        """Bytes moved between tiers; `seconds` of the batch, 0 where not measured."""
        ...

    def dropped(self, queue: str, reason: str, chunks: int) -> None:
        """Chunks that were not moved, and why: a visible outcome instead of waiting."""
        ...

    def error(self, op: str, kind: str, count: int = 1) -> None:
        """Something failed that the manager survives."""
        ...

    def scrubbed(self, tier: TierName, outcome: str) -> None:
        """A chunk was checked where it lies: outcome "sound", "damaged" or "unreadable"."""
        ...

    def judged(self, why: str, skipped_tokens: int) -> None:
        """How much of a usable prefix to load was decided; the rest is computed sooner."""
        ...

    def probed(self, tier: TierName) -> None:
        """A tier that was passed over is measured again."""
        ...


class CountingMeter:
    """A meter that keeps plain counters."""

    def __init__(self) -> None:
        self.lookups: Counter[tuple[str, str]] = Counter()
        self.transfer_bytes: Counter[tuple[str, str]] = Counter()
        self.drops: Counter[tuple[str, str]] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()
        self.scrubs: Counter[tuple[str, str]] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.skipped_tokens = 0
        self.probes: Counter[str] = Counter()

    def lookup(self, tier: TierName, outcome: str, chunks: int) -> None:
        self.lookups[tier.value, outcome] += chunks

    def transfer(self, source: str, target: str, size: int, seconds: float) -> None:
        self.transfer_bytes[source, target] += size

    def dropped(self, queue: str, reason: str, chunks: int) -> None:
        self.drops[queue, reason] += chunks

    def error(self, op: str, kind: str, count: int = 1) -> None:
        self.errors[op, kind] += count

    def scrubbed(self, tier: TierName, outcome: str) -> None:
        self.scrubs[tier.value, outcome] += 1

    def judged(self, why: str, skipped_tokens: int) -> None:
        self.verdicts[why] += 1
        self.skipped_tokens += skipped_tokens

    def probed(self, tier: TierName) -> None:
        self.probes[tier.value] += 1
