"""What the frontend counts: requests, their tokens, and how long everything took.

`python -m frontend.meter` prints docs/FRONTEND_METRICS.md.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from frontend.errors import ApiError
from frontend.fleet import Assigned
from runtime.metrics import Spec, metrics_page

_P: Final = "kvbm_frontend_"
_BY: Final = ("model", "route")
_DURATION_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_BUCKETS: Final[dict[str, tuple[float, ...]]] = {
    f"{_P}request_duration_seconds": _DURATION_S,
    f"{_P}time_to_first_token_seconds": (0.01, 0.025, *_DURATION_S[:10]),
    f"{_P}inter_token_latency_seconds": (0.001, 0.0025, 0.005, 0.01, 0.025, *_DURATION_S[:5]),
    f"{_P}stage_duration_seconds": (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1),
    f"{_P}input_sequence_tokens": tuple(4**n for n in range(1, 10)),
}
SPECS: Final = (
    Spec(f"{_P}requests_total", "counter", "Requests that ended, by how.", (*_BY, "outcome")),
    Spec(f"{_P}inflight_requests", "gauge", "Requests under way.", ("route",)),
    Spec(
        f"{_P}request_duration_seconds",
        "histogram",
        "From the first byte in to the last one out.",
        _BY,
    ),
    Spec(
        f"{_P}time_to_first_token_seconds",
        "histogram",
        "From the first byte in to the engine's first word of answer. Of an answer that is passed "
        "through whole it is not known.",
        _BY,
    ),
    Spec(
        f"{_P}inter_token_latency_seconds",
        "histogram",
        "Of a streamed request, the mean time of an output token behind the first.",
        _BY,
    ),
    Spec(
        f"{_P}stage_duration_seconds",
        "histogram",
        "What the frontend itself takes: `prepare` (decoding, template, tokens) and `route`, "
        "waiting for an engine included.",
        ("stage",),
    ),
    Spec(f"{_P}input_sequence_tokens", "histogram", "Tokens of prompts.", ("model",)),
    Spec(
        f"{_P}cached_tokens_total",
        "counter",
        "Of those, tokens that the chosen engine was expected to have in some tier.",
        ("model",),
    ),
    Spec(
        f"{_P}output_tokens_total",
        "counter",
        "Tokens of answers. `count` is `told`, or `estimated` of a stream passed on that does not "
        "say them (`stream_options.include_usage`): by its events.",
        ("model", "count"),
    ),
    Spec(
        f"{_P}migrations_total",
        "counter",
        "Requests sent again because an engine failed.",
        ("model",),
    ),
    Spec(
        f"{_P}responses_remembered",
        "gauge",
        "Responses (`/v1/responses`) whose engine is known.",
    ),
    Spec(
        f"{_P}responses_forgotten_total",
        "counter",
        "Of those, forgotten because there are newer ones; engines are asked for them.",
    ),
    Spec(
        f"{_P}response_searches_total",
        "counter",
        "Searches of all engines for a response that is not known: `found` or `not_found`.",
        ("outcome",),
    ),
)


class Meter:
    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        made = {spec.name.removeprefix(_P): self._made(spec) for spec in SPECS}
        self.requests = made["requests_total"]
        self.inflight = made["inflight_requests"]
        self.duration = made["request_duration_seconds"]
        self.ttft = made["time_to_first_token_seconds"]
        self.itl = made["inter_token_latency_seconds"]
        self.stage = made["stage_duration_seconds"]
        self.input_tokens = made["input_sequence_tokens"]
        self.cached_tokens = made["cached_tokens_total"]
        self.output_tokens = made["output_tokens_total"]
        self.migrations = made["migrations_total"]
        self.responses_remembered = made["responses_remembered"]
        self.responses_forgotten = made["responses_forgotten_total"]
        self.response_searches = made["response_searches_total"]
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}

    def _made(self, spec: Spec) -> Any:
        given = (spec.name, spec.help, spec.labels)
        match spec.kind:
            case "counter":
                return Counter(*given, registry=self.registry)
            case "gauge":
                return Gauge(*given, registry=self.registry)
            case "histogram":
                return Histogram(*given, registry=self.registry, buckets=_BUCKETS[spec.name])

    def child(self, metric: Any, *labels: str) -> Any:
        """`metric.labels`, which takes locks and checks, once for each; they are few."""
        found = self._children.get((metric, labels))
        if found is None:
            found = self._children[metric, labels] = metric.labels(*labels)
        return found

    def begin(self, route: str) -> Measured:
        return Measured(self, route)

    def refused(self, route: str, error: ApiError) -> None:
        """Before anything was read."""
        self.requests.labels("", route, error.code or "error").inc()


class Measured:
    """One request's."""

    def __init__(self, meter: Meter, route: str) -> None:
        self.model = ""
        self.outcome = ""
        self.status = 200
        self.placed = False  # an engine was chosen
        self.is_estimate = False  # how many tokens there were
        self.is_whole = False  # nothing of its answer is missing
        self._meter = meter
        self._route = route
        self._began = self._latest = time.perf_counter()
        self._first: float | None = None
        self._tokens = 0
        meter.child(meter.inflight, route).inc()

    def prepared(self, tokens: int) -> None:
        self._stage("prepare")
        if tokens:
            self._meter.child(self._meter.input_tokens, self.model).observe(tokens)

    def sent(self, assigned: Assigned, *, migrated: bool) -> None:
        self._stage("route")
        self.placed = True
        if migrated:
            self._meter.child(self._meter.migrations, self.model).inc()
        elif assigned.cached_tokens:
            self._meter.child(self._meter.cached_tokens, self.model).inc(assigned.cached_tokens)

    def first_token(self) -> None:
        if self._first is None:
            self._first = time.perf_counter()

    def output(self, tokens: int) -> None:
        """So many more; fewer than 0 if there were fewer than told before."""
        self._tokens += tokens

    def failed(self, error: ApiError) -> None:
        self.status = error.status
        self.outcome = error.code or error.type

    def end(self) -> None:
        meter, by = self._meter, (self.model, self._route)
        now = time.perf_counter()
        meter.child(meter.inflight, self._route).dec()
        outcome = self.outcome or ("success" if self.status < 400 else f"engine_{self.status}")
        meter.child(meter.requests, *by, outcome).inc()
        meter.child(meter.duration, *by).observe(now - self._began)
        if self._first is not None:
            meter.child(meter.ttft, *by).observe(self._first - self._began)
            if self._tokens > 1:
                meter.child(meter.itl, *by).observe((now - self._first) / (self._tokens - 1))
        if self._tokens:
            count = "estimated" if self.is_estimate else "told"
            meter.child(meter.output_tokens, self.model, count).inc(self._tokens)

    def _stage(self, stage: str) -> None:
        now = time.perf_counter()
        self._meter.child(self._meter.stage, stage).observe(now - self._latest)
        self._latest = now


def frontend_metrics_page() -> str:
    """docs/FRONTEND_METRICS.md."""
    return metrics_page("Metrics of kvbm-frontend", _INTRODUCTION, SPECS)


_INTRODUCTION: Final = """\
Served at `/metrics` of the address that clients use, in Prometheus's text format. The router in
the frontend has its own, at `/metrics` of the operators' address
([ROUTER_METRICS.md](ROUTER_METRICS.md)). `outcome` is `success`, `cancelled`, the engine's status
as `engine_400`, or the `code` of the frontend's own error. Generated:
`python -m frontend.meter > docs/FRONTEND_METRICS.md`.
"""


if __name__ == "__main__":
    sys.stdout.write(frontend_metrics_page())
