"""Notes behind the records of S3 objects: read in the background, or with what is loaded."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from storage_tiers import tails as tails_module
from storage_tiers.base import Key, Loaded, StoreItem
from storage_tiers.bucket import BucketError, ObjectMissingError
from storage_tiers.object_index import ObjectIndex, StoredObject
from storage_tiers.objects import ObjectName, build, tail_bytes
from storage_tiers.s3 import S3Tier
from storage_tiers.tails import ATTEMPTS, Tails
from storage_tiers.testing import (
    WAIT_S,
    RecordingListener,
    load_one,
    make_items,
    notes_of,
    store_all,
    with_notes,
)
from tests.storage_tiers.test_s3 import DictBucket


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def open_tier(bucket: DictBucket, **options: Any) -> tuple[S3Tier, RecordingListener]:
    listener = RecordingListener()
    tier = S3Tier(bucket, 1 << 20, listener, node="n", **options)
    await tier.open()
    return tier, listener


async def write(bucket: DictBucket, items: list[StoreItem]) -> None:
    """What another node would store."""
    tier, _ = await open_tier(bucket)
    await store_all(tier, items)
    await tier.close()


# -- through the tier -------------------------------------------------------------------


async def test_a_running_node_learns_the_notes_of_new_objects_for_one_request_each() -> None:
    bucket = DictBucket()
    reader, listener = await open_tier(bucket, refresh_s=0.01)
    items, bare = with_notes(make_items("a", 40)), make_items("bare", 2)
    await write(bucket, items)
    await write(bucket, bare)
    await until(lambda: listener.notes == notes_of(items) and len(listener.came) == 42)
    assert reader.usage().requests_total["get_notes"] == 2  # 40 chunks are two objects
    assert not reader.usage().errors_total
    reader.check_integrity()
    await reader.close()


async def test_a_damaged_tail_costs_the_notes_and_nothing_else() -> None:
    bucket = DictBucket()
    items = with_notes(make_items("a", 4))
    await write(bucket, items)
    [name] = bucket.objects
    body = bytearray(bucket.objects[name])
    body[-20] ^= 4
    bucket.objects[name] = bytes(body)
    reader, listener = await open_tier(bucket)
    await until(lambda: reader.usage().errors_total == {"notes_damaged": 1})
    for item in items:
        outcome, data = await load_one(reader, item)
        assert outcome == Loaded(item.chunk) and data == item.data
    assert not listener.notes and not listener.went
    await reader.close()


async def test_the_tail_comes_with_the_last_record_where_it_is_not_known() -> None:
    bucket = DictBucket()
    items = with_notes(make_items("a", 4))
    await write(bucket, items)
    reader, listener = await open_tier(bucket, note_reads_per_s=0)
    first, _ = await load_one(reader, items[0])
    assert first.chunk.note == b"" and not listener.notes
    last, data = await load_one(reader, items[3])
    assert last == Loaded(items[3].chunk) and data == items[3].data
    assert last.chunk.note == items[3].chunk.note
    assert listener.notes == notes_of(items)
    assert (await load_one(reader, items[3]))[0].chunk.note == b""  # told once
    assert reader.usage().requests_total["get"] == 3
    assert "get_notes" not in reader.usage().requests_total
    await reader.close()


# -- the queue --------------------------------------------------------------------------


class Shelf:
    """Objects with notes, and what is fetched of them."""

    def __init__(self, count: int) -> None:
        self.index = ObjectIndex()
        self.objects: list[StoredObject] = []
        self.bodies: dict[str, bytes] = {}
        self.fetched: list[StoredObject] = []
        self.notes: dict[Key, bytes] = {}
        self.wanted: dict[Key, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.trouble: list[BucketError] = []  # one a fetch, until there is none left
        for number in range(count):
            items = with_notes(make_items(f"object{number}", 2, 100))
            chunks = [item.chunk for item in items]
            keys = tuple(chunk.key for chunk in chunks)
            parts = ObjectName(number, "n", f"{number:x}", 100, keys, tail_bytes(chunks))
            name = parts.encode("p")
            self.bodies[name] = bytes(build(items))
            self.wanted |= notes_of(items)
            self.index.add(name, parts)
            stored = self.index.get(name)
            assert stored is not None
            self.objects.append(stored)

    def tails(self, reads_per_s: float = 1e6) -> Tails:
        return Tails(
            self.index,
            self.fetch,
            lambda keys, notes: self.notes.update(zip(keys, notes, strict=True)),
            requests=self.requests,
            errors=self.errors,
            reads_per_s=reads_per_s,
        )

    async def fetch(self, stored: StoredObject) -> bytes:
        self.fetched.append(stored)
        await asyncio.sleep(0)
        if self.trouble:
            raise self.trouble.pop()
        return self.bodies[stored.name][stored.tail_at :]


async def drained(tails: Tails, condition: Callable[[], object]) -> None:
    task = asyncio.create_task(tails.run())
    try:
        await until(condition)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_the_newest_are_read_first_and_no_sooner_than_the_rate_allows() -> None:
    shelf = Shelf(5)
    tails = shelf.tails(reads_per_s=100)
    began = time.monotonic()
    for stored in shelf.objects:
        tails.add(stored)
    await drained(tails, lambda: shelf.notes == shelf.wanted)
    assert shelf.fetched == shelf.objects[::-1]
    assert tails._due >= began + 5 / 100
    assert shelf.requests == {"get_notes": 5}


async def test_a_failing_bucket_is_asked_again_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tails_module, "RETRY_PAUSE_S", 0.001)
    shelf = Shelf(1)
    shelf.trouble = [BucketError("503")] * (ATTEMPTS - 1)
    tails = shelf.tails()
    tails.add(shelf.objects[0])
    await drained(tails, lambda: shelf.notes == shelf.wanted)
    assert shelf.errors == {"notes": ATTEMPTS - 1}

    shelf = Shelf(2)
    shelf.trouble = [BucketError("503")] * 2 * ATTEMPTS
    tails = shelf.tails()
    for stored in shelf.objects:
        tails.add(stored)
    await drained(tails, lambda: shelf.errors["notes_dropped"] == 2)
    assert shelf.errors["notes"] == shelf.requests["get_notes"] == 2 * ATTEMPTS
    assert not tails and not shelf.notes


async def test_objects_that_are_gone_cost_nothing_more() -> None:
    shelf = Shelf(3)
    tails = shelf.tails()
    for stored in shelf.objects:
        tails.add(stored)
    shelf.index.drop(shelf.objects[2].name)
    shelf.trouble = [ObjectMissingError("gone")]
    await drained(tails, lambda: len(shelf.notes) == 1)
    assert shelf.fetched == [shelf.objects[1], shelf.objects[0]]
    assert not shelf.errors and not tails


async def test_what_was_removed_or_damaged_here_is_not_told() -> None:
    shelf = Shelf(1)
    [stored] = shelf.objects
    shelf.index.ignore(stored, stored.chunks[0].key)
    tails = shelf.tails()
    tails.add(stored)
    await drained(tails, lambda: stored.is_tail_read)
    assert not shelf.notes
    assert shelf.wanted.keys() == {stored.chunks[0].key}


async def test_the_queue_is_bounded_and_drops_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails_module, "QUEUE_MAX", 2)
    shelf = Shelf(3)
    tails = shelf.tails()
    for stored in shelf.objects:
        tails.add(stored)
    assert len(tails) == 2 and shelf.errors == {"notes_dropped": 1}
    await drained(tails, lambda: len(shelf.notes) == 2)
    assert shelf.fetched == shelf.objects[:0:-1]


async def test_nothing_is_read_where_there_is_nothing_or_nobody_wants_it() -> None:
    shelf = Shelf(1)
    tails = shelf.tails(reads_per_s=0)
    tails.add(shelf.objects[0])
    assert not tails
    bare = Shelf(1)
    bare.objects[0].tail_bytes = 0
    tails = bare.tails()
    tails.add(bare.objects[0])
    assert not tails
