"""All Prometheus metrics of the daemon, in one table, on a registry of their own.

`Metrics` is the block manager's `Meter`: what happens is counted here when it happens; what is
the case is read from the `NodeView` when it is asked for, so no number is kept twice.
`python -m kvbm.daemon.metrics` prints docs/METRICS.md.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from kvbm.announce.status import AnnouncerStatus
from kvbm.daemon.view import NodeView
from runtime.metrics import Labels, Samples, Spec, family_of, metrics_page
from storage_tiers.base import TierName, TierUsage

SPECS: Final = (
    Spec("kvbm_build_info", "gauge", "Always 1; what runs, and where.", ("version", "node")),
    Spec("kvbm_ready", "gauge", "1 if the check passes.", ("check",)),
    Spec("kvbm_tier_capacity_bytes", "gauge", "Most a tier may hold.", ("tier",)),
    Spec("kvbm_tier_used_bytes", "gauge", "What a tier holds, padding included.", ("tier",)),
    Spec("kvbm_tier_blocks", "gauge", "Chunks in a tier.", ("tier",)),
    Spec("kvbm_tier_stored_bytes_total", "counter", "Bytes written to a tier.", ("tier",)),
    Spec("kvbm_tier_loaded_bytes_total", "counter", "Bytes read from a tier.", ("tier",)),
    Spec("kvbm_evictions_total", "counter", "Chunks a tier removed.", ("tier", "reason")),
    Spec("kvbm_corrupt_chunks_total", "counter", "Chunks failing their checksum.", ("tier",)),
    Spec("kvbm_tier_requests_total", "counter", "Requests that S3 counts.", ("tier", "op")),
    Spec("kvbm_tier_errors_total", "counter", "Operations a medium failed.", ("tier", "op")),
    Spec("kvbm_lookup_blocks_total", "counter", "Chunks asked for.", ("tier", "outcome")),
    Spec("kvbm_transfer_bytes_total", "counter", "Bytes moved.", ("source", "target")),
    Spec(
        "kvbm_transfer_duration_seconds",
        "histogram",
        "Time of one batch of chunks from source to target.",
        ("source", "target"),
    ),
    Spec("kvbm_dropped_chunks_total", "counter", "Chunks not moved.", ("queue", "reason")),
    Spec("kvbm_queue_depth", "gauge", "What waits in a queue.", ("queue",)),
    Spec("kvbm_queue_limit", "gauge", "Most that may wait in a queue.", ("queue",)),
    Spec("kvbm_errors_total", "counter", "Failures the daemon survived.", ("op", "kind")),
    Spec("kvbm_scrubbed_chunks_total", "counter", "Chunks read back.", ("tier", "outcome")),
    Spec("kvbm_quarantined_bytes", "gauge", "Space out of use for wrong bytes.", ("tier",)),
    Spec("kvbm_governor_verdicts_total", "counter", "Lookups by how much to load.", ("why",)),
    Spec(
        "kvbm_governor_skipped_tokens_total",
        "counter",
        "Tokens kept here that engines were left to compute, because that is sooner.",
    ),
    Spec("kvbm_governor_probes_total", "counter", "Tiers measured again.", ("tier",)),
    Spec("kvbm_governor_begin_seconds", "gauge", "Measured time before bytes come.", ("tier",)),
    Spec("kvbm_governor_bytes_per_second", "gauge", "Measured speed upward.", ("tier",)),
    Spec("kvbm_receipts", "gauge", "Receipts of lookups that are kept."),
    Spec("kvbm_sample_asked_chunks_total", "counter", "Lookups watched for `kvbm what-if`."),
    Spec("kvbm_sample_chunks_total", "counter", "Of those, of keys in the sample."),
    Spec("kvbm_sample_keys", "gauge", "Keys in the sample."),
    Spec("kvbm_sample_rate", "gauge", "Part of all keys that is sampled."),
    Spec("kvbm_sessions", "gauge", "Connections of engines.", ("role",)),
    Spec("kvbm_claims", "gauge", "Chunks held against eviction for engines."),
    Spec("kvbm_leased_bytes", "gauge", "Host memory lent to engines to store into."),
    Spec("kvbm_events_published_total", "counter", "Block events sent."),
    Spec("kvbm_events_dropped_total", "counter", "Block events not sent: the queue was full."),
    Spec("kvbm_events_connected", "gauge", "1 while the event plane can be reached."),
    Spec("kvbm_event_messages_dropped_total", "counter", "Messages that the event plane lost."),
    Spec(
        "kvbm_event_messages_unconfirmed_total",
        "counter",
        "Messages sent that JetStream did not confirm to keep.",
    ),
    Spec(
        "kvbm_event_plane_faults_total",
        "counter",
        "Faults, other than of the network, after which the event plane connected anew.",
    ),
    Spec("kvbm_stream_events_total", "counter", "Events for routers, those not sent too."),
    Spec("kvbm_stream_dropped_total", "counter", "Of those, not sent: the queue was full."),
    Spec("kvbm_stream_skipped_total", "counter", "Changes too large to tell one by one."),
    Spec("kvbm_stream_served", "gauge", "1 while routers can ask for what they missed."),
    Spec("kvbm_stream_answers_total", "counter", "Questions of routers.", ("kind",)),
    Spec("kvbm_stream_ring_bytes", "gauge", "Recent events kept for routers."),
    Spec("kvbm_stream_waiting_chunks", "gauge", "Chunks whose changes are not told yet."),
    Spec("kvbm_announced_blocks", "gauge", "Engines' blocks that routers know of.", ("tier",)),
    Spec("kvbm_unannounced_chunks", "gauge", "Chunks without a note: not told to routers."),
    Spec("kvbm_notebook_bytes", "gauge", "Memory that notes of chunks take."),
    Spec("kvbm_engines_heard", "gauge", "Engines whose own events come."),
    Spec("kvbm_engine_blocks", "gauge", "Blocks an engine holds itself (G1).", ("worker",)),
    Spec(
        "kvbm_engine_events_lost_total",
        "counter",
        "Batches of an engine's events that could not be had.",
        ("worker",),
    ),
    Spec(
        "kvbm_engine_blocks_orphaned_total",
        "counter",
        "Blocks of an engine that could not be named, for the one before is not known.",
        ("worker",),
    ),
)
DURATION: Final = "kvbm_transfer_duration_seconds"
_DURATION_BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_ROLES: Final = ("scheduler", "worker")


class Metrics:
    def __init__(self, version: str, node: str) -> None:
        self.version = version
        self.node = node
        self.registry = CollectorRegistry()
        self._counts: defaultdict[str, Counter[Labels]] = defaultdict(Counter)
        duration = next(spec for spec in SPECS if spec.name == DURATION)
        self._durations = Histogram(
            duration.name,
            duration.help,
            duration.labels,
            buckets=_DURATION_BUCKETS_S,
            registry=self.registry,
        )

    # -- the manager's Meter --------------------------------------------------------------

    def lookup(self, tier: TierName, outcome: str, chunks: int) -> None:
        self._counts["kvbm_lookup_blocks_total"][tier.value, outcome] += chunks

    def transfer(self, source: str, target: str, size: int, seconds: float) -> None:
        self._counts["kvbm_transfer_bytes_total"][source, target] += size
        if seconds > 0:
            self._durations.labels(source, target).observe(seconds)

    def dropped(self, queue: str, reason: str, chunks: int) -> None:
        self._counts["kvbm_dropped_chunks_total"][queue, reason] += chunks

    def error(self, op: str, kind: str, count: int = 1) -> None:
        self._counts["kvbm_errors_total"][op, kind] += count

    def scrubbed(self, tier: TierName, outcome: str) -> None:
        self._counts["kvbm_scrubbed_chunks_total"][tier.value, outcome] += 1

    def judged(self, why: str, skipped_tokens: int) -> None:
        self._counts["kvbm_governor_verdicts_total"][why,] += 1
        self._counts["kvbm_governor_skipped_tokens_total"][()] += skipped_tokens

    def probed(self, tier: TierName) -> None:
        self._counts["kvbm_governor_probes_total"][tier.value,] += 1

    # -- reading --------------------------------------------------------------------------

    def lookups(self, tier: TierName, outcome: str) -> int:
        return self._counts["kvbm_lookup_blocks_total"][tier.value, outcome]

    def attach(self, view: NodeView) -> None:
        """From now on a scrape also tells what is the case in `view`. Called once."""
        self.registry.register(_NodeCollector(self, view))

    def render(self) -> bytes:
        """The exposition in Prometheus's text format, of CONTENT_TYPE."""
        return generate_latest(self.registry)

    def counted(self) -> Samples:
        return {name: {**counts} for name, counts in self._counts.items()}


class _NodeCollector(Collector):
    def __init__(self, metrics: Metrics, view: NodeView) -> None:
        self._metrics = metrics
        self._view = view

    def describe(self) -> Iterable[Metric]:
        """Registering asks for names only; nothing is read before the first scrape."""
        return [family_of(spec, {}) for spec in SPECS if spec.kind != "histogram"]

    def collect(self) -> Iterator[Metric]:
        samples = {**self._metrics.counted(), **self._seen()}
        for spec in SPECS:
            if spec.kind != "histogram":
                yield family_of(spec, samples.get(spec.name, {}))

    def _seen(self) -> Samples:
        view = self._view
        sessions, events = view.sessions(), view.events()
        roles = Counter(dict.fromkeys(_ROLES, 0))
        roles.update(session.role for session in sessions)
        build = (self._metrics.version, self._metrics.node)
        samples: Samples = {
            "kvbm_build_info": {build: 1},
            "kvbm_ready": {(c,): float(r is None) for c, r in view.readiness().items()},
            "kvbm_sessions": {(role,): count for role, count in roles.items()},
            "kvbm_claims": {(): sum(session.claims for session in sessions)},
            "kvbm_leased_bytes": {(): sum(session.leased_bytes for session in sessions)},
            "kvbm_events_published_total": {(): events.published_total},
            "kvbm_events_dropped_total": {(): events.dropped_total},
            "kvbm_events_connected": {(): float(events.connected)},
            "kvbm_event_messages_dropped_total": {(): events.messages_dropped_total},
            "kvbm_event_messages_unconfirmed_total": {(): events.messages_unconfirmed_total},
            "kvbm_event_plane_faults_total": {(): events.plane_faults_total},
            "kvbm_queue_depth": {(queue.name,): queue.depth for queue in view.queues()},
            "kvbm_queue_limit": {(queue.name,): queue.limit for queue in view.queues()},
            "kvbm_receipts": {(): view.receipts().kept},
        }
        if (stream := view.stream()) is not None:
            samples.update(_of_stream(stream))
        if (sample := view.sample()) is not None:
            samples["kvbm_sample_asked_chunks_total"] = {(): sample.asked_chunks_total}
            samples["kvbm_sample_chunks_total"] = {(): sample.sampled_chunks_total}
            samples["kvbm_sample_keys"] = {(): sample.keys}
            samples["kvbm_sample_rate"] = {(): sample.rate}
        held: Counter[Labels] = Counter()
        for entry in view.quarantine().entries:
            held[entry.tier.value,] += entry.held_bytes
        samples["kvbm_quarantined_bytes"] = dict(held)
        for line in view.governor().tiers:
            if line.bytes_per_s is not None and line.begin_s is not None:
                label = (line.tier.value,)
                samples.setdefault("kvbm_governor_bytes_per_second", {})[label] = line.bytes_per_s
                samples.setdefault("kvbm_governor_begin_seconds", {})[label] = line.begin_s
        for usage in view.tiers():
            for name, values in _of_tier(usage).items():
                samples.setdefault(name, {}).update(values)
        return samples


def _of_stream(found: AnnouncerStatus) -> Samples:
    stream, tiers, engines = found.stream, found.tiers, found.engines
    announced: dict[Labels, float] = {(tier,): blocks for tier, blocks in tiers.blocks.items()}
    announced[TierName.HBM.value,] = sum(engine.blocks for engine in engines)
    return {
        "kvbm_stream_events_total": {(): stream.next_sequence - stream.skipped_total},
        "kvbm_stream_dropped_total": {(): stream.dropped_total},
        "kvbm_stream_skipped_total": {(): stream.skipped_total},
        "kvbm_stream_served": {(): float(found.endpoint is not None)},
        "kvbm_stream_answers_total": {
            ("replay",): found.replays_total,
            ("snapshot",): found.snapshots_total,
        },
        "kvbm_stream_ring_bytes": {(): stream.ring_bytes},
        "kvbm_stream_waiting_chunks": {(): tiers.waiting_chunks},
        "kvbm_announced_blocks": announced,
        "kvbm_unannounced_chunks": {(): tiers.unannounced_chunks},
        "kvbm_notebook_bytes": {(): tiers.used_bytes},
        "kvbm_engines_heard": {(): sum(engine.connected for engine in engines)},
        "kvbm_engine_blocks": {(engine.worker,): engine.blocks for engine in engines},
        "kvbm_engine_events_lost_total": {(e.worker,): e.lost_total for e in engines},
        "kvbm_engine_blocks_orphaned_total": {(e.worker,): e.orphaned_total for e in engines},
    }


def _of_tier(usage: TierUsage) -> Samples:
    tier = usage.tier.value
    return {
        "kvbm_tier_capacity_bytes": {(tier,): usage.capacity_bytes},
        "kvbm_tier_used_bytes": {(tier,): usage.used_bytes},
        "kvbm_tier_blocks": {(tier,): usage.chunks},
        "kvbm_tier_stored_bytes_total": {(tier,): usage.stored_bytes_total},
        "kvbm_tier_loaded_bytes_total": {(tier,): usage.loaded_bytes_total},
        "kvbm_evictions_total": {(tier, r): count for r, count in usage.evictions_total.items()},
        "kvbm_corrupt_chunks_total": {(tier,): usage.corrupt_total},
        "kvbm_tier_requests_total": {
            (tier, op): count for op, count in usage.requests_total.items()
        },
        "kvbm_tier_errors_total": {(tier, op): count for op, count in usage.errors_total.items()},
    }


def daemon_metrics_page() -> str:
    """docs/METRICS.md."""
    return metrics_page("Metrics of kvbm-daemon", _INTRODUCTION, SPECS)


_INTRODUCTION: Final = """\
Served at `/metrics` of the admin address, in Prometheus's text format. `tier` is `G2`
(host memory), `G3` (SSD), `peer` (host memory of other nodes) or `G4` (S3). Generated:
`python -m kvbm.daemon.metrics > docs/METRICS.md`.
"""


if __name__ == "__main__":
    sys.stdout.write(daemon_metrics_page())
