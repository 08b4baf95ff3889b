"""What the connector adds to vLLM's metrics."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata

from connectors.vllm import stats
from connectors.vllm.stats import Tally, metric_definitions

LABELS = {
    stats.LOADED_CHUNKS: ("G2",),
    stats.LOAD_FAILURES: (),
    stats.STORED_CHUNKS: (),
    stats.UNSTORED_CHUNKS: ("no_slot",),
    stats.DEADLINES: ("answer",),
}


@pytest.fixture
def tally() -> Tally:
    """One that has reported that the daemon serves."""
    tally = Tally()
    assert taken(tally) == {stats.CONNECTED: {(): 1}}
    return tally


def taken(tally: Tally, *, connected: bool = True) -> dict[str, Any] | None:
    found = tally.take(connected=connected)
    return None if found is None else found.data["data"]


def test_what_did_not_change_is_not_reported(tally: Tally) -> None:
    assert taken(tally) is None
    assert taken(tally, connected=False) == {stats.CONNECTED: {(): 0}}
    assert taken(tally, connected=False) is None


def test_counts_are_added_up_by_label_and_reported_once(tally: Tally) -> None:
    tally.add(stats.UNSTORED_CHUNKS, 2, "no_slot")
    tally.add(stats.UNSTORED_CHUNKS, 3, "no_slot")
    tally.add(stats.UNSTORED_CHUNKS, 1, "failed")
    tally.add(stats.LOAD_FAILURES)
    assert taken(tally) == {
        stats.UNSTORED_CHUNKS: {("no_slot",): 5, ("failed",): 1},
        stats.LOAD_FAILURES: {(): 1},
        stats.CONNECTED: {(): 1},
    }
    assert taken(tally) is None
    tally.add(stats.LOAD_FAILURES)
    assert taken(tally) == {stats.LOAD_FAILURES: {(): 1}, stats.CONNECTED: {(): 1}}


def test_nothing_counted_is_nothing_to_report(tally: Tally) -> None:
    tally.add(stats.STORED_CHUNKS, 0)
    tally.loaded(2, 0)
    assert taken(tally) is None


def test_loaded_chunks_are_counted_by_the_tier_that_held_them(tally: Tally) -> None:
    for source in (2, 3, 3, 4, 7):
        tally.loaded(source, 2)
    report = taken(tally)
    assert report is not None
    assert report[stats.LOADED_CHUNKS] == {("G2",): 2, ("G3",): 4, ("G4",): 2, ("unknown",): 2}


def test_counters_add_up_in_vllm_and_the_gauge_is_the_last_one_said() -> None:
    tally = Tally()
    tally.add(stats.STORED_CHUNKS, 2)
    first = tally.take(connected=True)
    tally.add(stats.STORED_CHUNKS, 3)
    second = tally.take(connected=False)
    assert first is not None and second is not None
    assert first.aggregate(second).reduce() == {stats.STORED_CHUNKS: 5, stats.CONNECTED: 0}


def test_vllm_registers_each_metric_with_the_labels_it_is_counted_with() -> None:
    definitions = metric_definitions()
    gauge = definitions.pop(stats.CONNECTED)
    assert isinstance(gauge, OffloadingGaugeMetadata) and gauge.labelnames == ()
    assert definitions.keys() == LABELS.keys()
    for name, definition in definitions.items():
        assert isinstance(definition, OffloadingCounterMetadata)
        assert len(definition.labelnames) == len(LABELS[name])
        assert definition.documentation
