"""What a fleet's dashboard shows: engines and their load, nodes heard, decisions and prefixes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from router.assembly import Assembly
from router.reports import workers_report

Extra = Callable[[], Mapping[str, Any]]


class FleetPage:
    """A `runtime.web.dashboard.Source`. `extras` of other parts of the program, by name."""

    kind: Final = "fleet"

    def __init__(self, assembly: Assembly, extras: Mapping[str, Extra] | None = None) -> None:
        self.name = assembly.settings.name
        self._assembly = assembly
        self._extras = extras or {}

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
            **{name: extra() for name, extra in self._extras.items()},
        }
