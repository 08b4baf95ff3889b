"""How often one request may be tried, and where it has failed already.

An engine that was never reached can be replaced as long as there are others. One that may have
begun only `migrations_max` times: a request that kills engines must not kill all of them. A global
router that had begun lost an engine of a pool: it is asked again, and finds another.
"""

from __future__ import annotations

from typing import Final

import structlog

from frontend.errors import ApiError, engine_lost, overloaded
from frontend.fleet import Assigned, Fleet, Job
from frontend.meter import Measured
from runtime.engines.upstream import EngineFault

ENGINES_TRIED_MAX: Final = 8

_log = structlog.get_logger("kvbm.frontend")


class Attempts:
    """Of one request."""

    def __init__(self, fleet: Fleet, migrations_max: int, measured: Measured) -> None:
        self._fleet = fleet
        self._migrations_max = migrations_max
        self._measured = measured
        self._failed: list[int] = []
        self._begun = 0
        self._all_busy = True  # those that have failed it

    async def assign(self, job: Job) -> Assigned:
        """An engine that has not failed it. Raises ApiError."""
        try:
            assigned = await self._fleet.assign(job.without(self._failed))
        except ApiError as error:
            if self._failed and error.status == 503:
                raise self._ended(f"The engine was lost, and {error.message}") from error
            raise
        self._measured.sent(assigned, migrated=bool(self._failed))
        return assigned

    def failed(self, assigned: Assigned, fault: EngineFault, *, begun: bool = False) -> None:
        """Raises ApiError if it was the last; `begun` where the caller knows that it had."""
        instance = assigned.place.instance
        _log.warning("engine_failed", instance=f"{instance:x}", why=str(fault))
        begun = begun or fault.begun
        if not (begun and assigned.place.relays):
            assigned.failed()
            self._failed.append(instance)
        self._begun += begun
        self._all_busy = self._all_busy and fault.is_busy
        if self._begun > self._migrations_max or len(self._failed) >= ENGINES_TRIED_MAX:
            raise self._ended("The engine at work on the request was lost") from fault

    def _ended(self, lost: str) -> ApiError:
        if self._all_busy:
            return overloaded("No engine takes more requests now", 1)
        return engine_lost(lost)
