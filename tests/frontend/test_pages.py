"""The generated pages are what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from frontend.meter import SPECS, Meter, frontend_metrics_page
from frontend.settings import config_page

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "made"),
    [("FRONTEND_CONFIG.md", config_page), ("FRONTEND_METRICS.md", frontend_metrics_page)],
)
def test_a_page_is_current(name: str, made: object) -> None:
    assert callable(made)
    assert (DOCS / name).read_text() == made(), "make it again, as its introduction says"


def test_every_metric_is_in_the_table() -> None:
    exported = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in Meter().registry.collect()
    }
    assert exported == {spec.name for spec in SPECS}
