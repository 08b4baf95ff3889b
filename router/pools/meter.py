"""All Prometheus metrics of the global router, in one table.

`python -m router.pools.meter` prints docs/GLOBAL_ROUTER_METRICS.md.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from router.pools.decision import Decision
from runtime.metrics import Labels, Samples, Spec, family_of, metrics_page

_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DECISION_SECONDS: Final = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.25, 1)
_P: Final = "kvbm_global_router_"
_POOL: Final = ("role", "pool")

HISTOGRAMS: Final[dict[str, tuple[float, ...]]] = {
    f"{_P}decision_seconds": _DECISION_SECONDS,
    f"{_P}first_item_seconds": _SECONDS,
    f"{_P}first_item_error_seconds": _SECONDS,
}
SPECS: Final = (
    Spec(f"{_P}build_info", "gauge", "Always 1; what runs.", ("version", "router")),
    Spec(f"{_P}ready", "gauge", "1 if the check passes.", ("check",)),
    Spec(
        f"{_P}decisions_total",
        "counter",
        "Requests by the pool they were sent to first (`none`: to none) and why it was that one: "
        "`grid`, `override`, `away`, `target`, `saves`.",
        (*_POOL, "reason"),
    ),
    Spec(
        f"{_P}moved_total",
        "counter",
        "Requests that did not go to the grid's pool, by both pools.",
        ("role", "grid_pool", "pool"),
    ),
    Spec(
        f"{_P}away_total",
        "counter",
        "Pools that could not take a request when it was decided.",
        _POOL,
    ),
    Spec(
        f"{_P}unknown_total",
        "counter",
        "Pools that did not say in time what they expected.",
        _POOL,
    ),
    Spec(
        f"{_P}retries_total",
        "counter",
        "Requests sent on to this pool after another had failed them.",
        _POOL,
    ),
    Spec(
        f"{_P}requests_total",
        "counter",
        "Requests that ended, by the pool that was asked last and by how: `done`, `cancelled`, "
        "`failed`, `refused`.",
        (*_POOL, "outcome"),
    ),
    Spec(f"{_P}output_tokens_total", "counter", "Tokens passed on.", _POOL),
    Spec(
        f"{_P}cached_tokens_total",
        "counter",
        "Prompt tokens that the pool was expected to have, of requests sent there.",
        _POOL,
    ),
    Spec(f"{_P}prompt_tokens_total", "counter", "Prompt tokens of all requests sent.", _POOL),
    Spec(
        f"{_P}decision_seconds",
        "histogram",
        "What a decision took, asking pools included.",
        ("role",),
    ),
    Spec(f"{_P}first_item_seconds", "histogram", "From the request to its first tokens.", _POOL),
    Spec(
        f"{_P}first_item_error_seconds",
        "histogram",
        "How far that was from what was expected, either way.",
        _POOL,
    ),
    Spec(f"{_P}requests_running", "gauge", "Requests under way in a pool.", ("pool",)),
    Spec(f"{_P}pool_engines", "gauge", "Engines of a pool that serve.", ("pool",)),
    Spec(
        f"{_P}pool_router",
        "gauge",
        "1 for who chooses among a pool's engines: its own router (`found`) or one here (`own`).",
        ("pool", "kind"),
    ),
    Spec(
        f"{_P}untold_total",
        "counter",
        "Of what happened to requests, what a pool's router could not be told.",
        ("pool",),
    ),
)


class GlobalRouterMetrics:
    """One thread calls it. `seen` tells what is the case."""

    def __init__(self, version: str, router: str) -> None:
        self.version = version
        self.router = router
        self.registry = CollectorRegistry()
        helps = {spec.name: spec for spec in SPECS}
        self._histograms = {
            name: Histogram(
                name, helps[name].help, helps[name].labels, buckets=edges, registry=self.registry
            )
            for name, edges in HISTOGRAMS.items()
        }
        self._counts: defaultdict[str, Counter[Labels]] = defaultdict(Counter)

    def decided(self, decision: Decision) -> None:
        strategy, settled = decision.strategy, decision.settled
        role, pool = strategy.role, decision.pool or "none"
        self._count("decisions_total", role, pool, settled.reason)
        if settled.pool is not None and settled.pool != decision.choice.pool:
            self._count("moved_total", role, strategy.namespaces[decision.choice.pool], pool)
        for number, outlook in decision.outlooks.items():
            if outlook.away is not None:
                self._count("away_total", role, strategy.namespaces[number])
            if outlook.unknown is not None:
                self._count("unknown_total", role, strategy.namespaces[number])
        self._histograms[f"{_P}decision_seconds"].labels(role).observe(decision.took_s)
        if settled.pool is not None:
            forecast = decision.outlooks[settled.pool].forecast
            cached = 0 if forecast is None else forecast.cached_tokens
            self._count("cached_tokens_total", role, pool, count=cached)
            self._count("prompt_tokens_total", role, pool, count=decision.features.tokens)

    def retried(self, decision: Decision, pool: str) -> None:
        self._count("retries_total", decision.strategy.role, pool)

    def first_item(self, decision: Decision) -> None:
        labels = decision.strategy.role, _last_pool(decision)
        took_s = decision.first_item_s or 0.0
        self._histograms[f"{_P}first_item_seconds"].labels(*labels).observe(took_s)
        settled = decision.settled
        forecast = None if settled.pool is None else decision.outlooks[settled.pool].forecast
        if forecast is not None and labels[1] == decision.pool:
            off_s = abs(took_s - forecast.first_token_s)
            self._histograms[f"{_P}first_item_error_seconds"].labels(*labels).observe(off_s)

    def ended(self, decision: Decision) -> None:
        labels = decision.strategy.role, _last_pool(decision)
        self._count("requests_total", *labels, decision.outcome or "failed")
        self._count("output_tokens_total", *labels, count=decision.tokens)

    def attach(self, seen: Callable[[], Samples]) -> None:
        """From now on a scrape also tells what is the case. Called once."""
        self.registry.register(_Collector(lambda: {**self._counted(), **seen()}))

    def render(self) -> bytes:
        """In Prometheus's text format, of `runtime.metrics.CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def _counted(self) -> Samples:
        return {name: {**counts} for name, counts in self._counts.items()}

    def _count(self, name: str, *labels: str, count: int = 1) -> None:
        self._counts[f"{_P}{name}"][labels] += count


class _Collector(Collector):
    def __init__(self, seen: Callable[[], Samples]) -> None:
        self._seen = seen

    def describe(self) -> Iterable[Metric]:
        """Registering asks for names only; nothing is read before the first scrape."""
        return [family_of(spec, {}) for spec in SPECS if spec.kind != "histogram"]

    def collect(self) -> Iterator[Metric]:
        samples = self._seen()
        for spec in SPECS:
            if spec.kind != "histogram":
                yield family_of(spec, samples.get(spec.name, {}))


def _last_pool(decision: Decision) -> str:
    return decision.attempts[-1].pool if decision.attempts else "none"


def global_router_metrics_page() -> str:
    """docs/GLOBAL_ROUTER_METRICS.md."""
    return metrics_page("Metrics of kvbm-global-router", _INTRODUCTION, SPECS)


_INTRODUCTION: Final = """\
Served at `/metrics` of the global router's HTTP address, in Prometheus's text format. `role` is
`prefill`, `decode` or `aggregated`, `pool` a namespace. Routers of pools have metrics of their own
([ROUTER_METRICS.md](ROUTER_METRICS.md)). Generated:
`python -m router.pools.meter > docs/GLOBAL_ROUTER_METRICS.md`.
"""


if __name__ == "__main__":
    sys.stdout.write(global_router_metrics_page())
