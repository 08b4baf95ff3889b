"""A node's stream without a node: `runtime.events.node_stream` to the letter, and the truth beside.

`send` is where a test loses, doubles or holds up what leaves the node.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Literal

import numpy as np

from router.holdings import OWNER
from router.index import Tier, WorkerId
from router.index_writer import TIER_OF
from runtime.component import Runtime, Serving
from runtime.events import EventPlane
from runtime.events.envelope import Envelope, encode_envelope
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
    Worker,
    blocks_subject,
    decode_question,
    encode_catch_up,
    encode_speeds,
    readers_label,
    speeds_subject,
)
from runtime.events.router_event import (
    Cleared,
    KvCacheEvent,
    KvCacheEventData,
    Removed,
    RouterEvent,
    StorageTier,
    Stored,
)
from runtime.events.router_wire import encode_msgpack
from runtime.hashing import sequence_hashes
from runtime.requests import RequestContext

ROWS_MAX = 4096
Held = dict[tuple[WorkerId, Tier], set[int]]
Domain = Literal["worker", "cache_owner"]
Place = tuple[Domain, int, int, StorageTier]
"""Who holds it (of an owner the rank is 0), and in which tier."""


def chained(parent: int | None, tokens: list[int]) -> list[int]:
    head = [] if parent is None else [parent]
    return [int(h) for h in sequence_hashes(np.array([*head, *tokens], np.uint64))[len(head) :]]


class FakeNode:
    def __init__(
        self, runtime: Runtime, plane: EventPlane, namespace: str, node: str, *, ring: int = 1024
    ) -> None:
        self.node = node
        self.readers: dict[Worker, int] = {}
        self.held: dict[Place, dict[int, tuple[int, int]]] = {}  # name -> parent, tokens
        self.send: Callable[[bytes], None] = self._publish
        self.questions = 0
        self.snapshots = 0
        self.pause: Callable[[], Awaitable[None]] | None = None  # before each of a snapshot's rows
        self._runtime = runtime
        self._plane = plane
        self._namespace = namespace
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=ring)
        self._serving: Serving | None = None
        self.begin()

    def begin(self, *, keep: bool = True) -> None:
        """A new run of the daemon, with what it kept from the one before."""
        self.publisher = secrets.randbelow(1 << 53) + 1
        self.sequence = 0
        self._ring.clear()
        self._event_ids: Counter[tuple[int, int]] = Counter()
        if not keep:
            self.held.clear()

    # -- discovery and questions ---------------------------------------------------------

    async def serve(self) -> None:
        endpoint = self._runtime.namespace(self._namespace).component(COMPONENT).endpoint(ENDPOINT)
        self._serving = await endpoint.serve(self._answer, labels=self.labels)

    async def stop(self) -> None:
        assert self._serving is not None
        self._runtime.serving.remove(self._serving)
        await self._serving.stop(0.0)
        self._serving = None

    async def relabel(self) -> None:
        """Tell discovery what is new: the publisher, or who reads what."""
        assert self._serving is not None
        registration = self._serving._registration
        registration._labels = self.labels
        await self._runtime.discovery.put(registration.name.key, registration.record.encode())

    @property
    def labels(self) -> dict[str, str]:
        return {
            LABEL_NODE: self.node,
            LABEL_PUBLISHER: f"{self.publisher:x}",
            LABEL_READERS: readers_label(self.readers),
        }

    async def _answer(self, payload: bytes, _context: RequestContext) -> AsyncIterator[bytes]:
        question = decode_question(payload)
        self.questions += 1
        first = self._ring[0][0] if self._ring else self.sequence
        publisher, following = self.publisher, self.sequence
        if question.publisher == publisher and first <= question.first <= following:
            missing = [data for sequence, data in self._ring if sequence >= question.first]
            yield encode_catch_up(Begins(publisher, "replay", following))
            for data in missing:
                yield data
            return
        self.snapshots += 1
        rows = self._rows()
        yield encode_catch_up(Begins(publisher, "snapshot", following))
        for row in rows:
            if self.pause is not None:
                await self.pause()
            yield row

    def _rows(self) -> list[bytes]:
        rows = []
        for (domain, who, rank, tier), blocks in self.held.items():
            pairs = np.array(list(blocks.values()), "<u8").reshape(-1, 2)
            for n in range(0, len(pairs), ROWS_MAX):
                some = pairs[n : n + ROWS_MAX]
                data = Rows(who, rank, domain, tier, some[:, 0].tobytes(), some[:, 1].tobytes())
                rows.append(encode_catch_up(data))
        return rows

    # -- what happens on it --------------------------------------------------------------

    def stored(self, place: Place, parent: int | None, tokens: list[int]) -> list[int]:
        names, before = chained(parent, tokens), parent or 0
        held = self.held.setdefault(place, {})
        for name, token in zip(names, tokens, strict=True):
            held[name] = (before, token)
            before = name
        hashes, local = np.array(names, np.uint64), np.array(tokens, np.uint64)
        self._say(place, Stored(parent, hashes, local))
        return names

    def removed(self, place: Place, names: list[int]) -> None:
        for name in names:
            self.held[place].pop(name, None)
        self._say(place, Removed(np.array(names, np.uint64)))

    def cleared(self, domain: Domain, who: int, rank: int = 0) -> None:
        for place in [place for place in self.held if place[:3] == (domain, who, rank)]:
            del self.held[place]
        self._say((domain, who, rank, StorageTier.DEVICE), Cleared())

    def speeds(self, speeds: NodeSpeeds) -> None:
        self._plane.publish(speeds_subject(self._namespace), encode_speeds(speeds))

    def _say(self, place: Place, data: KvCacheEventData) -> None:
        domain, who, rank, tier = place
        event_id = self._event_ids[who, rank]
        self._event_ids[who, rank] += 1
        event = RouterEvent(who, KvCacheEvent(event_id, data, rank), tier, domain)
        self.send(self.envelope(encode_msgpack(event)))

    def envelope(self, payload: bytes) -> bytes:
        now_ms = time.time_ns() // 1_000_000
        data = encode_envelope(Envelope(TOPIC, self.publisher, self.sequence, now_ms, payload))
        self._ring.append((self.sequence, data))
        self.sequence += 1
        return data

    def _publish(self, data: bytes) -> None:
        self._plane.publish(blocks_subject(self._namespace), data)

    # -- the truth -----------------------------------------------------------------------

    @property
    def truth(self) -> Held:
        """What a router's index should hold of it, owners included."""
        found: Held = {}
        for (domain, who, rank, tier), blocks in self.held.items():
            workers = [WorkerId(who, rank)]
            if domain == "cache_owner":
                readers = [
                    WorkerId(*reader) for reader, read in self.readers.items() if read == who
                ]
                workers = [WorkerId(who, OWNER), *readers]
            for worker in workers:
                if blocks:
                    found.setdefault((worker, TIER_OF[tier]), set()).update(blocks)
        return found


LOWER = (StorageTier.HOST_PINNED, StorageTier.DISK, StorageTier.EXTERNAL)


class Life:
    """Random events of a node: chains that share beginnings, holes, the same blocks in many
    places."""

    def __init__(
        self, node: FakeNode, dice: random.Random, workers: Mapping[Worker, int], owners: list[int]
    ) -> None:
        node.readers = dict(workers)
        self._node = node
        self._dice = dice
        self._chains: list[list[int]] = [
            [dice.getrandbits(64) for _ in range(24)] for _ in range(6)
        ]
        self.places: list[Place] = [("worker", *worker, StorageTier.DEVICE) for worker in workers]
        self.places += [("cache_owner", owner, 0, tier) for owner in owners for tier in LOWER]

    def live(self, events: int) -> None:
        for _ in range(events):
            self.step()

    def step(self) -> None:
        dice, node = self._dice, self._node
        place = dice.choice(self.places)
        held = node.held.get(place, {})
        if held and dice.random() < 0.3:
            names = list(held)
            node.removed(place, dice.sample(names, min(len(names), dice.randint(1, 8))))
        elif dice.random() < 0.01:
            node.cleared(place[0], place[1], place[2])
        else:
            # Any part of a chain: what comes before it may be held elsewhere, or nowhere.
            chain = dice.choice(self._chains)
            if dice.random() < 0.2:
                chain = [*chain[: dice.randrange(24)], dice.getrandbits(64)]
            first = dice.choice([0, 0, dice.randrange(len(chain))])
            count = dice.randint(1, 16)
            parent = chained(None, chain[:first])[-1] if first else None
            node.stored(place, parent, chain[first : first + count])
