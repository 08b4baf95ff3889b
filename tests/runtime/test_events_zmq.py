"""The event plane over ZMQ: what can go wrong between programs, with sockets of its own kind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runtime.events import EventPlane, EventPlaneSettings, Subscription
from runtime.events.envelope import (
    Envelope,
    WireError,
    decode_envelope,
    decode_frame,
    encode_envelope,
    encode_frame,
    event_subject,
)
from runtime.events.zmq import ZmqPlane
from runtime.server_process import free_ports
from tests.runtime.planes import QUICK_S, WAIT_S, ZmqFleet, take, until, zmq_settings


@pytest.fixture
async def fleet() -> AsyncIterator[ZmqFleet]:
    fleet = ZmqFleet()
    yield fleet
    await fleet.close()


@pytest.fixture
def raw() -> Iterator[Any]:
    """A publisher that is none of ours and sends what it likes."""
    context = zmq.Context()
    yield context.socket(zmq.PUB)
    context.destroy(linger=0)


def parts(sequence: int, payload: bytes = b"x", publisher_id: int = 7) -> list[bytes]:
    envelope = Envelope("s", publisher_id, sequence, 0, payload)
    return [
        b"s",
        publisher_id.to_bytes(8, "big"),
        sequence.to_bytes(8, "big"),
        encode_frame(encode_envelope(envelope)),
    ]


async def joined(raw: Any, subscription: Subscription) -> None:
    """Until the raw publisher is heard; its messages come from another publisher id."""
    async with asyncio.timeout(WAIT_S):
        arrived = asyncio.ensure_future(anext(subscription))
        while not arrived.done():
            raw.send_multipart(parts(0, b"hello", 1))
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.05)
    subscription._messages.clear()


async def test_what_is_no_message_is_counted_and_skipped(fleet: ZmqFleet, raw: Any) -> None:
    raw.bind(fleet.address)
    listener = await fleet.listener()
    subscription = listener.subscribe("s")
    await joined(raw, subscription)
    good = parts(0)
    envelope = encode_envelope(Envelope("s", 7, 0, 0, b"x"))
    broken = [
        [b"s"],
        good[:3],
        [*good, b""],
        [b"s", b"", b"", b""],
        [b"s", good[1], good[2], b"\x01\x00\x00\x00\x09abc"],
        [b"s", good[1], good[2], b"\x02" + encode_frame(envelope)[1:]],
        [b"s", good[1], good[2], encode_frame(b"\xc1")],
        [b"s", good[1], good[2], encode_frame(b"\x91" * 100_000)],
        [b"s.t", *good[1:]],
        [b"s", good[2], *good[2:]],
        [b"s", good[1], good[1], good[3]],
    ]
    for message in broken:
        raw.send_multipart(message)
    raw.send_multipart(good)
    assert await take(subscription, 1) == [b"x"]
    assert listener.status().malformed_total == len(broken)


async def test_messages_missing_by_their_sequence_are_counted(fleet: ZmqFleet, raw: Any) -> None:
    raw.bind(fleet.address)
    listener = await fleet.listener()
    subscription = listener.subscribe("s")
    await joined(raw, subscription)
    for sequence in (10, 11, 15, 15, 16):  # the first seen begins; one comes twice
        raw.send_multipart(parts(sequence))
    raw.send_multipart(parts(3, publisher_id=8))  # restarted, and some of its messages are old
    await take(subscription, 6)
    assert listener.status().missed_total == 3


async def test_what_a_listener_has_no_room_for_is_dropped_and_counted_there(
    fleet: ZmqFleet,
) -> None:
    """The sender's burst leaves this one thread, and so the listener, no time to read."""
    publisher = await fleet.publisher(zmq_high_water_messages=2)
    listener = await fleet.listener(zmq_high_water_messages=2)
    subscription = listener.subscribe("s")
    await until(lambda: listener.status().connected)
    async with asyncio.timeout(WAIT_S):
        while not subscription._messages:
            publisher.publish("s", b"hello")
            await asyncio.sleep(0.02)
    sent = publisher.status().published_total
    begin_s = time.perf_counter()
    assert all(publisher.publish("s", b"x" * 400_000) for _ in range(100))
    assert time.perf_counter() - begin_s < QUICK_S
    await until(lambda: publisher.status().published_total == sent + 100)
    received = 0
    async with asyncio.timeout(WAIT_S):
        while True:
            message = await anext(subscription)
            received += message.payload[:1] == b"x"
            if message.payload == b"end":
                break
            publisher.publish("s", b"end")
    assert listener.status().missed_total > 0
    assert received < 100


async def test_an_address_that_is_taken_is_told_and_tried_again(fleet: ZmqFleet, raw: Any) -> None:
    raw.bind(fleet.address)
    publisher = await fleet.publisher(queue_messages=10)
    await until(lambda: "in use" in str(publisher.status().error))
    assert not publisher.status().connected
    assert [publisher.publish("s", b"x") for _ in range(12)] == [True] * 10 + [False] * 2
    assert (publisher.status().queued, publisher.status().dropped_total) == (10, 2)
    raw.unbind(fleet.address)
    await until(lambda: publisher.status().connected)
    await until(lambda: publisher.status().published_total == 10)
    assert publisher.status().error is None


async def test_bytes_are_bounded_too(fleet: ZmqFleet) -> None:
    plane = await fleet.publisher(queue_bytes=1000)
    assert [plane.publish("s", b"x" * 400) for _ in range(4)] == [True, True, False, False]


async def test_peers_come_and_go() -> None:
    publishers = [ZmqPlane(zmq_settings(), f"p{n}") for n in range(2)]
    listener = ZmqPlane(zmq_settings(), "listener")
    planes: list[EventPlane] = [*publishers, listener]
    for plane in planes:
        await plane.start()
    subscription = listener.subscribe("s")
    for publisher in publishers:
        await until(lambda publisher=publisher: publisher.address is not None)  # type: ignore[misc]
        assert publisher.address is not None
        assert not publisher.address.endswith(":0")
        listener.add_peer(publisher.address)
        listener.add_peer(publisher.address)
    await until(lambda: listener.status().connected)
    heard: set[bytes] = set()
    async with asyncio.timeout(WAIT_S):
        while heard != {b"0", b"1"}:
            for number, publisher in enumerate(publishers):
                publisher.publish("s", b"%d" % number)
            heard.add((await anext(subscription)).payload)

    gone = str(publishers[0].address)
    listener.remove_peer(gone)
    listener.remove_peer(gone)
    publishers[0].publish("s", b"nobody listens")
    publishers[1].publish("s", b"end")
    async with asyncio.timeout(WAIT_S):
        while (payload := (await anext(subscription)).payload) != b"end":
            assert payload in heard
    for plane in planes:
        await plane.close()


async def test_a_peer_that_is_away_is_told_and_found_when_it_comes(fleet: ZmqFleet) -> None:
    listener = await fleet.listener()
    own = listener.subscribe("s")
    await until(lambda: fleet.address in str(listener.status().error))
    assert listener.publish("s", b"own")
    assert await take(own, 1) == [b"own"]
    await fleet.publisher()
    await until(lambda: listener.status().connected)
    assert listener.status().error is None


async def test_a_peer_that_is_no_address_harms_nothing(fleet: ZmqFleet) -> None:
    listener = await fleet.listener()
    assert isinstance(listener, ZmqPlane)
    listener.add_peer("tcp://nonsense")
    await fleet.publisher()
    await until(lambda: "nonsense: Invalid argument" in str(listener.status().error))
    listener.remove_peer("tcp://nonsense")
    await until(lambda: listener.status().connected)


async def test_own_messages_come_once_also_if_the_program_is_its_own_peer() -> None:
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    plane = ZmqPlane(zmq_settings(zmq_bind=address, zmq_peers=[address]), "test")
    await plane.start()
    subscription = plane.subscribe("s")
    await until(lambda: plane.status().connected)
    await asyncio.sleep(0.1)
    for number in range(10):
        plane.publish("s", b"%d" % number)
    assert await take(subscription, 10) == [b"%d" % number for number in range(10)]
    await asyncio.sleep(0.1)
    assert not subscription._messages
    await plane.close()


def test_an_address_must_be_one_of_zmq() -> None:
    with pytest.raises(ValidationError, match="no ZMQ address"):
        EventPlaneSettings(plane="zmq", zmq_peers=["10.0.0.1:5560"])


# -- frames, envelopes, subjects --------------------------------------------------------------

u64 = st.integers(0, 2**64 - 1)
envelopes = st.builds(
    Envelope, st.text(st.characters(codec="utf-8")), u64, u64, u64, st.binary(max_size=100)
)


@given(envelopes)
def test_envelopes_come_back_as_map_and_as_array(envelope: Envelope) -> None:
    data = encode_envelope(envelope)
    assert decode_envelope(decode_frame(encode_frame(data))) == envelope
    named = msgspec.msgpack.decode(data)
    assert list(named) == ["topic", "publisher_id", "sequence", "published_at", "payload"]
    array = msgspec.msgpack.encode([*named.values(), "new to us"])
    assert decode_envelope(array) == envelope
    assert decode_envelope(msgspec.msgpack.encode({**named, "new": [1]})) == envelope


@given(st.one_of(st.binary(max_size=200), envelopes.map(encode_envelope)), st.data())
def test_whatever_comes_is_decoded_or_refused(data: bytes, draw: st.DataObject) -> None:
    changed = bytearray(data)
    if changed:
        changed[draw.draw(st.integers(0, len(changed) - 1))] = draw.draw(st.integers(0, 255))
    for decode in (decode_envelope, decode_frame):
        try:
            decode(bytes(changed))
        except WireError:
            continue


def test_subjects_are_built_as_in_the_reference() -> None:
    assert event_subject("kv-events", "prod", "vllm", "generate") == (
        "namespace.prod.component.vllm.endpoint.generate.kv-events"
    )
    assert event_subject("kv_metrics", "a.b", "*") == "namespace.a%2Eb.component.%2A.kv_metrics"
    assert event_subject("t", "é>") == "namespace.%C3%A9%3E.t"
