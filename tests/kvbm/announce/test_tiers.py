"""Residencies told to routers: merged, numbered, late, removed, and too many at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from kvbm.announce.speeds import worker_speeds
from kvbm.announce.stream import Stream
from kvbm.announce.tiers import TierAnnouncer
from kvbm.note import Note, owner_of
from kvbm.protocol import Pace, Routing
from kvbm.session import Connected
from runtime.events import Message
from runtime.events.base import Subscription
from runtime.events.envelope import decode_envelope
from runtime.events.memory import MemoryPlane
from runtime.events.node_stream import blocks_subject
from runtime.events.router_event import Removed, RouterEvent, StorageTier, Stored
from runtime.events.router_wire import decode_msgpack
from runtime.hashing import sequence_hashes
from storage_tiers.base import Key, TierName
from storage_tiers.testing import make_key
from tests.kvbm.builders import RecordingEvents

DOMAIN = 9


class Bay:
    """A node's announcer, and all it has sent."""

    def __init__(self, *, ring_bytes: int = 1 << 20, backlog_max: int = 1 << 16) -> None:
        self.plane = MemoryPlane()
        self.sent: Subscription = self.plane.subscribe(blocks_subject("ns"))
        self.onward = RecordingEvents()
        self.stream = Stream(self.plane, "ns", 7, ring_bytes_max=ring_bytes)
        self.tiers = TierAnnouncer(
            self.stream, "node", self.onward, linger_s=3600.0, backlog_max=backlog_max
        )

    async def told(self) -> list[RouterEvent]:
        """What was sent since the last time."""
        self.tiers.flush()
        found: list[Message] = [await anext(self.sent) for _ in range(len(self.sent._messages))]
        return [decode_msgpack(decode_envelope(message.payload).payload) for message in found]


def sequence(name: str, chunks: int, blocks: int = 2) -> tuple[list[Key], list[bytes], list[int]]:
    """Keys and notes of a sequence's chunks, and the names of its blocks."""
    tokens = np.frombuffer(make_key(name)[:4] * (8 * chunks * blocks), "<u4")[: chunks * blocks]
    local = tokens.astype(np.uint64) + np.arange(1, chunks * blocks + 1, dtype=np.uint64)
    chain = sequence_hashes(local).tolist()
    notes = [
        Note(DOMAIN, chain[at - 1] if at else None, local[at : at + blocks]).encode()
        for at in range(0, chunks * blocks, blocks)
    ]
    return [make_key(f"{name}/{n}") for n in range(chunks)], notes, chain


async def test_chunks_that_follow_each_other_are_one_event() -> None:
    bay = Bay()
    keys, notes, names = sequence("a", 6)
    others, other_notes, other_names = sequence("b", 2)
    bay.tiers.learn(keys + others, notes + other_notes)
    bay.tiers.stored(TierName.DRAM, keys[:2])  # two commits of one request
    bay.tiers.stored(TierName.DRAM, keys[2:4])
    bay.tiers.stored(TierName.DRAM, others)
    bay.tiers.stored(TierName.SSD, [keys[0], keys[5]])
    first, second, disk, far = await bay.told()
    assert isinstance(first.event.data, Stored)
    assert first.event.data.parent_hash is None
    assert first.event.data.block_hashes.tolist() == names[:8]
    assert isinstance(second.event.data, Stored)
    assert second.event.data.block_hashes.tolist() == other_names
    assert isinstance(disk.event.data, Stored) and isinstance(far.event.data, Stored)
    assert disk.event.data.block_hashes.tolist() == names[:2]
    assert (far.event.data.parent_hash, far.event.data.block_hashes.tolist()) == (
        names[9],
        names[10:],
    )
    assert [event.storage_tier for event in (first, disk)] == [
        StorageTier.HOST_PINNED,
        StorageTier.DISK,
    ]
    for number, event in enumerate((first, second, disk, far)):
        assert event.worker_id == owner_of("node", DOMAIN)
        assert event.residency_domain == "cache_owner"
        assert (event.event.event_id, event.event.dp_rank) == (number, 0)
    told = [("stored", TierName.DRAM, key) for key in [*keys[:4], *others]]
    assert bay.onward.announced[:6] == told, "peers hear the keys as ever"


async def test_what_leaves_is_named_and_what_comes_again_is_told_again() -> None:
    bay = Bay()
    keys, notes, names = sequence("a", 3)
    bay.tiers.learn(keys, notes)
    bay.tiers.stored(TierName.S3, keys)
    bay.tiers.stored(TierName.S3, keys)  # nothing new
    assert len(await bay.told()) == 1
    bay.tiers.removed(TierName.S3, [keys[2], make_key("never"), keys[0]])
    bay.tiers.removed(TierName.DRAM, keys)  # it was not there
    (gone,) = await bay.told()
    assert gone.storage_tier is StorageTier.EXTERNAL
    assert isinstance(gone.event.data, Removed)
    assert gone.event.data.block_hashes.tolist() == [*names[4:], *names[:2]]
    bay.tiers.stored(TierName.SSD, keys[2:])  # its note is remembered for a while
    (again,) = await bay.told()
    assert isinstance(again.event.data, Stored)
    assert again.event.data.block_hashes.tolist() == names[4:]
    assert bay.tiers.note_of(keys[2]) == notes[2]


async def test_a_chunk_is_announced_once_its_note_is_known_wherever_it_is() -> None:
    bay = Bay()
    keys, notes, names = sequence("a", 2)
    bay.tiers.stored(TierName.S3, keys)
    bay.tiers.stored(TierName.DRAM, keys[:1])
    assert not await bay.told()
    assert bay.tiers.status().unannounced_chunks == 2
    assert bay.tiers.note_of(keys[0]) == b""
    bay.tiers.learn(keys, [notes[0], b"no note at all"])
    bay.tiers.learn(keys, [notes[0], b""])
    dram, s3 = await bay.told()
    assert (dram.storage_tier, s3.storage_tier) == (StorageTier.HOST_PINNED, StorageTier.EXTERNAL)
    for event in (dram, s3):
        assert isinstance(event.event.data, Stored)
        assert event.event.data.block_hashes.tolist() == names[:2]
    status = bay.tiers.status()
    assert (status.unannounced_chunks, status.refused_total) == (1, 1)
    assert status.blocks == {"G2": 2, "G3": 0, "G4": 2}


async def test_another_nodes_memory_is_not_announced() -> None:
    bay = Bay()
    keys, notes, _ = sequence("a", 2)
    bay.tiers.learn(keys, notes)
    bay.tiers.stored(TierName.PEER, keys)
    assert not await bay.told()


async def test_notes_of_what_is_never_kept_are_forgotten() -> None:
    bay = Bay()
    keys, notes, _ = sequence("many", 70_000, 1)
    bay.tiers.learn(keys, notes)
    assert bay.tiers.note_of(keys[0]) == notes[0]
    bay.tiers.flush()
    assert len(bay.tiers.notebook) == 1 << 16
    assert bay.tiers.note_of(keys[0]) == b""
    assert bay.tiers.note_of(keys[-1]) == notes[-1]
    bay.tiers.notebook.check_integrity()


async def test_more_than_is_worth_telling_is_a_gap() -> None:
    bay = Bay(backlog_max=100)
    keys, notes, names = sequence("a", 300)
    bay.tiers.learn(keys, notes)
    bay.tiers.stored(TierName.DRAM, keys[:50])
    assert len(await bay.told()) > 0
    before = bay.stream.next
    assert bay.stream.replay(0) is not None
    bay.tiers.stored(TierName.S3, keys)
    (nothing,) = await bay.told()
    assert isinstance(nothing.event.data, Removed) and not len(nothing.event.data.block_hashes)
    assert bay.stream.next == before + 2
    assert bay.stream.replay(before) is None, "only a snapshot tells"
    assert bay.stream.replay(before + 1) is not None
    assert bay.stream.status().skipped_total == 1
    assert bay.tiers.status().blocks == {"G2": 100, "G3": 0, "G4": len(names)}


async def test_the_ring_is_bounded_by_bytes_and_knows_what_it_lost() -> None:
    bay = Bay(ring_bytes=1000)
    for number in range(20):
        keys, notes, _ = sequence(str(number), 1)
        bay.tiers.learn(keys, notes)
        bay.tiers.stored(TierName.DRAM, keys)
    assert len(await bay.told()) == 20
    status = bay.stream.status()
    assert 0 < status.ring_bytes <= 1000 and 0 < status.ring_events < 20
    kept = bay.stream.replay(20 - status.ring_events)
    assert kept is not None
    assert [decode_envelope(e).sequence for e in kept] == list(range(20 - len(kept), 20))
    assert bay.stream.replay(19 - status.ring_events) is None
    assert bay.stream.replay(20) == []
    assert bay.stream.replay(21) is None, "that number was never given"


async def test_changes_are_told_soon_by_themselves() -> None:
    bay = Bay()
    bay.tiers = TierAnnouncer(bay.stream, "node", bay.onward, linger_s=0.001)
    keys, notes, _ = sequence("a", 500)
    bay.tiers.learn(keys, notes)
    bay.tiers.stored(TierName.DRAM, keys)
    async with asyncio.timeout(60):
        while bay.tiers.status().waiting_chunks:
            await asyncio.sleep(0.001)
    assert bay.tiers.status().blocks["G2"] == 1000


def test_speeds_are_those_of_an_engines_block() -> None:
    routing = Routing(5, 1, b"", 16, 0)
    engine = Connected(routing, DOMAIN, Pace(1e-4, 2e-9, 1e-3, 1e-9), token_bytes=1000.0)
    (speed,) = worker_speeds([engine], {TierName.SSD: (2e-3, 3e-9), TierName.S3: None})
    assert (speed.worker_id, speed.dp_rank) == (5, 1)
    assert (speed.prefill_s_per_token, speed.prefill_s_per_token2) == (1e-4, 2e-9)
    assert speed.load_s_per_block == (1.6e-5, 6.4e-5, 0.0)
    assert speed.load_latency_s == (1e-3, 2e-3, 0.0)
    (silent,) = worker_speeds([replace(engine, pace=Pace())], {})
    assert silent.load_s_per_block == silent.load_latency_s == (0.0, 0.0, 0.0)
