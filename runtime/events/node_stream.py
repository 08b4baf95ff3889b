"""A node's block events for routers: where they are sent, and how what was missed is had.

The daemon sends one stream for all its engines and tiers: on `blocks_subject`, one reference
`RouterEvent` an envelope. The envelope's `publisher_id` is drawn anew by each run of the daemon (it
is the epoch), its `sequence` counts from 0 within it; `event_id` counts within one worker and rank,
as the reference has it. Every block is named by its sequence hash (`runtime.hashing`), in every
tier, so that an event says by itself where its blocks belong, whatever was lost before it.

Blocks in an engine's own memory are its worker's (`residency_domain` "worker"). Those in host
memory, on the SSD and in S3 are the node's: `residency_domain` is "cache_owner" and `worker_id` an
*owner*, one for each kind of KV the node keeps; the node's record in discovery says which workers
read an owner's blocks.

A router that missed some, or is new, calls the endpoint `ENDPOINT` of that record's instance with
`CatchUp`. The answer begins with `Begins`; then come the missing envelopes one by one, or, where
the ring has not all of them any more, `Rows` with everything held. That is exact once the events
from `Begins.next` on are applied after it, for those before its end may be in it, or half.
A change too large to tell skips a number: it looks like a loss, and the answer is `Rows`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, Literal, TypeVar

import msgspec

from runtime.events.envelope import WireError, event_subject
from runtime.events.router_event import StorageTier

COMPONENT: Final = "kvbm"
ENDPOINT: Final = "kv-events"
TOPIC: Final = "kv-events"
SPEEDS_TOPIC: Final = "kv_metrics"
LABEL_NODE: Final = "node"
LABEL_PUBLISHER: Final = "publisher"  # hexadecimal
LABEL_READERS: Final = "readers"

T = TypeVar("T")

Worker = tuple[int, int]
"""Instance in discovery, data-parallel rank."""


class CatchUp(msgspec.Struct, frozen=True):
    """What is asked: events of `publisher` from `first` on, or everything if those are gone."""

    publisher: int = 0  # 0: nothing is known yet
    first: int = 0


class Begins(msgspec.Struct, frozen=True):
    """The answer's first item."""

    publisher: int
    kind: Literal["replay", "snapshot"]
    next: int  # the sequence of the first event that the answer does not include


class Rows(msgspec.Struct, frozen=True):
    """Blocks that one worker, or owner, holds in one tier; in no order. One may come twice.

    `parents` and `tokens` are little-endian u64: the sequence hash of the block before (0: none)
    and the hash of the block's own tokens. `runtime.hashing.sequence_hashes` says how a block's
    name follows from the two.
    """

    worker_id: int
    dp_rank: int
    residency_domain: Literal["worker", "cache_owner"]
    storage_tier: StorageTier
    parents: bytes
    tokens: bytes


class WorkerSpeed(msgspec.Struct, frozen=True):
    """What a node measured for one worker; 0 where it has not. See `router.workers.Speed`."""

    worker_id: int
    dp_rank: int
    prefill_s_per_token: float = 0.0
    prefill_s_per_token2: float = 0.0
    load_s_per_block: tuple[float, float, float] = (0.0, 0.0, 0.0)  # from G2, G3, G4
    load_latency_s: tuple[float, float, float] = (0.0, 0.0, 0.0)


class NodeSpeeds(msgspec.Struct, frozen=True):
    """JSON on `speeds_subject`, now and then."""

    publisher: int
    node: str
    workers: list[WorkerSpeed]


def blocks_subject(namespace: str) -> str:
    """Of all nodes of a namespace: their envelopes tell them apart."""
    return event_subject(TOPIC, namespace, COMPONENT)


def speeds_subject(namespace: str) -> str:
    return event_subject(SPEEDS_TOPIC, namespace, COMPONENT)


def readers_label(readers: Mapping[Worker, int]) -> str:
    """Workers and the owner whose blocks they read, for `LABEL_READERS`."""
    return json.dumps({f"{w:x}.{rank}": f"{owner:x}" for (w, rank), owner in readers.items()})


def parse_readers(label: str) -> dict[Worker, int]:
    """Raises WireError."""
    try:
        found: dict[Worker, int] = {}
        for worker, owner in json.loads(label).items():
            instance, _, rank = worker.partition(".")
            found[int(instance, 16), int(rank)] = int(owner, 16)
    except (ValueError, TypeError, AttributeError) as error:
        raise WireError(f"no readers: {error}") from error
    return found


def encode_catch_up(message: CatchUp | Begins | Rows) -> bytes:
    return _encoder.encode(message)


def decode_question(data: bytes) -> CatchUp:
    """Raises WireError."""
    return _decode(_question, data)


def decode_begins(data: bytes) -> Begins:
    """Raises WireError."""
    return _decode(_begins, data)


def decode_rows(data: bytes) -> Rows:
    """Raises WireError, also if there are not as many parents as tokens' hashes."""
    rows = _decode(_rows, data)
    if len(rows.parents) != len(rows.tokens) or len(rows.tokens) % 8:
        raise WireError(f"{len(rows.parents)} and {len(rows.tokens)} bytes are no rows")
    return rows


def encode_speeds(speeds: NodeSpeeds) -> bytes:
    return msgspec.json.encode(speeds)


def decode_speeds(data: bytes) -> NodeSpeeds:
    """Raises WireError."""
    return _decode(_speeds, data)


def _decode(decoder: msgspec.msgpack.Decoder[T] | msgspec.json.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(str(error)) from error


_encoder = msgspec.msgpack.Encoder()
_question = msgspec.msgpack.Decoder(CatchUp)
_begins = msgspec.msgpack.Decoder(Begins)
_rows = msgspec.msgpack.Decoder(Rows)
_speeds = msgspec.json.Decoder(NodeSpeeds)
