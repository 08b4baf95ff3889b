"""Block events: numbering, batches, gaps, and the ring that fills them."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.events.base import PlaneStatus, Subscription
from runtime.events.blocks import (
    KEYS_PER_BATCH_MAX,
    KEYS_PER_EVENT_MAX,
    BatchError,
    BlockBatch,
    BlockEvent,
    BlockPublisher,
    Follower,
    Removed,
    Stored,
    blocks_subject,
    decode_batch,
)
from runtime.events.memory import MemoryPlane


class FullPlane(MemoryPlane):
    """Drops whatever it is given."""

    def publish(self, subject: str, payload: bytes) -> bool:
        return False

    def status(self) -> PlaneStatus:
        raise AssertionError


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def publisher(plane: MemoryPlane, **other: float) -> BlockPublisher:
    options = {"linger_s": 0.001, "batch_events": 100, "ring_keys": 1000, "epoch": 7, **other}
    return BlockPublisher(plane, namespace="test", node="n1", **options)  # type: ignore[arg-type]


async def batch(subscription: Subscription) -> BlockBatch:
    async with asyncio.timeout(60):
        return decode_batch((await anext(subscription)).payload)


async def test_events_are_gathered_into_one_numbered_batch() -> None:
    plane = MemoryPlane()
    subscription = plane.subscribe(blocks_subject("test", "*"))
    blocks = publisher(plane)
    blocks.stored("G2", [key(1), key(2)])
    blocks.removed("G3", [key(3)])
    first = await batch(subscription)
    assert first == BlockBatch(
        7, 0, "n1", [Stored("G2", [key(1), key(2)]), Removed("G3", [key(3)])]
    )
    blocks.stored("G4", [key(4)])
    assert (await batch(subscription)).first_sequence == 2
    assert blocks.status().published_total == 3


async def test_a_full_batch_does_not_wait() -> None:
    plane = MemoryPlane()
    subscription = plane.subscribe("kvbm.test.n1.blocks")
    blocks = publisher(plane, linger_s=3600, batch_events=2)
    blocks.stored("G2", [key(1)])
    blocks.stored("G2", [key(2)])
    assert len((await batch(subscription)).events) == 2
    blocks.stored("G2", [key(3)])
    blocks.flush()
    blocks.flush()
    assert (await batch(subscription)).first_sequence == 2


async def test_many_keys_are_split_over_events_and_batches() -> None:
    plane = MemoryPlane()
    subscription = plane.subscribe("kvbm.test.n1.blocks")
    blocks = publisher(plane, ring_keys=10)
    keys = [key(number) for number in range(2 * KEYS_PER_BATCH_MAX + 1)]
    blocks.stored("G3", keys)
    batches = [await batch(subscription) for _ in range(3)]
    assert [len(one.events) for one in batches] == [16, 16, 1]
    events = [event for one in batches for event in one.events]
    assert max(len(event.keys) for event in events) == KEYS_PER_EVENT_MAX
    assert [each for event in events for each in event.keys] == keys
    blocks.stored("G3", [])
    assert blocks.status().next_sequence == 33


async def test_what_the_plane_drops_is_counted_and_shows_as_a_gap() -> None:
    blocks = publisher(FullPlane())
    blocks.stored("G2", [key(1)])
    blocks.flush()
    assert blocks.status().dropped_total == 1
    assert blocks.status().published_total == 0
    follower = Follower()
    followed = follower.follow(BlockBatch(7, 1, "n1", [Stored("G2", [key(2)])]))
    assert followed.missed == range(1)
    lost = blocks.replay(0, 1)
    assert lost is not None
    assert lost.events == [Stored("G2", [key(1)])]


async def test_the_ring_holds_recent_keys_only() -> None:
    blocks = publisher(MemoryPlane(), ring_keys=10)
    for number in range(25):
        blocks.stored("G2", [key(number)])
    assert blocks.replay(14, 1) is None
    assert blocks.replay(25, 1) is None
    kept = blocks.replay(15, 3)
    assert kept is not None
    assert kept.first_sequence == 15
    assert [event.keys for event in kept.events] == [[key(15)], [key(16)], [key(17)]]
    assert len(blocks.replay(15, 1000).events) == 10  # type: ignore[union-attr]
    blocks.flush()


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"\xc1", b"\x90", msgspec.msgpack.encode([1, 2, 3, 4])),
        pytest.param(b"\x94\x01\x00\xa1\xff\x90", id="a node that is no UTF-8"),
        pytest.param(b"\x91" * 100_000, id="nested too deep"),
    ],
)
def test_a_broken_payload_is_one_error(payload: bytes) -> None:
    with pytest.raises(BatchError):
        decode_batch(payload)


def test_fields_a_later_version_adds_are_passed_over() -> None:
    payload = msgspec.msgpack.encode([7, 0, "n1", [["stored", "G2", [key(1)], "new"]], "new"])
    assert decode_batch(payload) == BlockBatch(7, 0, "n1", [Stored("G2", [key(1)])])


def test_a_new_epoch_restarts_and_an_old_one_is_passed_over() -> None:
    follower = Follower()
    events: list[BlockEvent] = [Stored("G2", [key(1)])]
    assert follower.follow(BlockBatch(7, 0, "n", events)).restarted
    assert not follower.follow(BlockBatch(7, 1, "n", events)).restarted
    assert follower.follow(BlockBatch(8, 0, "n", events)).restarted
    assert follower.follow(BlockBatch(7, 2, "n", events)).events == ()


@given(st.data())
def test_a_follower_applies_each_event_once_or_knows_it_is_missing(data: st.DataObject) -> None:
    """Batches are cut, dropped and repeated at random; sequences are told by their keys."""
    follower = Follower()
    seen: list[int] = []
    missed: list[int] = []
    first = 0
    for count in data.draw(st.lists(st.integers(1, 5), max_size=20)):
        events: list[BlockEvent] = [Stored("G2", [key(first + each)]) for each in range(count)]
        for _ in range(data.draw(st.integers(0, 2))):
            followed = follower.follow(BlockBatch(1, first, "n", events))
            missed += followed.missed or ()
            seen += [int.from_bytes(event.keys[0], "little") for event in followed.events]
        first += count
    assert sorted(seen + missed) == list(range(max(seen, default=-1) + 1))
    assert seen == sorted(seen)
