"""What an operator can have a running node do: drain, resume, flush, scrub, clear the quarantine.

Each is idempotent and bounded in time: asking again joins what is under way and tells how far it
is. Called on the daemon's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from kvbm.daemon.view import (
    ClearStatus,
    DrainStatus,
    FlushStatus,
    NoScrubError,
    QuarantineStatus,
    ScrubStatus,
)
from kvbm.offload import Offloader
from kvbm.passes import ScrubPass
from kvbm.patrol import Patrol
from kvbm.quarantine import Quarantine
from kvbm.scrub import Scrubber
from kvbm.session import Sessions
from storage_tiers.base import Key, SupportsScrub, Tier, TierName

_log = structlog.get_logger("kvbm.operations")


class Operations:
    """A node's `NodeActions`."""

    def __init__(
        self,
        members: Sessions,
        offloader: Offloader,
        scrubbers: Mapping[TierName, Scrubber | Patrol],
        quarantine: Quarantine,
        lower: Sequence[Tier],
    ) -> None:
        self._members = members
        self._offloader = offloader
        self._scrubbers = scrubbers
        self._quarantine = quarantine
        self._lower = [tier for tier in lower if isinstance(tier, SupportsScrub)]
        self._drained_since: float | None = None

    def drain(self) -> DrainStatus:
        """Lend engines no more slots, and write down what is in host memory alone.

        The latest used goes first. Engines go on loading. Until `resume`, or a restart.
        """
        if self._drained_since is None:
            self._drained_since = time.time()
            self._members.drain()
            self._offloader.evacuate()
            _log.warning("draining", left_chunks=self._offloader.left)
        return self.drain_status()

    def resume(self) -> DrainStatus:
        """End a drain: engines store again."""
        if self._drained_since is not None:
            self._drained_since = None
            self._members.resume()
            self._offloader.stay()
            _log.info("resumed")
        return self.drain_status()

    def drain_status(self) -> DrainStatus:
        left = self._offloader.left
        leased = sum(session.leased_bytes for session in self._members.all)
        draining = self._drained_since is not None
        return DrainStatus(
            draining=draining,
            since=self._drained_since,
            done=draining and not left and not leased,
            left_chunks=left,
            leased_bytes=leased,
        )

    async def flush(self, deadline_s: float) -> FlushStatus:
        """Wait until nothing is on its way to a lower tier, at most so long."""
        began = time.monotonic()
        left = await self._offloader.drain(deadline_s)
        return FlushStatus(done=not left, left_chunks=left, seconds=time.monotonic() - began)

    async def scrub(self, tier: TierName, deadline_s: float) -> ScrubStatus:
        """Check all of a tier now; tells how far it is if that takes longer."""
        run = self._scrubber(tier).ask()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await run.ended.wait()
        return _status(tier, run)

    def scrub_status(self, tier: TierName) -> ScrubStatus | None:
        """The latest pass that was asked for."""
        latest = self._scrubber(tier).latest
        return None if latest is None else _status(tier, latest)

    def quarantine(self) -> QuarantineStatus:
        held: Counter[tuple[TierName, Key]] = Counter()
        for tier in self._lower:
            for extent in tier.aside():
                held[tier.name, extent.key] += extent.length
        entries = [
            replace(entry, held_bytes=held.pop((entry.tier, entry.key), 0))
            for entry in reversed(self._quarantine.entries())  # a key's latest entry holds it
        ]
        return QuarantineStatus(self._quarantine.total, entries[::-1])

    async def clear_quarantine(self, key: Key | None) -> ClearStatus:
        """Forget what is listed and use its place again: one key's, or everything."""
        freed = 0
        for tier in self._lower:
            keys = {extent.key for extent in tier.aside()} if key is None else {key}
            freed += sum(extent.length for extent in await tier.give_back(keys))
        cleared = self._quarantine.forget(None if key is None else {key})
        _log.warning("quarantine_cleared", entries=cleared, freed_bytes=freed)
        return ClearStatus(cleared, freed)

    def _scrubber(self, tier: TierName) -> Scrubber | Patrol:
        try:
            return self._scrubbers[tier]
        except KeyError:
            known = ", ".join(name.value for name in self._scrubbers)
            raise NoScrubError(f"{tier.value} cannot be scrubbed on this node: {known}") from None


def _status(tier: TierName, run: ScrubPass) -> ScrubStatus:
    return ScrubStatus(
        tier=tier.value,
        done=run.ended.is_set(),
        total_chunks=run.total,
        checked_chunks=run.checked,
        damaged_chunks=run.damaged,
        unreadable_chunks=run.unreadable,
        seconds=run.seconds,
    )
