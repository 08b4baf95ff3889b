"""All Prometheus metrics of a planner, in one table.

`python -m planner.metrics` prints docs/PLANNER_METRICS.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from runtime.metrics import Samples, Spec, family_of, metrics_page

_P: Final = "kvbm_planner_"
_ROLE: Final = ("role",)

SPECS: Final = (
    Spec(f"{_P}build_info", "gauge", "Always 1; what runs.", ("version",)),
    Spec(f"{_P}ready", "gauge", "1 if the check passes.", ("check",)),
    Spec(f"{_P}paused", "gauge", "1 while an operator has paused it."),
    Spec(f"{_P}advisory", "gauge", "1 while it decides and does nothing."),
    Spec(f"{_P}target_replicas", "gauge", "Engines that shall be.", _ROLE),
    Spec(f"{_P}replicas", "gauge", "Engines that are.", ("role", "phase")),
    Spec(
        f"{_P}asked_replicas",
        "gauge",
        "Engines that each reason of the last decision asked for or allowed.",
        ("role", "reason"),
    ),
    Spec(
        f"{_P}requests_per_second",
        "gauge",
        "What arrives: `now` (the mean of half a minute), and what is `forecast`, with `low` and "
        "`high`.",
        ("of",),
    ),
    Spec(f"{_P}observed_ttft_seconds", "gauge", "Mean time to first token since the last look."),
    Spec(f"{_P}observed_itl_seconds", "gauge", "Mean time between tokens since the last look."),
    Spec(
        f"{_P}expected_ttft_seconds",
        "gauge",
        "With as many engines as the forecast needs, the mean time to first token.",
        _ROLE,
    ),
    Spec(f"{_P}expected_itl_seconds", "gauge", "The same for the time between tokens.", _ROLE),
    Spec(f"{_P}engine_step_seconds", "gauge", "A decode step of an idle engine.", _ROLE),
    Spec(f"{_P}engine_prefill_token_seconds", "gauge", "To compute a token of a prompt.", _ROLE),
    Spec(f"{_P}prompt_tokens", "gauge", "Mean tokens of prompts."),
    Spec(f"{_P}computed_prompt_tokens", "gauge", "Of those, tokens that no tier has."),
    Spec(f"{_P}output_tokens", "gauge", "Mean tokens of answers."),
    Spec(f"{_P}hit_rate", "gauge", "Share of prompt tokens found in a tier.", ("tier",)),
    Spec(f"{_P}waiting_requests", "gauge", "Requests in engines' queues."),
    Spec(f"{_P}running_requests", "gauge", "Requests that engines work on."),
    Spec(f"{_P}start_delay_seconds", "gauge", "What an engine is expected to take to start."),
    Spec(f"{_P}unread", "gauge", "Engines, frontends and event planes that cannot be read."),
    Spec(
        f"{_P}routers_tell_engines",
        "gauge",
        "Engines that could not be read, whose load routers tell instead.",
    ),
    Spec(
        f"{_P}events_total",
        "counter",
        "What came over the event plane: `heard`; `gap`: some of a router's were lost, and it was "
        "asked for its state; `malformed`; `dropped`: there was no room for them; `refused`: "
        "requests or routers beyond what is kept; `silent`: routers taken for gone.",
        ("kind",),
    ),
    Spec(f"{_P}tick_seconds", "gauge", "What the last tick took, acting included."),
    Spec(f"{_P}ticks_total", "counter", "Looks, each with a decision."),
    Spec(f"{_P}ticks_skipped_total", "counter", "Looks left out because one took too long."),
    Spec(f"{_P}scalings_total", "counter", "Changes that were asked for.", ("role", "direction")),
    Spec(
        f"{_P}faults_total",
        "counter",
        "What failed: asking what is `desired`, to `apply` a decision, or a tick by a `bug`.",
        ("step",),
    ),
    Spec(
        f"{_P}engine_seconds_total",
        "counter",
        "Time of all engines together, starting and draining included.",
        _ROLE,
    ),
)


class PlannerMetrics(Collector):
    """`read` is asked whenever somebody reads them."""

    def __init__(self, version: str, read: Callable[[], Samples]) -> None:
        self._version = version
        self._read = read
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        found = self._read() | {f"{_P}build_info": {(self._version,): 1.0}}
        for spec in SPECS:
            yield family_of(spec, found.get(spec.name, {}))


def planner_metrics_page() -> str:
    """docs/PLANNER_METRICS.md."""
    return metrics_page("Metrics of kvbm-planner", _INTRODUCTION, SPECS)


_INTRODUCTION: Final = """\
Served at `/metrics` of `http`, in Prometheus's text format. `role` is `aggregated`, `prefill` or
`decode`. Generated: `python -m planner.metrics > docs/PLANNER_METRICS.md`.
"""


if __name__ == "__main__":
    sys.stdout.write(planner_metrics_page())
