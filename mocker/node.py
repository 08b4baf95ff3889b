"""A node of mock engines for routers: their block events as one stream, with all that mends a gap.

What the daemon's stream is, in the terms of `runtime.events.node_stream`: envelopes on the event
plane, a ring of the latest for those who missed some, everything held for those who missed more, a
record in discovery, speeds now and then. One event loop calls it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Final, Literal

import numpy as np

from kvbm.note import owner_of
from mocker.events import BlockEvent, BlocksStored, Tier
from runtime.component import Runtime, Serving
from runtime.events import EventPlane
from runtime.events.envelope import PUBLISHER_ID_MAX, Envelope, encode_envelope
from runtime.events.node_stream import (
    COMPONENT,
    ENDPOINT,
    LABEL_NODE,
    LABEL_PUBLISHER,
    LABEL_READERS,
    TOPIC,
    Begins,
    NodeSpeeds,
    Rows,
    WorkerSpeed,
    blocks_subject,
    decode_question,
    encode_catch_up,
    encode_speeds,
    readers_label,
    speeds_subject,
)
from runtime.events.router_event import (
    KvCacheEvent,
    Removed,
    RouterEvent,
    StorageTier,
    Stored,
    hashes,
)
from runtime.events.router_wire import encode_msgpack
from runtime.requests import RequestContext
from runtime.tasks import end

RING_BYTES: Final = 16 << 20
ROWS_MAX: Final = 1 << 16  # in one item of a snapshot
SPEEDS_EVERY_S: Final = 2.0
DOMAIN: Final = 1  # all mock engines of a node hold the same kind of KV

STORAGE: Final[Mapping[Tier, StorageTier]] = {
    "G1": StorageTier.DEVICE,
    "G2": StorageTier.HOST_PINNED,
    "G3": StorageTier.DISK,
    "G4": StorageTier.EXTERNAL,
}

Domain = Literal["worker", "cache_owner"]
Holder = tuple[int, Tier]  # worker or owner, and where


class MockNode:
    """`emit` takes engines' events; `workers` says which instance the n-th engine is."""

    def __init__(
        self, name: str, namespace: str, plane: EventPlane, *, ring_bytes: int = RING_BYTES
    ) -> None:
        self.name = name
        self.owner = owner_of(name, DOMAIN)
        self.publisher = secrets.randbelow(PUBLISHER_ID_MAX) + 1
        self.next = 0
        self.unpublished_total = 0
        self._namespace = namespace
        self._plane = plane
        self._subject = blocks_subject(namespace)
        self._workers: dict[int, int] = {}
        self._speeds: list[WorkerSpeed] = []
        self._ring: deque[bytes] = deque()
        self._ring_bytes = 0
        self._ring_bytes_max = ring_bytes
        self._held: dict[Holder, dict[int, tuple[int, int]]] = {}  # block: its parent, its tokens
        self._event_ids: dict[int, int] = {}
        self._serving: Serving | None = None
        self._telling: asyncio.Task[None] | None = None

    async def start(
        self, runtime: Runtime, workers: Mapping[int, int], speeds: list[WorkerSpeed]
    ) -> None:
        """Be found, and tell speeds. Raises OSError where there is no address."""
        self._workers = dict(workers)
        self._speeds = speeds
        labels = {
            LABEL_NODE: self.name,
            LABEL_PUBLISHER: f"{self.publisher:x}",
            LABEL_READERS: readers_label({(one, 0): self.owner for one in workers.values()}),
        }
        endpoint = runtime.namespace(self._namespace).component(COMPONENT).endpoint(ENDPOINT)
        self._serving = await endpoint.serve(self.catch_up, labels=labels)
        self._telling = asyncio.create_task(self._tell_speeds(), name="speeds")

    async def close(self) -> None:
        """Idempotent; the runtime takes the record back."""
        if self._telling is not None:
            await end(self._telling)

    def emit(self, event: BlockEvent) -> None:
        in_engine = event.tier == "G1"
        worker = self._workers[event.engine] if in_engine else self.owner
        held = self._held.setdefault((worker, event.tier), {})
        names = hashes(event.block_hashes)
        data: Stored | Removed
        if isinstance(event, BlocksStored):
            data = Stored(event.parent_hash, names, hashes(event.tokens_hashes))
            parent = event.parent_hash or 0
            for name, tokens in zip(event.block_hashes, event.tokens_hashes, strict=True):
                held[name] = parent, tokens
                parent = name
        else:
            data = Removed(names)
            for name in event.block_hashes:
                held.pop(name, None)
        number = self._event_ids.get(worker, 0)
        self._event_ids[worker] = number + 1
        domain: Domain = "worker" if in_engine else "cache_owner"
        self._publish(RouterEvent(worker, KvCacheEvent(number, data), STORAGE[event.tier], domain))

    async def catch_up(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        """The endpoint's handler. What it answers is what was the case when it was asked."""
        question = decode_question(payload)
        first = self.next - len(self._ring)
        if question.publisher == self.publisher and first <= question.first <= self.next:
            missing = list(self._ring)[question.first - first :]
            yield encode_catch_up(Begins(self.publisher, "replay", self.next))
            for envelope in missing:
                yield envelope
            return
        rows = [part for holder, held in self._held.items() for part in _rows(holder, held)]
        yield encode_catch_up(Begins(self.publisher, "snapshot", self.next))
        for part in rows:
            yield encode_catch_up(part)

    def _publish(self, event: RouterEvent) -> None:
        now_ms = int(time.time() * 1000)
        payload = encode_msgpack(event)
        data = encode_envelope(Envelope(TOPIC, self.publisher, self.next, now_ms, payload))
        self.next += 1
        self._ring.append(data)
        self._ring_bytes += len(data)
        while self._ring_bytes > self._ring_bytes_max:
            self._ring_bytes -= len(self._ring.popleft())
        if not self._plane.publish(self._subject, data):
            self.unpublished_total += 1

    async def _tell_speeds(self) -> None:
        told = encode_speeds(NodeSpeeds(self.publisher, self.name, self._speeds))
        while True:
            if not self._plane.publish(speeds_subject(self._namespace), told):
                self.unpublished_total += 1
            await asyncio.sleep(SPEEDS_EVERY_S)


def _rows(holder: Holder, held: Mapping[int, tuple[int, int]]) -> list[Rows]:
    worker, tier = holder
    both = np.array(list(held.values()), "<u8").reshape(-1, 2)
    domain: Domain = "worker" if tier == "G1" else "cache_owner"
    return [
        Rows(
            worker_id=worker,
            dp_rank=0,
            residency_domain=domain,
            storage_tier=STORAGE[tier],
            parents=both[first : first + ROWS_MAX, 0].tobytes(),
            tokens=both[first : first + ROWS_MAX, 1].tobytes(),
        )
        for first in range(0, len(both), ROWS_MAX)
    ]
