"""Our histogram tells Prometheus what `prometheus_client`'s does."""

from __future__ import annotations

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from runtime.metrics import Histogram, Spec

EDGES = (0.001, 0.25, 1, 10)
LABELS = st.sampled_from(["a", 'b"\n'])


def _told(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]  # which the other adds


@given(st.lists(st.tuples(LABELS, st.sampled_from(EDGES) | st.floats(0, 20)), max_size=30))
def test_it_is_the_usual_histogram(seen: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histogram(Spec("took_seconds", "histogram", "What.", ("by",)), EDGES, ours)
    other = prometheus_client.Histogram(
        "took_seconds", "What.", ("by",), buckets=EDGES, registry=theirs
    )
    for label, value in seen:
        mine.labels(label).observe(value)
        other.labels(label).observe(value)
    assert _told(ours) == _told(theirs)


def test_without_labels_it_is_there_from_the_start() -> None:
    registry = CollectorRegistry()
    Histogram(Spec("plain", "histogram", "What."), EDGES, registry)
    assert "plain_count 0.0" in _told(registry)
