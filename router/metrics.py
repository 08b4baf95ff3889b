"""All Prometheus metrics of a router, in one table, on a registry of their own.

`RouterMetrics` counts what happens to requests; what is the case is read when it is asked for, so
no number is kept twice. `python -m router.metrics` prints docs/ROUTER_METRICS.md.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from router.index import Tier
from router.model import Ending, Placed
from router.selector import Chosen
from runtime.metrics import Labels, Samples, Spec, family_of, metrics_page

_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP_SECONDS: Final = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)
_TOKENS: Final = (16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_SHARES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_P: Final = "kvbm_router_"
_MODEL: Final = ("model",)
_POOL: Final = ("model", "pool")
_WORKER: Final = ("model", "worker")

HISTOGRAMS: Final[dict[str, tuple[float, ...]]] = {
    f"{_P}time_to_first_token_seconds": _SECONDS,
    f"{_P}inter_token_latency_seconds": _SECONDS,
    f"{_P}queue_wait_seconds": _SECONDS,
    f"{_P}input_sequence_tokens": _TOKENS,
    f"{_P}output_sequence_tokens": _TOKENS,
    f"{_P}kv_hit_rate": _SHARES,
    f"{_P}overhead_seconds": _STEP_SECONDS,
}
SPECS: Final = (
    Spec(f"{_P}build_info", "gauge", "Always 1; what runs.", ("version", "router")),
    Spec(f"{_P}ready", "gauge", "1 if the check passes.", ("check",)),
    Spec(f"{_P}requests_started_total", "counter", "Requests sent to a worker.", _MODEL),
    Spec(f"{_P}requests_total", "counter", "Requests that ended, by how.", ("model", "ending")),
    Spec(f"{_P}rejected_total", "counter", "Requests sent nowhere, by why.", ("model", "kind")),
    Spec(f"{_P}requests_running", "gauge", "Requests that callers of the API have running."),
    Spec(f"{_P}requests_running_limit", "gauge", "Most that may be."),
    Spec(
        f"{_P}bad_requests_total",
        "counter",
        "Requests to the API that made no sense.",
        ("endpoint",),
    ),
    Spec(
        f"{_P}disaggregated_total",
        "counter",
        "Requests by where the prompt is computed: by a prefill worker, or where it decodes.",
        ("model", "where"),
    ),
    Spec(
        f"{_P}time_to_first_token_seconds",
        "histogram",
        "From the question to the first token, waiting included.",
        _MODEL,
    ),
    Spec(
        f"{_P}inter_token_latency_seconds",
        "histogram",
        "Of a request, the mean after its first token.",
        _MODEL,
    ),
    Spec(f"{_P}input_sequence_tokens", "histogram", "Tokens of prompts.", _MODEL),
    Spec(f"{_P}output_sequence_tokens", "histogram", "Tokens of output.", _MODEL),
    Spec(
        f"{_P}kv_hit_rate",
        "histogram",
        "Share of a prompt's blocks that the worker chosen to compute it has in some tier.",
        _MODEL,
    ),
    Spec(
        f"{_P}kv_selected_cached_prefix_tokens_total",
        "counter",
        "Prompt tokens that chosen workers have, by the best tier that has them.",
        ("model", "tier"),
    ),
    Spec(
        f"{_P}kv_best_eligible_cached_prefix_tokens_total",
        "counter",
        "Prompt tokens that the candidate with most of each prompt has.",
        _MODEL,
    ),
    Spec(
        f"{_P}non_max_overlap_selections_total",
        "counter",
        "Requests sent to a worker that has less of the prompt than another candidate.",
        _MODEL,
    ),
    Spec(
        f"{_P}overlap_blocks_lost_total",
        "counter",
        "Blocks that the other candidate had more, in those cases.",
        _MODEL,
    ),
    Spec(
        f"{_P}overhead_seconds",
        "histogram",
        "What routing takes: `hashing` the prompt, `find` in the index, `select` a worker, `total` "
        "from the body read to the answer written, waiting excluded.",
        ("step",),
    ),
    Spec(f"{_P}queue_pending_requests", "gauge", "Requests that wait for room.", _POOL),
    Spec(f"{_P}queue_limit", "gauge", "Most that may wait.", _POOL),
    Spec(f"{_P}queue_wait_seconds", "histogram", "How long requests waited.", _MODEL),
    Spec(
        f"{_P}workers",
        "gauge",
        "Workers, `serving` or `draining`.",
        ("model", "pool", "state"),
    ),
    Spec(f"{_P}records_refused_total", "counter", "Engines' records left out.", ("why",)),
    Spec(f"{_P}worker_requests", "gauge", "Requests running on a worker.", _WORKER),
    Spec(f"{_P}worker_active_blocks", "gauge", "KV blocks running requests use.", _WORKER),
    Spec(f"{_P}worker_blocks_limit", "gauge", "KV blocks a worker has, if it says.", _WORKER),
    Spec(
        f"{_P}worker_active_prefill_tokens",
        "gauge",
        "Prompt tokens assigned to a worker and not computed yet.",
        _WORKER,
    ),
    Spec(f"{_P}worker_prefill_token_seconds", "gauge", "Seconds a prompt token takes.", _WORKER),
    Spec(f"{_P}worker_step_seconds", "gauge", "Seconds a decode step takes.", _WORKER),
    Spec(f"{_P}worker_held_blocks", "gauge", "Blocks the index has for it.", (*_WORKER, "tier")),
    Spec(f"{_P}index_blocks", "gauge", "Distinct blocks in the index."),
    Spec(f"{_P}index_capacity_blocks", "gauge", "Most there may be."),
    Spec(f"{_P}index_bytes", "gauge", "Memory of the index."),
    Spec(f"{_P}index_workers", "gauge", "Workers, and owners of shared tiers, in the index."),
    Spec(
        f"{_P}kv_cache_events_applied_total",
        "counter",
        "Changes of the index by what came of them.",
        ("outcome",),
    ),
    Spec(f"{_P}index_stored_blocks_total", "counter", "Blocks put into the index."),
    Spec(f"{_P}index_removed_blocks_total", "counter", "Blocks taken out of it."),
    Spec(f"{_P}feed_nodes", "gauge", "Nodes whose streams are followed.", ("state",)),
    Spec(f"{_P}feed_behind_events", "gauge", "Events of nodes known to be missing."),
    Spec(f"{_P}feed_events_total", "counter", "Events of nodes and workers heard."),
    Spec(f"{_P}feed_blocks_total", "counter", "Blocks they were about."),
    Spec(
        f"{_P}feed_faults_total",
        "counter",
        "Events that were malformed, of unknown nodes, dropped for want of room; records in "
        "discovery that cannot be followed.",
        ("kind",),
    ),
    Spec(f"{_P}feed_delay_seconds", "gauge", "Of a node's last event, by both clocks.", ("node",)),
    Spec(f"{_P}route_memory_blocks", "gauge", "Blocks of routes remembered.", _POOL),
    Spec(
        f"{_P}route_memory_pruned_blocks_total",
        "counter",
        "Of those, forgotten early for want of room.",
        _POOL,
    ),
    Spec(f"{_P}replicas", "gauge", "Other routers of a model.", _POOL),
    Spec(
        f"{_P}replica_events_total",
        "counter",
        "What happened between routers: gaps, states sent and taken, malformed messages, routers "
        "that fell silent, batches not published, sequences refused.",
        ("model", "pool", "kind"),
    ),
    Spec(f"{_P}event_plane_connected", "gauge", "1 while the event plane can be reached."),
    Spec(f"{_P}event_plane_dropped_total", "counter", "Messages the event plane did not take."),
    Spec(
        f"{_P}event_plane_faults_total",
        "counter",
        "Faults, other than of the network, after which the event plane connected anew.",
    ),
    Spec(f"{_P}dashboard_faults_total", "counter", "Times the dashboard could not be made."),
    Spec(
        f"{_P}plane_requests_total",
        "counter",
        "Requests over the request plane, by how they ended; `failed` is a fault of ours.",
        ("outcome",),
    ),
    Spec(
        f"{_P}snapshots_total",
        "counter",
        "Snapshots of the index, by what became of them.",
        ("outcome",),
    ),
    Spec(f"{_P}snapshot_bytes", "gauge", "Size of the last one written."),
)

Seen = Callable[[], Samples]


class RouterMetrics:
    """The `Meter` of all models of a router. One thread calls it."""

    def __init__(self, version: str, router: str) -> None:
        self.version = version
        self.router = router
        self.registry = CollectorRegistry()
        self._counts: defaultdict[str, Counter[Labels]] = defaultdict(Counter)
        helps = {spec.name: spec for spec in SPECS}
        self._histograms = {
            name: Histogram(
                name, helps[name].help, helps[name].labels, buckets=edges, registry=self.registry
            )
            for name, edges in HISTOGRAMS.items()
        }
        self._count("dashboard_faults_total", (), 0)
        self._children: dict[tuple[str, str], Histogram] = {}
        overhead = self._histograms[f"{_P}overhead_seconds"]
        self._steps = {
            step: overhead.labels(step) for step in ("hashing", "find", "select", "total")
        }

    # -- what happens ----------------------------------------------------------------------

    def placed(self, model: str, placed: Placed) -> None:
        self._count("requests_started_total", (model,))
        where = "decode" if placed.prefill is None else "prefill"
        self._count("disaggregated_total", (model, where))
        self._observe("queue_wait_seconds", model, placed.waited_s)
        self._found(model, placed.computes.chosen)

    def _found(self, model: str, chosen: Chosen) -> None:
        request = chosen.request
        self._observe("input_sequence_tokens", model, request.tokens)
        found = int(request.covered[-1, chosen.row])
        if request.blocks:
            self._observe("kv_hit_rate", model, found / request.blocks)
        for tier, blocks in chosen.covered_blocks().items():
            tokens = blocks * request.block_tokens
            self._count("kv_selected_cached_prefix_tokens_total", (model, tier), tokens)
        best = chosen.best_found_blocks
        self._count(
            "kv_best_eligible_cached_prefix_tokens_total", (model,), best * request.block_tokens
        )
        self._count("non_max_overlap_selections_total", (model,), int(best > found))
        self._count("overlap_blocks_lost_total", (model,), best - found)

    def rejected(self, model: str, kind: str) -> None:
        self._count("rejected_total", (model, kind))

    def first_token(self, model: str, seconds: float) -> None:
        self._observe("time_to_first_token_seconds", model, seconds)

    def ended(self, model: str, ending: Ending, tokens: int, decode_s: float | None) -> None:
        self._count("requests_total", (model, ending))
        self._observe("output_sequence_tokens", model, tokens)
        if decode_s is not None:
            self._observe("inter_token_latency_seconds", model, decode_s)

    def took(self, step: str, seconds: float) -> None:
        self._steps[step].observe(seconds)

    def bad_request(self, endpoint: str) -> None:
        self._count("bad_requests_total", (endpoint,))

    def dashboard_failed(self) -> None:
        self._count("dashboard_faults_total", ())

    def snapshot(self, outcome: str) -> None:
        self._count("snapshots_total", (outcome,))

    # -- reading ---------------------------------------------------------------------------

    def attach(self, seen: Seen) -> None:
        """From now on a scrape also tells what is the case. Called once."""
        self.registry.register(_Collector(self, seen))

    def render(self) -> bytes:
        """The exposition in Prometheus's text format, of `runtime.metrics.CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def counted(self) -> Samples:
        return {name: {**counts} for name, counts in self._counts.items()}

    def _count(self, name: str, labels: Labels, count: float = 1) -> None:
        self._counts[f"{_P}{name}"][labels] += count  # type: ignore[assignment]

    def _observe(self, name: str, model: str, value: float) -> None:
        child = self._children.get((name, model))
        if child is None:  # `labels` takes locks and checks; models are few
            child = self._children[name, model] = self._histograms[f"{_P}{name}"].labels(model)
        child.observe(value)


class _Collector(Collector):
    def __init__(self, metrics: RouterMetrics, seen: Seen) -> None:
        self._metrics = metrics
        self._seen = seen

    def describe(self) -> Iterable[Metric]:
        """Registering asks for names only; nothing is read before the first scrape."""
        return [family_of(spec, {}) for spec in SPECS if spec.kind != "histogram"]

    def collect(self) -> Iterator[Metric]:
        samples = {**self._metrics.counted(), **self._seen()}
        for spec in SPECS:
            if spec.kind != "histogram":
                yield family_of(spec, samples.get(spec.name, {}))


def router_metrics_page() -> str:
    """docs/ROUTER_METRICS.md."""
    return metrics_page("Metrics of kvbm-router", _INTRODUCTION, SPECS)


_INTRODUCTION: Final = """\
Served at `/metrics` of the router's HTTP address, in Prometheus's text format. `worker` is
INSTANCE.RANK as in `/v1/workers`, `pool` is `decode` or `prefill`, `tier` is `g1` (the engine's
memory) to `g4` (S3). Where a name of the reference router has an equal here it is the same behind
`kvbm_router_`. Generated: `python -m router.metrics > docs/ROUTER_METRICS.md`.
"""
TIERS: Final = tuple(tier.name.lower() for tier in Tier)


if __name__ == "__main__":
    sys.stdout.write(router_metrics_page())
