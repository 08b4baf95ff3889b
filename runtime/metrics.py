"""A program's Prometheus metrics as one table: what the code exports and the page lists.

What is the case is read when it is asked for and given as `Samples`; `family_of` makes of them
what a Prometheus collector gives out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

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


def metrics_page(title: str, introduction: str, specs: Iterable[Spec]) -> str:
    """The table in Markdown, ending in one newline."""
    lines = [f"# {title}", "", introduction.strip(), ""]
    lines += ["| name | kind | labels | meaning |", "|---|---|---|---|"]
    for spec in specs:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        lines.append(f"| `{spec.name}` | {spec.kind} | {labels} | {spec.help} |")
    return "\n".join(lines) + "\n"
