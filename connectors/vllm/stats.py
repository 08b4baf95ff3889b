"""What the connector adds to vLLM's own metrics, and where a hit came from."""

from __future__ import annotations

from collections import Counter

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvbm.protocol import SOURCES
from storage_tiers.base import TierName

LOADED_CHUNKS = "vllm:kvbm_loaded_chunks"
LOAD_FAILURES = "vllm:kvbm_load_failures"
STORED_CHUNKS = "vllm:kvbm_stored_chunks"
UNSTORED_CHUNKS = "vllm:kvbm_unstored_chunks"
DEADLINES = "vllm:kvbm_deadlines_missed"
CONNECTED = "vllm:kvbm_connected"

HIT_SOURCES = {
    SOURCES[TierName.DRAM]: CacheHitSource.HOST,
    SOURCES[TierName.SSD]: CacheHitSource.DISK,
    SOURCES[TierName.PEER]: CacheHitSource.P2P,
    # An object store has no name of its own there.
    SOURCES[TierName.S3]: CacheHitSource.EXTERNAL_UNSPECIFIED,
}
"""vLLM's word for each of the protocol's sources."""

_TIERS = {number: tier.value for tier, number in SOURCES.items()}


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """The metrics the manager emits; vLLM registers them."""
    return {
        LOADED_CHUNKS: OffloadingCounterMetadata(
            "Chunks loaded into the engine, by the tier that held them.", ("tier",)
        ),
        LOAD_FAILURES: OffloadingCounterMetadata(
            "Loads that failed and were computed instead (one per request and try)."
        ),
        STORED_CHUNKS: OffloadingCounterMetadata("Chunks handed to the daemon."),
        UNSTORED_CHUNKS: OffloadingCounterMetadata(
            "Chunks computed but not handed to the daemon, by reason.", ("reason",)
        ),
        DEADLINES: OffloadingCounterMetadata(
            "Requests that went on without an answer or a chunk that was late.", ("wait",)
        ),
        CONNECTED: OffloadingGaugeMetadata("1 while the daemon serves this engine, else 0."),
    }


class Tally:
    """Counts between two polls of vLLM's statistics."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._connected: bool | None = None  # as last reported

    def add(self, name: str, count: int = 1, *labels: str) -> None:
        if count:
            self._counts[name, labels] += count

    def loaded(self, source: int, count: int) -> None:
        self.add(LOADED_CHUNKS, count, _TIERS.get(source, "unknown"))

    def take(self, *, connected: bool) -> OffloadingConnectorStats | None:
        """What has been counted since the last call, as vLLM wants it; None if nothing was."""
        if not self._counts and connected == self._connected:
            return None
        stats = OffloadingConnectorStats()
        for (name, labels), count in self._counts.items():
            stats.increase_counter(name, count, labels)
        stats.set_gauge(CONNECTED, int(connected))
        self._counts.clear()
        self._connected = connected
        return stats
