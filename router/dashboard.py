"""What a fleet's dashboard shows: engines and their load, nodes heard, decisions and prefixes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from router.assembly import Assembly
from router.plans import Plans
from router.reports import workers_report
from runtime.web.dashboard import Dashboard


@contextlib.asynccontextmanager
async def fleet_dashboard(assembly: Assembly) -> AsyncIterator[Dashboard]:
    """A dashboard that runs for as long as the context lasts."""
    settings, plans = assembly.settings.dashboard, None
    async with contextlib.AsyncExitStack() as stack:
        if settings.planner is not None:
            plans = Plans(settings.planner, settings.token_text)
        dashboard = Dashboard(FleetPage(assembly, plans))
        if plans is not None:
            asking = asyncio.create_task(plans.run(lambda: dashboard.is_watched), name="plans")
            stack.callback(asking.cancel)
        await stack.enter_async_context(dashboard.running())
        yield dashboard


class FleetPage:
    """A `runtime.web.dashboard.Source`."""

    kind: Final = "fleet"

    def __init__(self, assembly: Assembly, plans: Plans | None = None) -> None:
        self.name = assembly.settings.name
        self._assembly = assembly
        self._plans = plans

    def figures(self) -> Mapping[str, float]:
        assembly, totals = self._assembly, self._assembly.recent.totals
        pools = [pool for model in assembly.models.values() for pool in model.pools.values()]
        return {
            "requests": totals.requests,
            "rejected": totals.rejected,
            "prompt_tokens": totals.prompt_tokens,
            "found_tokens": totals.found_tokens,
            "output_tokens": totals.output_tokens,
            "first_tokens": totals.first_tokens,
            "first_token_s": totals.first_token_s,
            "running": sum(float(p.workers.requests[: p.workers.rows].sum()) for p in pools),
            "waiting": sum(pool.router.waiting for pool in pools),
            "engines": sum(int(p.workers.accepting[: p.workers.rows].sum()) for p in pools),
            "blocks": len(assembly.index),
        }

    def failed(self) -> None:
        self._assembly.metrics.dashboard_failed()

    def state(self) -> Mapping[str, Any]:
        assembly = self._assembly
        feed = assembly.feed_status
        return {
            "version": assembly.metrics.version,
            "namespace": assembly.namespace,
            "policy": assembly.settings.policy,
            "readiness": assembly.readiness(),
            **workers_report(assembly),
            "index": {
                "blocks": len(assembly.index),
                "capacity": assembly.settings.index.capacity,
                "bytes": assembly.index.allocated_bytes,
            },
            "exact": None if feed is None else feed.is_exact,
            "nodes": [] if feed is None else feed.nodes,
            "plane": assembly.plane.status(),
            "decisions": assembly.recent.decisions(),
            "prefixes": assembly.recent.prefixes(),
            "planner": None if self._plans is None else self._plans.state(),
        }
