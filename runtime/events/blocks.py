"""Block events: which keys a node's tiers gained and lost, for routers to index.

A publisher numbers its events from 0 within its epoch, which is larger for each later run of the
node, and sends them in batches. Whoever follows a node therefore sees each event once, in order,
or knows exactly which are missing. The publisher keeps recent events in a ring for those who
missed some. On the wire: msgpack arrays; fields may be added at the end of each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from runtime.events.base import EventPlane

KEYS_PER_EVENT_MAX: Final = 1024
KEYS_PER_BATCH_MAX: Final = 16384  # with 16-byte keys about a quarter of NATS's payload limit


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    """These keys are in the tier now."""

    tier: str
    keys: list[bytes]


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    """These keys are not in the tier any more."""

    tier: str
    keys: list[bytes]


BlockEvent = Stored | Removed


class BlockBatch(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive events: the n-th has the sequence `first_sequence + n`."""

    epoch: int
    first_sequence: int
    node: str
    events: list[BlockEvent]


class BatchError(Exception):
    """A payload that is no batch of block events."""


@dataclass(frozen=True, slots=True)
class BlockPublisherStatus:
    """Counts events, not messages."""

    published_total: int
    dropped_total: int
    next_sequence: int


def blocks_subject(namespace: str, node: str) -> str:
    """`node` may be `*` to hear all nodes."""
    return f"kvbm.{namespace}.{node}.blocks"


def decode_batch(payload: bytes) -> BlockBatch:
    """Raises BatchError."""
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BatchError(str(error)) from error


class BlockPublisher:
    """Gathers events for `linger_s`, or until a batch is full, and gives the batch to the plane.

    All methods are called from the event loop; `stored` and `removed` cost a list append.
    """

    def __init__(
        self,
        plane: EventPlane,
        *,
        namespace: str,
        node: str,
        epoch: int,
        linger_s: float,
        batch_events: int,
        ring_keys: int,
    ) -> None:
        self._plane = plane
        self._subject = blocks_subject(namespace, node)
        self._node = node
        self._epoch = epoch
        self._linger_s = linger_s
        self._batch_events = batch_events
        self._ring_keys_max = ring_keys
        self._ring: deque[BlockEvent] = deque()
        self._ring_keys = 0
        self._next_sequence = 0
        self._batch: list[BlockEvent] = []
        self._batch_keys = 0
        self._timer: asyncio.TimerHandle | None = None
        self._published_total = 0
        self._dropped_total = 0

    def stored(self, tier: str, keys: Sequence[bytes]) -> None:
        for first in range(0, len(keys), KEYS_PER_EVENT_MAX):
            self._add(Stored(tier, list(keys[first : first + KEYS_PER_EVENT_MAX])))

    def removed(self, tier: str, keys: Sequence[bytes]) -> None:
        for first in range(0, len(keys), KEYS_PER_EVENT_MAX):
            self._add(Removed(tier, list(keys[first : first + KEYS_PER_EVENT_MAX])))

    def flush(self) -> None:
        """Give what was gathered to the plane now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._batch:
            return
        events, self._batch, self._batch_keys = self._batch, [], 0
        first = self._next_sequence - len(events)
        batch = BlockBatch(self._epoch, first, self._node, events)
        if self._plane.publish(self._subject, _encoder.encode(batch)):
            self._published_total += len(events)
        else:
            self._dropped_total += len(events)

    def replay(self, first_sequence: int, count: int) -> BlockBatch | None:
        """Events from `first_sequence` on, as many as there are up to `count`.

        None if the ring has lost the first of them already, or it has not happened yet.
        """
        start = first_sequence - (self._next_sequence - len(self._ring))
        if start < 0 or first_sequence >= self._next_sequence:
            return None
        ring = list(self._ring)
        return BlockBatch(self._epoch, first_sequence, self._node, ring[start : start + count])

    def status(self) -> BlockPublisherStatus:
        return BlockPublisherStatus(self._published_total, self._dropped_total, self._next_sequence)

    def _add(self, event: BlockEvent) -> None:
        self._next_sequence += 1
        self._ring.append(event)
        self._ring_keys += len(event.keys)
        while self._ring_keys > self._ring_keys_max:
            self._ring_keys -= len(self._ring.popleft().keys)
        self._batch.append(event)
        self._batch_keys += len(event.keys)
        if len(self._batch) >= self._batch_events or self._batch_keys >= KEYS_PER_BATCH_MAX:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._linger_s, self.flush)


@dataclass(frozen=True, slots=True)
class Followed:
    """What a batch means to a follower."""

    events: Sequence[BlockEvent]  # to be applied, each for the first time
    missed: range | None = None  # sequences between what was known and these events
    restarted: bool = False  # the node's epoch is new: forget what was known of it first


class Follower:
    """Keeps the place in one node's events."""

    def __init__(self) -> None:
        self._epoch = -1
        self._next_sequence = 0

    def follow(self, batch: BlockBatch) -> Followed:
        """Batches of an earlier epoch, and events seen before, come to nothing."""
        if batch.epoch < self._epoch:
            return Followed(())
        restarted = batch.epoch > self._epoch
        if restarted:
            self._epoch, self._next_sequence = batch.epoch, 0
        expected = self._next_sequence
        end = batch.first_sequence + len(batch.events)
        self._next_sequence = max(expected, end)
        missed = range(expected, batch.first_sequence) if batch.first_sequence > expected else None
        return Followed(batch.events[max(expected - batch.first_sequence, 0) :], missed, restarted)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(BlockBatch)
