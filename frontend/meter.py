"""What the frontend counts: requests, their tokens, and how long everything took."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from frontend.errors import ApiError
from frontend.fleet import Assigned

_TTFT_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_DURATION_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STAGE_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 1)
_TOKENS: Final = tuple(4**n for n in range(1, 10))


class Meter:
    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        name = "kvbm_frontend"
        by = ["model", "route"]
        self.requests = Counter(
            f"{name}_requests",
            "Requests that ended, by outcome.",
            [*by, "outcome"],
            registry=self.registry,
        )
        self.inflight = Gauge(
            f"{name}_inflight_requests", "Requests under way.", ["route"], registry=self.registry
        )
        self.duration = Histogram(
            f"{name}_request_duration_seconds",
            "From the first byte in to the last one out.",
            by,
            buckets=_DURATION_S,
            registry=self.registry,
        )
        self.ttft = Histogram(
            f"{name}_time_to_first_token_seconds",
            "From the first byte in to the engine's first byte of answer.",
            by,
            buckets=_TTFT_S,
            registry=self.registry,
        )
        self.itl = Histogram(
            f"{name}_inter_token_latency_seconds",
            "Mean of a streamed request's times between events.",
            by,
            buckets=_ITL_S,
            registry=self.registry,
        )
        self.stage = Histogram(
            f"{name}_stage_duration_seconds",
            "What the frontend itself takes: `prepare` (decode, template, tokens), `route`.",
            ["stage"],
            buckets=_STAGE_S,
            registry=self.registry,
        )
        self.input_tokens = Histogram(
            f"{name}_input_sequence_tokens",
            "Tokens of prompts.",
            ["model"],
            buckets=_TOKENS,
            registry=self.registry,
        )
        self.cached_tokens = Counter(
            f"{name}_cached_tokens",
            "Of those, tokens the chosen engine was expected to have.",
            ["model"],
            registry=self.registry,
        )
        self.output_events = Counter(
            f"{name}_output_events",
            "Events of streams passed on: about a token each.",
            ["model"],
            registry=self.registry,
        )
        self.migrations = Counter(
            f"{name}_migrations",
            "Requests sent again because their engine failed.",
            ["model"],
            registry=self.registry,
        )

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
        self._meter = meter
        self._route = route
        self._began = self._latest = time.perf_counter()
        self._first: float | None = None
        self._events = 0
        meter.inflight.labels(route).inc()

    def prepared(self, tokens: int) -> None:
        self._stage("prepare")
        if tokens:
            self._meter.input_tokens.labels(self.model).observe(tokens)

    def sent(self, assigned: Assigned, *, migrated: bool) -> None:
        self._stage("route")
        if migrated:
            self._meter.migrations.labels(self.model).inc()
        elif assigned.cached_tokens:
            self._meter.cached_tokens.labels(self.model).inc(assigned.cached_tokens)

    def first_token(self) -> None:
        if self._first is None:
            self._first = time.perf_counter()

    def output(self, events: int) -> None:
        self._events += events

    def failed(self, error: ApiError) -> None:
        self.status = error.status
        self.outcome = error.code or error.type

    def end(self) -> None:
        meter, by = self._meter, (self.model, self._route)
        now = time.perf_counter()
        meter.inflight.labels(self._route).dec()
        outcome = self.outcome or ("success" if self.status < 400 else f"engine_{self.status}")
        meter.requests.labels(*by, outcome).inc()
        meter.duration.labels(*by).observe(now - self._began)
        if self._first is not None:
            meter.ttft.labels(*by).observe(self._first - self._began)
            if self._events > 1:
                meter.itl.labels(*by).observe((now - self._first) / (self._events - 1))
                meter.output_events.labels(self.model).inc(self._events)

    def _stage(self, stage: str) -> None:
        now = time.perf_counter()
        self._meter.stage.labels(stage).observe(now - self._latest)
        self._latest = now
