"""The reference router's events: its dumped example, its msgpack by hand, and there and back."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.events.envelope import WireError
from runtime.events.router_event import (
    Cleared,
    KvCacheEvent,
    MmObject,
    Removed,
    RouterEvent,
    StorageTier,
    Stored,
    hashes,
    tier_of_medium,
)
from runtime.events.router_wire import (
    decode_json,
    decode_msgpack,
    encode_json,
    encode_msgpack,
    encode_msgpack_named,
)

DUMPED = (
    b'{"worker_id":7,"storage_tier":"device","residency_domain":"worker","event":{"event_id":0,'
    b'"data":{"stored":{"parent_hash":null,"start_position":null,"blocks":[{"block_hash":111,'
    b'"tokens_hash":15310707395893867146,"mm_extra_info":null}]}},"dp_rank":0}}'
)
TOKENS_HASH = 15310707395893867146
pack = msgspec.msgpack.encode

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
mm_objects = st.lists(
    st.builds(MmObject, u64, st.lists(st.tuples(u32, u32), max_size=3).map(tuple)), max_size=3
).map(tuple)


@st.composite
def stored(draw: st.DrawFn) -> Stored:
    """Mostly hashes as they are, spread over 64 bits; sometimes small ones."""
    some = draw(st.sampled_from([u64, st.integers(2**32, 2**64 - 1)]))
    pairs = draw(st.lists(st.tuples(some, some), max_size=40))
    indexes = st.integers(0, max(len(pairs) - 1, 0))
    found = draw(st.dictionaries(indexes, mm_objects, max_size=3)) if pairs else {}
    return Stored(
        draw(st.none() | u64),
        hashes([pair[0] for pair in pairs]),
        hashes([pair[1] for pair in pairs]),
        draw(st.none() | u32),
        found,
    )


removed = st.lists(u64, max_size=40).map(hashes).map(Removed)
events = st.builds(
    RouterEvent,
    u64,
    st.builds(
        KvCacheEvent,
        u64,
        st.one_of(
            stored(), st.lists(u64, max_size=40).map(hashes).map(Removed), st.just(Cleared())
        ),
        u32,
    ),
    st.sampled_from(StorageTier),
    st.sampled_from([None, "worker", "cache_owner", "of the future"]),
    st.sampled_from([None, 5, "owner", {"a": [1]}]),
)


def example() -> RouterEvent:
    data = Stored(None, hashes([111]), hashes([TOKENS_HASH]))
    return RouterEvent(7, KvCacheEvent(0, data))


def test_the_example_dumped_from_the_reference_is_read_and_written() -> None:
    assert decode_json(DUMPED) == example()
    assert encode_json(example()) == DUMPED


def test_msgpack_is_positional_as_rmp_serde_writes_it() -> None:
    head = b"\x94\x07\xa6device\xa6worker\x93\x00"
    wanted = (
        head + b"\x81\xa6stored\x93\xc0\xc0\x91\x93\x6f\xcf" + TOKENS_HASH.to_bytes(8, "big")
    ) + b"\xc0\x00"
    assert encode_msgpack(example()) == wanted
    removed = RouterEvent(7, KvCacheEvent(0, Removed(hashes([1, 2**40]))))
    assert encode_msgpack(removed) == (
        head + b"\x81\xa7removed\x91\x92\x01\xcf" + (2**40).to_bytes(8, "big") + b"\x00"
    )
    cleared = RouterEvent(7, KvCacheEvent(0, Cleared(), 3))
    assert encode_msgpack(cleared) == head + b"\xa7cleared\x03"
    for event, data in ((removed, encode_msgpack(removed)), (cleared, encode_msgpack(cleared))):
        assert decode_msgpack(data) == event


def test_blocks_written_at_once_are_the_bytes_of_blocks_written_one_by_one() -> None:
    rng = np.random.default_rng(1)
    for count in (1, 15, 16, 70_000):
        pairs = rng.integers(1 << 32, 1 << 64, (2, count), np.uint64)
        event = RouterEvent(7, KvCacheEvent(0, Stored(5, pairs[0], pairs[1], 9)))
        blocks = [[a, b, None] for a, b in pairs.T.tolist()]
        one_by_one = pack([7, "device", "worker", [0, {"stored": [5, 9, blocks]}, 0]])
        assert encode_msgpack(event) == one_by_one
        assert decode_msgpack(one_by_one) == event
        named = msgspec.msgpack.decode(encode_msgpack_named(event))
        assert pack(named) == encode_msgpack_named(event)
        assert list(named["event"]["data"]["stored"]["blocks"][-1]) == [
            "block_hash",
            "tokens_hash",
            "mm_extra_info",
        ]


@given(events)
def test_events_come_back(event: RouterEvent) -> None:
    assert decode_msgpack(encode_msgpack(event)) == event
    assert decode_msgpack(encode_msgpack_named(event)) == event
    assert decode_json(encode_json(event)) == event


@given(events)
def test_fields_that_are_new_to_us_are_skipped(event: RouterEvent) -> None:
    fields = msgspec.msgpack.decode(encode_msgpack(event))
    if event.state_source is not None:
        assert decode_msgpack(pack([*fields, "new"])) == event
    if event.residency_domain is not None:
        fields[3].append({"new": 1})
        if isinstance(event.event.data, Removed):
            fields[3][1]["removed"].append("new")
        elif isinstance(event.event.data, Stored):
            fields[3][1]["stored"].append("new")
            for block in fields[3][1]["stored"][2]:
                block.append("new")
        assert decode_msgpack(pack(fields)) == event
    named = msgspec.json.decode(encode_json(event))
    named["new"] = named["event"]["new"] = 1
    assert decode_json(msgspec.json.encode(named)) == event
    assert decode_msgpack(pack(named)) == event


@given(events, st.data())
def test_whatever_comes_is_decoded_or_refused(event: RouterEvent, data: st.DataObject) -> None:
    written = data.draw(st.sampled_from([encode_msgpack, encode_msgpack_named, encode_json]))(event)
    changed = bytearray(written[: data.draw(st.integers(0, len(written)))] or written)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_msgpack, decode_json):
        try:
            decode(bytes(changed))
        except WireError:
            continue


@pytest.mark.parametrize(
    "fields",
    [
        [],
        7,
        [7, "device", "worker"],
        [7, "attic", "worker", [0, "cleared", 0]],
        [-1, "device", "worker", [0, "cleared", 0]],
        [7, "device", "worker", [0, "stored", 0]],
        [7, "device", "worker", [0, {}, 0]],
        [7, "device", "worker", [0, {"stored": [None, None, []], "removed": [[]]}, 0]],
        [7, "device", "worker", [0, {"moved": [[]]}, 0]],
        [7, "device", "worker", [0, "cleared", 2**32]],
        [7, "device", "worker", [0, {"removed": [5]}, 0]],
        [7, "device", "worker", [0, {"removed": [[-1]]}, 0]],
        [7, "device", "worker", [0, {"removed": [["1"]]}, 0]],
        [7, "device", "worker", [0, {"stored": [None, None, [[1]]]}, 0]],
        [7, "device", "worker", [0, {"stored": [None, None, [[1, 2, 3]]]}, 0]],
        [7, "device", "worker", [0, {"stored": [None, [[1, 2, None]]]}, 0]],
    ],
)
def test_what_is_no_event_is_refused(fields: object) -> None:
    with pytest.raises(WireError):
        decode_msgpack(pack(fields))


def test_numbers_of_more_than_64_bits_are_refused_in_json() -> None:
    for before in (b'"worker_id":7', b'"event_id":0', b'"parent_hash":null', b'"block_hash":111'):
        name = before.partition(b":")[0]
        large = DUMPED.replace(before, name + b":" + str(2**64).encode())
        with pytest.raises(WireError):
            decode_json(large)


def test_an_array_that_claims_more_than_it_holds_is_refused() -> None:
    """And costs no memory for what it claims."""
    head = b"\x94\x07\xa6device\xa6worker\x93\x00\x81\xa7removed\x91"
    for size in (b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdd\xff"):
        with pytest.raises(WireError):
            decode_msgpack(head + size + b"\x00")


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        (None, StorageTier.DEVICE),
        ("GPU", StorageTier.DEVICE),
        ("CPU", StorageTier.HOST_PINNED),
        ("CPU_PINNED", StorageTier.HOST_PINNED),
        ("CPU_TIER1", StorageTier.HOST_PINNED),
        ("CPU_TIER2", StorageTier.DISK),
        ("STORAGE", StorageTier.DISK),
        ("nvme", StorageTier.DISK),
        ("SHARED", StorageTier.EXTERNAL),
        ("TAPE", None),
    ],
)
def test_a_medium_names_a_tier(medium: str | None, tier: StorageTier | None) -> None:
    assert tier_of_medium(medium) is tier
    if tier is not None:
        assert tier_of_medium(tier.medium) is tier
