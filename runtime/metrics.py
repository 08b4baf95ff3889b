"""A program's Prometheus metrics as one table: what the code exports and the page lists.

What is the case is read when it is asked for and given as `Samples`; `family_of` makes of them
what a Prometheus collector gives out.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[str, ...]
Samples = dict[str, dict[Labels, float]]
"""Metric's name -> values of its labels -> value."""


@dataclass(frozen=True, slots=True)
class Spec:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


def family_of(spec: Spec, values: Mapping[Labels, float]) -> Metric:
    """Of a counter or gauge."""
    kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    family = kind(spec.name, spec.help, labels=spec.labels)
    for labels, value in values.items():
        assert len(labels) == len(spec.labels), spec.name
        family.add_metric(labels, value)
    return family


class Distribution:
    """Of one set of labels; see `Histogram`."""

    __slots__ = ("_edges", "counts", "total")

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self.counts = [0] * (len(edges) + 1)  # by bucket, the last of what is above all edges
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._edges, value)] += 1
        self.total += value


class Histogram(Collector):
    """As `prometheus_client` has it, for one thread: a fifth of its cost, as it takes no locks."""

    def __init__(self, spec: Spec, edges: Sequence[float], registry: CollectorRegistry) -> None:
        """`edges` rise; each is the most that its bucket takes."""
        self._spec = spec
        self._edges = tuple(map(float, edges))
        self._children: dict[Labels, Distribution] = {}
        if not spec.labels:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Distribution:
        found = self._children.get(values)
        if found is None:
            assert len(values) == len(self._spec.labels), self._spec.name
            found = self._children[values] = Distribution(self._edges)
        return found

    def describe(self) -> list[Metric]:
        return [self._family()]

    def collect(self) -> list[Metric]:
        family = self._family()
        names = [*map(floatToGoString, self._edges), "+Inf"]
        for labels, child in self._children.items():
            counts = itertools.accumulate(child.counts)
            buckets = list(zip(names, map(float, counts), strict=True))
            family.add_metric(labels, buckets, child.total)
        return [family]

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._spec.name, self._spec.help, labels=self._spec.labels)


def metrics_page(title: str, introduction: str, specs: Iterable[Spec]) -> str:
    """The table in Markdown, ending in one newline."""
    lines = [f"# {title}", "", introduction.strip(), ""]
    lines += ["| name | kind | labels | meaning |", "|---|---|---|---|"]
    for spec in specs:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        lines.append(f"| `{spec.name}` | {spec.kind} | {labels} | {spec.help} |")
    return "\n".join(lines) + "\n"
