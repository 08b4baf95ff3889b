"""What an operator can have a running node do: drain and resume, flush, scrub.

Each is idempotent and bounded in time: asking again joins what is under way and tells how far it
is. Called on the daemon's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from kvbm.daemon.view import DrainStatus, FlushStatus, ScrubStatus
from kvbm.offload import Offloader
from kvbm.scrub import Scrubber, ScrubPass
from kvbm.session import Sessions

_log = structlog.get_logger("kvbm.operations")


class Operations:
    """A node's `NodeActions`."""

    def __init__(self, members: Sessions, offloader: Offloader, scrubber: Scrubber) -> None:
        self._members = members
        self._offloader = offloader
        self._scrubber = scrubber
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

    async def scrub(self, deadline_s: float) -> ScrubStatus:
        """Check all of host memory now; tells how far it is if that takes longer."""
        run = self._scrubber.ask()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.ended.wait(), deadline_s)
        return _status(run)

    def scrub_status(self) -> ScrubStatus | None:
        """The latest pass that was asked for."""
        latest = self._scrubber.latest
        return None if latest is None else _status(latest)


def _status(run: ScrubPass) -> ScrubStatus:
    return ScrubStatus(
        done=run.ended.is_set(),
        total_chunks=run.total,
        checked_chunks=run.checked,
        damaged_chunks=run.damaged,
        seconds=run.seconds,
    )
