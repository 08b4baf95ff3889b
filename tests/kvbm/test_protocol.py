"""The control socket's frames and messages, byte by byte."""

from __future__ import annotations

import itertools
import struct
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvbm.protocol import (
    FRAME_BYTES_MAX,
    SLOT_RECORD,
    Commit,
    Fence,
    Fenced,
    FrameError,
    FrameReader,
    FromClient,
    FromDaemon,
    GiveBack,
    Late,
    Lease,
    Match,
    MatchGroup,
    Message,
    Pace,
    Routing,
    State,
    decode_from_client,
    decode_from_daemon,
    encode,
    pack_slots,
    split_keys,
    unpack_slots,
)
from storage_tiers.arena import Slot
from storage_tiers.testing import make_key

REFUSED = (FrameError, msgspec.MsgspecError)
"""What the daemon catches around a frame; anything else would pass it by."""

INTEGERS = st.integers(-(1 << 63), (1 << 64) - 1)
UNSIGNED = st.integers(0, (1 << 64) - 1)
SECONDS = st.floats(allow_nan=False)
OF_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "int": INTEGERS,
    "str": st.text(max_size=20),
    "bytes": st.binary(max_size=64),
    "bool": st.booleans(),
    "float": SECONDS,
    "Pace": st.builds(Pace, SECONDS, SECONDS, SECONDS, SECONDS),
    "State": st.sampled_from(get_args(State)),
    "Late": st.sampled_from(get_args(Late)),
    "list[int]": st.lists(INTEGERS, max_size=5),
    "list[list[int]]": st.lists(st.lists(INTEGERS, max_size=3), max_size=3),
    "dict[str, str]": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    "list[bytes]": st.lists(st.binary(max_size=48), max_size=3),
    "Routing | None": st.none()
    | st.builds(Routing, INTEGERS, INTEGERS, st.binary(max_size=32), INTEGERS, INTEGERS),
    "list[MatchGroup]": st.lists(
        st.builds(MatchGroup, INTEGERS, INTEGERS, st.binary(max_size=48)), max_size=3
    ),
}


def messages(union: Any) -> st.SearchStrategy[Any]:
    """Every message of the union, with any values its fields may have."""
    return st.one_of(
        [
            st.builds(kind, *(OF_TYPE[text] for text in kind.__annotations__.values()))
            for kind in get_args(union)
        ]
    )


def read(*pieces: bytes) -> list[bytes]:
    reader = FrameReader()
    return [body for piece in pieces for body in reader.feed(piece)]


# -- messages ---------------------------------------------------------------------------


@given(messages(FromClient))
def test_what_a_client_says_arrives_unchanged(message: Any) -> None:
    [body] = read(encode(message))
    assert decode_from_client(body) == message


@given(messages(FromDaemon))
def test_what_the_daemon_says_arrives_unchanged(message: Any) -> None:
    [body] = read(encode(message))
    assert decode_from_daemon(body) == message


def test_each_side_understands_only_the_others_messages() -> None:
    with pytest.raises(REFUSED):
        decode_from_client(encode(Fence())[4:])
    with pytest.raises(REFUSED):
        decode_from_daemon(encode(Fenced())[4:])


def test_the_bytes_of_a_message_are_those_that_older_peers_know() -> None:
    """Whoever makes this fail must give the protocol a new version."""
    assert encode(Fenced()) == b"\x08\x00\x00\x00\x91\xa6Fenced"
    assert encode(Lease(8192, 3)) == b"\x0b\x00\x00\x00\x93\xa5Lease\xcd\x20\x00\x03"
    match = Match(1, [MatchGroup(16, 0, b"k" * 16)], "r", Pace(1.5))
    assert encode(match)[4:] == (
        b"\x95\xa5Match\x01\x91\x94\xaaMatchGroup\x10\x00\xc4\x10" + b"k" * 16 + b"\xa1r\x94"
        b"\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00" + 3 * (b"\xcb" + bytes(8))
    )
    packed = pack_slots([(1, 2, Slot(3, 4, 5))])
    assert packed == struct.pack("<IBQQQ", 1, 2, 3, 4, 5)


# -- malformed bodies -------------------------------------------------------------------

SAMPLE = Commit(bytes(32), bytes(32), [0, 1], bytes(2 * SLOT_RECORD.itemsize))


@pytest.mark.parametrize("length", range(len(encode(SAMPLE)) - 4))
def test_a_body_that_was_cut_is_refused(length: int) -> None:
    with pytest.raises(REFUSED):
        decode_from_client(encode(SAMPLE)[4 : 4 + length])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc0",
        b"\x90",
        b"\xc1",
        b"\x91\xa5Hello",
        b"\x91\xa9Goodbye!!",
        b"\x91\x01",
        b"\x91\xa6Fenced\x00",
        b"\x93\xa5Lease\xa3all\x01",
        b"\x93\xa5Lease\x01\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00",
        b"\x92\xa7Unmatch\xdd\xff\xff\xff\xff",
        b"\x92\xa8GiveBack\xc6\xff\xff\xff\xff",
        b"\x92\xa8GiveBack\xa3abc",
        b"\x81\xa4type\xa6Fenced",
    ],
)
def test_a_malformed_body_is_refused(body: bytes) -> None:
    with pytest.raises(REFUSED):
        decode_from_client(body)


def test_text_that_is_no_utf_8_is_refused_like_any_malformed_body() -> None:
    hello = b"\x9a\xa5Hello\x01\xa2\xff\xfe\xa1e\x00\x01\x80\x90\xc2\x01"
    with pytest.raises(REFUSED):
        decode_from_client(hello)
    with pytest.raises(REFUSED):
        decode_from_client(b"\x91\xa6\xff\xff\xff\xff\xff\xff")


def test_a_body_nested_without_end_is_refused_like_any_malformed_body() -> None:
    with pytest.raises(REFUSED):
        decode_from_client(b"\x92\xa6Fenced" + b"\x91" * 100_000 + b"\xc0")


@given(st.binary(max_size=80))
@example(b"\x92\xa7Unmatch\x91\xa1\xff")
@settings(max_examples=300)
def test_any_body_is_a_message_or_refused(body: bytes) -> None:
    try:
        assert isinstance(decode_from_client(body), Message)
    except REFUSED:
        return


@given(messages(FromClient), st.data())
@settings(max_examples=200)
def test_a_damaged_message_is_another_message_or_refused(message: Any, data: Any) -> None:
    body = bytearray(encode(message)[4:])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(decode_from_client(bytes(body)), Message)
    except REFUSED:
        return


# -- frames -----------------------------------------------------------------------------

STREAM: list[FromClient] = [Lease(8192, 3), Fenced(), SAMPLE]
FRAMES = b"".join(encode(message) for message in STREAM)


@pytest.mark.parametrize("cut", range(len(FRAMES) + 1))
def test_frames_cut_anywhere_arrive_whole(cut: int) -> None:
    bodies = read(FRAMES[:cut], FRAMES[cut:])
    assert [decode_from_client(body) for body in bodies] == STREAM


def test_frames_that_come_byte_by_byte_arrive_as_soon_as_they_are_whole() -> None:
    reader, seen = FrameReader(), []
    ends = np.cumsum([len(encode(message)) for message in STREAM]).tolist()
    for at in range(len(FRAMES)):
        bodies = list(reader.feed(FRAMES[at : at + 1]))
        assert len(bodies) == (at + 1 in ends)
        seen += bodies
    assert [decode_from_client(body) for body in seen] == STREAM


@given(st.lists(st.binary(max_size=30), max_size=8), st.lists(st.integers(0, 300), max_size=10))
def test_any_bodies_cut_in_any_way_arrive_in_order(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(struct.pack("<I", len(body)) + body for body in bodies)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert read(*pieces) == bodies


def test_the_longest_frame_is_accepted_and_one_byte_more_is_not() -> None:
    [body] = read(struct.pack("<I", FRAME_BYTES_MAX), bytes(FRAME_BYTES_MAX))
    assert len(body) == FRAME_BYTES_MAX
    with pytest.raises(FrameError, match=f"{FRAME_BYTES_MAX + 1} bytes"):
        read(struct.pack("<I", FRAME_BYTES_MAX + 1))


def test_frames_before_an_oversized_one_are_still_delivered() -> None:
    frames = FrameReader().feed(encode(Fenced()) + b"\xff\xff\xff\xff")
    assert decode_from_client(next(frames)) == Fenced()
    with pytest.raises(FrameError, match="exceeds"):
        next(frames)


def test_a_message_too_large_for_a_frame_is_not_sent() -> None:
    assert len(encode(GiveBack(bytes(FRAME_BYTES_MAX - 64)))) <= FRAME_BYTES_MAX + 4
    with pytest.raises(FrameError, match="GiveBack"):
        encode(GiveBack(bytes(FRAME_BYTES_MAX)))


# -- packed lists -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3])
def test_keys_are_split_where_they_were_joined(count: int) -> None:
    keys = [make_key(index) for index in range(count)]
    assert split_keys(b"".join(keys)) == keys


@pytest.mark.parametrize("length", [1, 15, 17, 31])
def test_bytes_that_are_no_whole_keys_are_refused(length: int) -> None:
    with pytest.raises(FrameError, match=f"{length} bytes"):
        split_keys(bytes(length))


@given(
    st.lists(
        st.tuples(
            st.integers(0, (1 << 32) - 1),
            st.integers(0, 255),
            st.builds(Slot, UNSIGNED, UNSIGNED, UNSIGNED),
        ),
        max_size=5,
    )
)
def test_packed_slots_are_unpacked_unchanged(slots: list[tuple[int, int, Slot]]) -> None:
    assert unpack_slots(pack_slots(iter(slots))) == slots


@pytest.mark.parametrize("length", [1, SLOT_RECORD.itemsize - 1, SLOT_RECORD.itemsize + 1])
def test_bytes_that_are_no_whole_slots_are_refused(length: int) -> None:
    with pytest.raises(FrameError, match=f"{length} bytes"):
        unpack_slots(bytes(length))


@pytest.mark.parametrize(
    "record",
    [
        (1 << 32, 0, Slot(0, 0, 0)),
        (0, 256, Slot(0, 0, 0)),
        (0, 0, Slot(1 << 64, 0, 0)),
        (-1, 0, Slot(0, 0, 0)),
    ],
)
def test_a_slot_that_does_not_fit_its_record_is_not_packed(record: tuple[int, int, Slot]) -> None:
    with pytest.raises(OverflowError):
        pack_slots([record])
