"""Whatever happens, in whatever order, and whenever a router asks: it ends with what is held."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest

from kvbm.announce import catch_up, tiers
from kvbm.announce.catch_up import CatchUpHandler
from kvbm.announce.engines import EngineFollower, EngineFollowers
from kvbm.announce.stream import Stream
from kvbm.announce.tiers import STORAGE_TIER, TierAnnouncer
from kvbm.note import Note, owner_of
from kvbm.protocol import Routing
from runtime.events.engine_feed import EngineEvents, Lost
from runtime.events.engine_wire import BlockRemoved, BlockStored, EngineBatch
from runtime.events.memory import MemoryPlane
from runtime.events.node_stream import blocks_subject
from runtime.events.router_event import StorageTier
from runtime.hashing import block_hashes, sequence_hashes
from runtime.requests import RequestContext
from storage_tiers.base import Key, TierName
from tests.kvbm.announce.consumer import Consumer, Held, named
from tests.kvbm.builders import RecordingEvents

NODE = "node-7"
CHUNKS = 24
CHAIN = 6  # chunks of a sequence
BLOCK_TOKENS = 4
WORKERS = 2
CONSUMERS = 2


def key_of(number: int) -> Key:
    return Key(number.to_bytes(16, "big"))


def note_of(number: int) -> Note:
    """Chunks follow each other in sequences, of two domains, of one to three blocks."""
    sequence, index = divmod(number, CHAIN)
    size = 1 + sequence % 3
    tokens = np.arange(1, CHAIN * size + 1, dtype=np.uint64) + np.uint64(1000 * sequence)
    parent = None if index == 0 else int(sequence_hashes(tokens)[index * size - 1])
    return Note(sequence % 2, parent, tokens[index * size : (index + 1) * size])


class World:
    """A node's stream, what is truly held, and routers that listen to it."""

    def __init__(self, ring_bytes: int) -> None:
        self.plane = MemoryPlane()
        self.stream = Stream(self.plane, "default", 99, ring_bytes_max=ring_bytes)
        self.tiers = TierAnnouncer(
            self.stream, NODE, RecordingEvents(), linger_s=0.0, backlog_max=20
        )
        self.engines = EngineFollowers(self.stream)
        self.followers = [
            EngineFollower(self.stream, Routing(100 + n, n, b"", BLOCK_TOKENS, 0, "tcp://*:1"))
            for n in range(WORKERS)
        ]
        for follower in self.followers:
            place = follower.routing.worker_id, follower.routing.dp_rank
            self.engines._following[place] = follower
        self.handler = CatchUpHandler(self.stream, self.tiers, self.engines)
        self.consumers = [Consumer() for _ in range(CONSUMERS)]
        self.deaf = [0] * CONSUMERS  # messages that each does not get
        self.heard = self.plane.subscribe(blocks_subject("default"))
        self.kept: defaultdict[TierName, set[int]] = defaultdict(set)
        self.noted: set[int] = set()
        self.cached: list[dict[int, tuple[int | None, int]]] = [{} for _ in range(WORKERS)]

    def ask(self, question: bytes) -> AsyncIterator[bytes]:
        return self.handler.answer(question, RequestContext("", {}, 0.0))

    async def deliver(self) -> None:
        while self.heard._messages:
            message = await anext(self.heard)
            for number, consumer in enumerate(self.consumers):
                if self.deaf[number]:
                    self.deaf[number] -= 1
                else:
                    consumer.hear(message.payload)

    def truth(self) -> Held:
        held: defaultdict[Any, set[int]] = defaultdict(set)
        for tier, numbers in self.kept.items():
            for number in numbers & self.noted:
                note = note_of(number)
                holder = owner_of(NODE, note.domain), 0, "cache_owner", STORAGE_TIER[tier]
                held[holder].update(note.chain.tolist())
        for number, cached in enumerate(self.cached):
            routing = self.followers[number].routing
            holder = routing.worker_id, routing.dp_rank, "worker", StorageTier.DEVICE
            held[holder].update(named(*place) for place in cached.values())
        return {holder: names for holder, names in held.items() if names}

    async def step(self, what: str, which: int, numbers: Sequence[int]) -> None:  # noqa: C901
        keys = [key_of(number) for number in numbers]
        tier = list(STORAGE_TIER)[which % 3]
        consumer = self.consumers[which % CONSUMERS]
        match what:
            case "learn":
                self.tiers.learn(keys, [note_of(number).encode() for number in numbers])
                self.noted |= set(numbers)
            case "stored":
                self.tiers.stored(tier, keys)
                self.kept[tier] |= set(numbers)
            case "removed":
                self.tiers.removed(tier, keys)
                self.kept[tier] -= set(numbers)
            case "cached":
                self._cached(which % WORKERS, sorted(numbers))
            case "evicted":
                self._take(which % WORKERS, BlockRemoved(list(numbers)))
                for number in numbers:
                    self.cached[which % WORKERS].pop(number, None)
            case "lost":
                self.followers[which % WORKERS].take(Lost(range(1)))
                self.cached[which % WORKERS].clear()
            case "turn":
                await asyncio.sleep(0)
            case "deliver":
                await self.deliver()
            case "miss":
                self.deaf[which % CONSUMERS] += len(numbers)
            case "ask":
                if consumer._answer is None:
                    consumer.ask(self.ask)
            case "read":
                if consumer._answer is not None:
                    await consumer.read()

    def _take(self, worker: int, event: Any) -> None:
        self.followers[worker].take(EngineEvents(0, EngineBatch(0.0, [event], 0, 0)))

    def _cached(self, worker: int, numbers: list[int]) -> None:
        """A request's blocks: engines' names are numbers, and a block's tokens its name."""
        if not numbers:
            return
        cached = self.cached[worker]
        # One that follows a block which is not known cannot be named.
        parent = numbers[0] - 1 if numbers[0] % 5 == 0 and numbers[0] - 1 in cached else None
        before = None if parent is None else named(*cached[parent])
        tokens = [token for number in numbers for token in [number] * BLOCK_TOKENS]
        self._take(worker, BlockStored(list(numbers), parent, tokens, BLOCK_TOKENS))
        for number in numbers:
            local = int(block_hashes([number] * BLOCK_TOKENS, BLOCK_TOKENS)[0])
            cached.setdefault(number, (before, local))
            before = named(before, local)


# fmt: off
WEIGHTS = {
    "learn": 3, "stored": 8, "removed": 5, "cached": 5, "evicted": 4, "lost": 0.3,
    "turn": 6, "deliver": 4, "miss": 0.7, "ask": 3, "read": 14,
}
# fmt: on


async def scenario(dice: Random) -> Counter[str]:
    """What came up in it."""
    world = World(ring_bytes=dice.choice([0, 1000, 1 << 20]))
    for consumer in world.consumers[:-1]:  # the last is new at the end
        await consumer.catch_up(world.ask)
    for _ in range(150):
        (what,) = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))
        numbers = dice.sample(range(CHUNKS), dice.choice([1, 2, 3, 12]))
        if dice.random() < 0.6:
            numbers.sort()
        await world.step(what, dice.randrange(6), numbers)
    world.tiers.flush()
    world.deaf = [0] * CONSUMERS
    # What was missed shows with the next event.
    await world.step("learn", 0, [0])
    await world.step("removed", 0, [0])
    await world.step("stored", 0, [0])
    world.tiers.flush()
    await world.deliver()
    came_up: Counter[str] = Counter(skips=world.stream.status().skipped_total)
    for consumer in world.consumers:
        await consumer.catch_up(world.ask)
        assert consumer.blocks == world.truth()
        came_up += Counter(snapshots=consumer.snapshots, replays=consumer.replays)
    world.tiers.notebook.check_integrity()
    status = world.tiers.status()
    kept = set().union(*world.kept.values())
    assert (status.waiting_chunks, status.unannounced_chunks) == (0, len(kept - world.noted))
    return came_up


async def test_routers_end_with_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 100 lives of a node: what was missed is replayed or taken anew while things change."""
    monkeypatch.setattr(catch_up, "BLOCKS_AT_ONCE", 3)
    monkeypatch.setattr(tiers, "CHUNKS_AT_ONCE", 3)
    monkeypatch.setattr(tiers, "SLICE_S", 0.0)
    came_up: Counter[str] = Counter()
    for seed in range(100):
        try:
            came_up += await scenario(Random(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
    assert min(came_up["snapshots"], came_up["replays"], came_up["skips"]) > 40, came_up
