"""Patrol: read back and check what a lower tier keeps, slowly and for ever, or on demand.

A disk loses sectors that nobody reads. What no longer matches its checksum is quarantined by the
tier before a request comes for it. Engines go first: each chunk waits for a quiet moment of the
tier, but not for long, and a bound keeps what is read in a second.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final

import structlog

from kvbm.complaints import Complaints
from kvbm.meter import Meter
from kvbm.passes import Passes, ScrubPass
from kvbm.quarantine import Quarantine
from storage_tiers.base import Corrupt, Failed, Loaded, SupportsScrub, TierName

GIVE_WAY_S_MAX: Final = 1.0  # for one chunk: a pass goes on under load too
QUIET_POLL_S: Final = 0.01
CATCH_UP_S: Final = 0.25  # of a delay that may be made up for

_log = structlog.get_logger("kvbm.patrol")


class Patrol(Passes):
    """Reads back what a lower tier keeps."""

    def __init__(
        self,
        tier: SupportsScrub,
        meter: Meter,
        quarantine: Quarantine,
        *,
        pass_s: float,
        bytes_per_s: float,
    ) -> None:
        """`bytes_per_s`: read at most, by a steady pass and one asked for each."""
        super().__init__(pass_s)
        self._tier = tier
        self._meter = meter
        self._quarantine = quarantine
        self._bytes_per_s = bytes_per_s
        self._complaints = Complaints(_log)

    @property
    def tier(self) -> TierName:
        return self._tier.name

    # -- below ---------------------------------------------------------------------------

    async def _pass_over(self, run: ScrubPass, pass_s: float) -> None:
        began = due = time.monotonic()
        places = await self._tier.places()
        run.total = len(places)
        # A daemon that is restarted more often than a pass takes gets everywhere all the same.
        first = random.randrange(run.total) if run.total else 0
        for index in range(run.total):
            # Before the first one too: a start is busy enough.
            now = time.monotonic()
            due = max(due, now - CATCH_UP_S) + pass_s / run.total
            await asyncio.sleep(max(0.0, due - now))
            await self._give_way()
            length = await self._check(int(places[(first + index) % run.total]), run)
            run.checked += 1
            run.seconds = time.monotonic() - began
            due += length / self._bytes_per_s
        if run.total:
            _log.info(
                "scrubbed",
                tier=self._tier.name.value,
                chunks=run.total,
                damaged=run.damaged,
                unreadable=run.unreadable,
                seconds=round(run.seconds, 3),
            )

    async def _give_way(self) -> None:
        end = time.monotonic() + GIVE_WAY_S_MAX
        while self._tier.busy and time.monotonic() < end:
            await asyncio.sleep(QUIET_POLL_S)

    async def _check(self, place: int, run: ScrubPass) -> int:
        """Look at one place; how many bytes were read there."""
        found = await self._tier.scrub(place)
        if found is None:
            return 0
        chunk, outcome = found
        name = self._tier.name
        match outcome:
            case Loaded():
                self._meter.scrubbed(name, "sound")
            case Corrupt():
                run.damaged += 1
                self._meter.scrubbed(name, "damaged")
                self._meter.error("scrub", "corrupt")
                self._quarantine.explain(name, chunk.key, f"{outcome.reason}, said the scrub")
                key = chunk.key.hex()
                _log.error("chunk_damaged", tier=name.value, key=key, reason=outcome.reason)
            case Failed():
                # It stays: the medium may come back, and nothing wrong is ever served.
                run.unreadable += 1
                self._meter.scrubbed(name, "unreadable")
                self._meter.error("scrub", "failed")
                self._complaints.failed(name, "scrub", outcome.reason)
            case _:
                pass  # it left the tier meanwhile
        return chunk.length
