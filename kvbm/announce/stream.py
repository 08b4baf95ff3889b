"""The stream itself: events get their numbers, go out, and the latest are kept for replay.

Numbers are given to what the plane drops as well, so that who listens sees the gap. A number may
also stand for a change too large to tell (`skip`): what came before it cannot be replayed then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, Literal

from kvbm.announce.status import StreamStatus
from runtime.events import EventPlane
from runtime.events.envelope import Envelope, encode_envelope
from runtime.events.node_stream import TOPIC, blocks_subject
from runtime.events.router_event import KvCacheEvent, KvCacheEventData, RouterEvent, StorageTier
from runtime.events.router_wire import encode_msgpack

Domain = Literal["worker", "cache_owner"]

WORKERS_MAX: Final = 1 << 16
"""Of so many, counts of events are kept at a time; those of others begin at 0 anew."""


class Stream:
    """All methods are called from one event loop."""

    def __init__(
        self, plane: EventPlane, namespace: str, publisher: int, *, ring_bytes_max: int
    ) -> None:
        assert publisher > 0
        self.publisher = publisher
        self.next = 0
        self._plane = plane
        self._subject = blocks_subject(namespace)
        self._ring: deque[bytes] = deque()
        self._ring_bytes = 0
        self._ring_bytes_max = ring_bytes_max
        self._event_ids: dict[tuple[int, int], int] = {}
        self._dropped_total = 0
        self._skipped_total = 0

    def publish(
        self,
        worker_id: int,
        dp_rank: int,
        data: KvCacheEventData,
        tier: StorageTier,
        domain: Domain,
    ) -> None:
        """Send one event: about 20 us, and 20 ns a block."""
        ids, worker = self._event_ids, (worker_id, dp_rank)
        event_id = ids.pop(worker, 0)
        ids[worker] = event_id + 1
        if len(ids) > WORKERS_MAX:
            del ids[next(iter(ids))]
        event = RouterEvent(worker_id, KvCacheEvent(event_id, data, dp_rank), tier, domain)
        now_ms = time.time_ns() // 1_000_000
        payload = encode_msgpack(event)
        envelope = encode_envelope(Envelope(TOPIC, self.publisher, self.next, now_ms, payload))
        self.next += 1
        self._ring.append(envelope)
        self._ring_bytes += len(envelope)
        while self._ring_bytes > self._ring_bytes_max:
            self._ring_bytes -= len(self._ring.popleft())
        if not self._plane.publish(self._subject, envelope):
            self._dropped_total += 1

    def skip(self) -> None:
        """Something changed that is not told: who listens has to ask for everything."""
        self.next += 1
        self._ring.clear()
        self._ring_bytes = 0
        self._skipped_total += 1

    def replay(self, first: int) -> Sequence[bytes] | None:
        """All envelopes from number `first` on; None if the ring has not all of them any more, or
        `first` was never given."""
        oldest = self.next - len(self._ring)
        if not oldest <= first <= self.next:
            return None
        return list(islice(self._ring, first - oldest, None))

    def status(self) -> StreamStatus:
        return StreamStatus(
            publisher=f"{self.publisher:x}",
            next_sequence=self.next,
            dropped_total=self._dropped_total,
            skipped_total=self._skipped_total,
            ring_events=len(self._ring),
            ring_bytes=self._ring_bytes,
            ring_bytes_max=self._ring_bytes_max,
        )
