"""The reference's own streams: workers that publish their blocks themselves, without a node daemon.

`event_id` counts within one worker and rank, and nobody is asked for what was missed: after a gap,
or a new run of the publisher, the worker is taken to hold nothing but what it says from then on.
Blocks are found by the worker's own names for them, so blocks that follow unknown ones are left
out. Such a worker is worth less to the router than it might be; it is never counted on for what it
no longer has. A worker that is in a node's stream is heard there and not here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from router.index import WorkerId
from router.index_writer import TIER_OF, IndexWriter
from runtime.events.envelope import Envelope, WireError
from runtime.events.router_event import Cleared, Removed, RouterEvent, Stored
from runtime.events.router_wire import decode_msgpack

WORKERS_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class WorkerFeedStatus:
    workers: int
    gaps_total: int
    restarts_total: int
    duplicates_total: int
    refused_total: int  # malformed, of an owner, or of a worker that a node speaks for


@dataclass(slots=True)
class _Heard:
    publisher: int
    next: int


class WorkerFeeds:
    """All methods are called from one event loop."""

    def __init__(self, writer: IndexWriter, is_known: Callable[[WorkerId], bool]) -> None:
        """`is_known` tells whether a node speaks for a worker."""
        self._writer = writer
        self._is_known = is_known
        self._heard: OrderedDict[WorkerId, _Heard] = OrderedDict()
        self._gaps_total = 0
        self._restarts_total = 0
        self._duplicates_total = 0
        self._refused_total = 0

    def hear(self, envelope: Envelope) -> int:
        """Gathered for the index; how many blocks it is about."""
        try:
            event = decode_msgpack(envelope.payload)
        except WireError:
            self._refused_total += 1
            return 0
        worker = WorkerId(event.worker_id, event.event.dp_rank)
        if event.residency_domain not in {"worker", None} or self._is_known(worker):
            self._refused_total += 1
            return 0
        if not self._is_next(worker, envelope.publisher_id, event.event.event_id):
            return 0
        return self._apply(worker, event)

    def _is_next(self, worker: WorkerId, publisher: int, event_id: int) -> bool:
        heard = self._heard.get(worker)
        if heard is None:
            if len(self._heard) >= WORKERS_MAX:
                forgotten, _ = self._heard.popitem(last=False)
                self._writer.settled().remove_worker(forgotten)
            self._writer.changes.cleared((worker,))
            self._heard[worker] = _Heard(publisher, event_id + 1)
            return True
        self._heard.move_to_end(worker)
        if heard.publisher != publisher:
            self._restarts_total += 1
            self._writer.changes.cleared((worker,))
        elif event_id < heard.next:
            self._duplicates_total += 1
            return False
        elif event_id > heard.next:
            self._gaps_total += 1
            self._writer.changes.cleared((worker,))
        heard.publisher, heard.next = publisher, event_id + 1
        return True

    def _apply(self, worker: WorkerId, event: RouterEvent) -> int:
        tier, changes = TIER_OF[event.storage_tier], self._writer.changes
        match event.event.data:
            case Stored() as stored:
                hashes, tokens = stored.block_hashes, stored.tokens_hashes
                changes.stored((worker,), tier, stored.parent_hash, hashes, tokens)
                return len(hashes)
            case Removed(hashes):
                changes.removed((worker,), tier, hashes)
                return len(hashes)
            case Cleared():
                self._writer.changes.cleared((worker,))
                return 0

    @property
    def status(self) -> WorkerFeedStatus:
        return WorkerFeedStatus(
            workers=len(self._heard),
            gaps_total=self._gaps_total,
            restarts_total=self._restarts_total,
            duplicates_total=self._duplicates_total,
            refused_total=self._refused_total,
        )
