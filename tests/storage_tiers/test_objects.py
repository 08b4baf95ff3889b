"""Names and records of S3 objects, without any server."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_tiers.base import NOTE_BYTES_MAX, Key, StoreItem, tenant_of
from storage_tiers.codec import checksum
from storage_tiers.objects import (
    CHUNKS_MAX,
    TAIL_BYTES_MAX,
    BadRecord,
    ObjectName,
    build,
    group,
    parse_record,
    parse_tail,
    record_bytes,
    tail_bytes,
)
from storage_tiers.testing import make_items, make_key

NAMES = st.builds(
    ObjectName,
    created_ms=st.integers(0, 10**13 - 1),
    node=st.from_regex(r"\A[A-Za-z0-9_.-]{1,48}\Z"),
    sequence=st.from_regex(r"\A[0-9a-f]{1,16}\Z"),
    length=st.integers(1, 10**12 - 1),
    keys=st.lists(
        st.binary(min_size=16, max_size=16).map(Key), min_size=1, max_size=CHUNKS_MAX
    ).map(tuple),
    tail_bytes=st.integers(0, TAIL_BYTES_MAX),
)


@given(NAMES, st.sampled_from(["", "kvbm", "a/b"]))
def test_a_name_says_what_was_put_into_it(name: ObjectName, prefix: str) -> None:
    assert ObjectName.parse(prefix, name.encode(prefix)) == name


@given(st.text(max_size=60))
def test_any_other_name_is_not_ours(text: str) -> None:
    for name in (text, f"p/v1/{text}", f"p/v1/0000000000001-n-1/{text}"):
        parsed = ObjectName.parse("p", name)
        assert parsed is None or ObjectName.parse("p", parsed.encode("p")) == parsed


def test_the_longest_name_fits_s3_and_a_directory_entry() -> None:
    keys = tuple(make_key(index) for index in range(CHUNKS_MAX))
    parts = ObjectName(10**13 - 1, "n" * 48, "f" * 16, 10**12 - 1, keys, TAIL_BYTES_MAX)
    name = parts.encode("p" * 180)
    assert len(name) <= 1024
    assert all(len(part) <= 255 for part in name.split("/"))


def test_names_sort_by_time() -> None:
    first, second = (ObjectName(ms, "z", "1", 1, (make_key(1),)) for ms in (999, 1000))
    assert first.encode("p") < second.encode("p")


def test_records_verify_themselves() -> None:
    items = make_items("a", 3, 1000)
    body = memoryview(build(items))
    size = record_bytes(1000)
    assert len(body) == 3 * size
    for index, item in enumerate(items):
        record = body[index * size : (index + 1) * size]
        assert parse_record(record, item.chunk.key) == item.chunk
        assert isinstance(parse_record(record, make_key("other")), BadRecord)


@given(st.integers(0, record_bytes(1000) * 8 - 1))
def test_a_flipped_bit_is_found_unless_it_is_padding(bit: int) -> None:
    [item] = make_items("a", 1, 1000)
    body = build([item])
    body[bit // 8] ^= 1 << bit % 8
    parsed = parse_record(memoryview(body), item.chunk.key)
    in_padding = 1000 <= bit // 8 < record_bytes(1000) - 64
    assert (parsed == item.chunk) if in_padding else isinstance(parsed, BadRecord)


@pytest.mark.parametrize("object_bytes", [1, 300, 1 << 30])
def test_objects_are_filled_with_chunks_of_one_length_and_tenant(object_bytes: int) -> None:
    first, second = make_items("a", 40, 100), make_items("b", 2, 100)
    longer = make_items("c", 2, 101)
    other = [_of_tenant(item, 7) for item in make_items("d", 3, 100)]
    items = [*first, *second, *longer, *other]
    groups = group(items, object_bytes)
    assert sorted(i.chunk.key for run in groups for i in run) == sorted(i.chunk.key for i in items)
    for run in groups:
        assert len(run) == 1 or len(run) * run[0].chunk.length <= object_bytes
        assert len(run) <= CHUNKS_MAX
        assert len({(item.chunk.length, tenant_of(item.chunk.key)) for item in run}) == 1
    if object_bytes > 1 << 20:
        assert [len(run) for run in groups] == [32, 10, 2, 3]


def test_sequences_that_came_interleaved_lie_side_by_side_in_their_object() -> None:
    """Then each is read with one request."""
    first, second = make_items("a", 8, 100), make_items("b", 8, 100)
    mixed = [item for pair in zip(first, second, strict=True) for item in pair]
    [run] = group(mixed, 1 << 30)
    assert run == [*first, *second]


def _of_tenant(item: StoreItem, tag: int) -> StoreItem:
    key = Key(item.chunk.key[:-1] + bytes([tag]))
    return replace(item, chunk=replace(item.chunk, key=key, parent=None))


@given(st.lists(st.binary(max_size=80), min_size=1, max_size=CHUNKS_MAX), st.data())
def test_a_tail_gives_back_all_notes_or_says_that_it_is_damaged(
    notes: list[bytes], data: st.DataObject
) -> None:
    items = make_items("a", len(notes), 100)
    keys = [item.chunk.key for item in items]
    noted = [
        replace(item, chunk=replace(item.chunk, note=note))
        for item, note in zip(items, notes, strict=True)
    ]
    body, size = build(noted), tail_bytes([item.chunk for item in noted])
    assert bytes(body[: len(body) - size]) == bytes(build(items))  # records are what they were
    assert (size > 0) == any(notes)
    if not size:
        return
    tail = bytes(body[-size:])
    assert parse_tail(tail, keys) == notes
    bent = bytearray(tail)
    bent[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert parse_tail(bytes(bent), keys) is None
    assert parse_tail(tail[: data.draw(st.integers(0, size - 1))], keys) is None
    assert parse_tail(tail, [make_key("another"), *keys[1:]]) is None


def test_a_tail_whose_sum_is_right_and_whose_lengths_are_not_is_damaged() -> None:
    keys = [make_key("a")]
    for sizes in (b"\xff\xff\xff\xff", b"\0\0\0\0"):
        body = sizes + b"note"
        tail = body + checksum(keys[0] + body).to_bytes(8, "little")
        assert parse_tail(tail, keys) is None


def test_a_note_that_is_too_long_is_left_out() -> None:
    [item] = make_items("a", 1, 100)
    long = replace(item, chunk=replace(item.chunk, note=b"n" * (NOTE_BYTES_MAX + 1)))
    assert tail_bytes([long.chunk]) == 0 and build([long]) == build([item])


@pytest.mark.parametrize("tail", ["n0", f"n{TAIL_BYTES_MAX + 1}", "n", "n-1"])
def test_a_name_with_a_tail_out_of_range_is_not_ours(tail: str) -> None:
    name = ObjectName(1, "n", "1", 100, (make_key("a"),)).encode("p")
    assert ObjectName.parse("p", name.replace("/100.", "/100n77.")) is not None
    assert ObjectName.parse("p", name.replace("/100.", f"/100{tail}.")) is None
