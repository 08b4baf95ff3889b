"""The S3 tier on a real server: the contract, other nodes, capacity, age, damage, outages."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Self

import pytest

from storage_tiers.base import (
    Corrupt,
    Failed,
    Key,
    Loaded,
    LoadItem,
    Missing,
    RemovalReason,
    Stored,
    Tier,
    TierError,
    TierListener,
)
from storage_tiers.bucket import BucketError, Listed, ObjectMissingError, S3Bucket
from storage_tiers.s3 import S3Tier
from storage_tiers.testing import (
    RecordingListener,
    TierConformance,
    load_one,
    make_items,
    make_key,
    store_all,
)

MakeBucket = Callable[[], S3Bucket]
PREFIXES = itertools.count()


class TestS3Tier(TierConformance):
    evicts_by_recency = False
    durable = True
    removes_durably = False

    @pytest.fixture(autouse=True)
    def _prefix(self, make_bucket: MakeBucket) -> None:
        self.make_bucket = make_bucket
        self.prefix = f"conformance/{next(PREFIXES)}"

    def make(self, listener: TierListener) -> S3Tier:
        return S3Tier(
            self.make_bucket(), self.capacity_bytes, listener, node="node-1", prefix=self.prefix
        )

    async def corrupt(self, tier: Tier, key: Key) -> None:
        assert isinstance(tier, S3Tier)
        await flip_bit(tier, key)


async def flip_bit(tier: S3Tier, key: Key) -> None:
    stored = tier._index.holder(key)
    assert stored is not None
    body = bytearray(await tier._bucket.get_range(stored.name, 0, stored.size_bytes))
    body[stored.index_of(key) * (stored.tail_at // len(stored.chunks)) + 5] ^= 0x40
    await tier._bucket.put(stored.name, body)


class Node:
    """A tier with its own client and listener, on a prefix shared with other nodes."""

    def __init__(self, make_bucket: MakeBucket, prefix: str, node: str, **options: Any) -> None:
        self.listener = RecordingListener()
        capacity_bytes = options.pop("capacity_bytes", 64 << 20)
        self.tier = S3Tier(
            make_bucket(), capacity_bytes, self.listener, node=node, prefix=prefix, **options
        )

    async def __aenter__(self) -> Self:
        await self.tier.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.tier.check_integrity()
        await self.tier.close()


@pytest.fixture
def prefix() -> str:
    return f"nodes/{next(PREFIXES)}"


async def test_another_node_reads_with_the_writer_gone(
    make_bucket: MakeBucket, prefix: str
) -> None:
    items = make_items("a", 70, 3000)
    async with Node(make_bucket, prefix, "writer") as writer:
        await store_all(writer.tier, items)
    async with Node(make_bucket, prefix, "reader") as reader:
        assert set(reader.listener.came) == {item.chunk.key for item in items}
        buffers = [bytearray(3000) for _ in items]
        found = reader.tier.find([item.chunk.key for item in items])
        assert [chunk.length for chunk in found if chunk is not None] == [3000] * 70
        outcomes = await reader.tier.load(
            [LoadItem(i.chunk.key, memoryview(b)) for i, b in zip(items, buffers, strict=True)]
        )
        assert outcomes == [Loaded(item.chunk) for item in items]
        assert [bytes(b) for b in buffers] == [bytes(item.data) for item in items]
        assert reader.tier.find([items[1].chunk.key]) == [items[1].chunk]


async def test_a_running_node_learns_of_new_and_deleted_objects(
    make_bucket: MakeBucket, prefix: str
) -> None:
    items = make_items("a", 3)
    async with (
        Node(make_bucket, prefix, "one") as one,
        Node(make_bucket, prefix, "two", refresh_s=0.05) as two,
    ):
        await store_all(one.tier, items)
        async with asyncio.timeout(60):
            while not all(two.tier.find([item.chunk.key for item in items])):
                await asyncio.sleep(0.02)
        assert two.listener.came == [item.chunk.key for item in items]
        await one.tier.remove([item.chunk.key for item in items])
        outcome, _ = await load_one(two.tier, items[0])
        assert outcome == Missing()
        assert {key for key, _ in two.listener.went} == {item.chunk.key for item in items}


async def test_a_full_listing_finds_what_other_nodes_deleted(
    make_bucket: MakeBucket, prefix: str
) -> None:
    items = make_items("a", 3)
    async with Node(make_bucket, prefix, "one") as one, Node(make_bucket, prefix, "two") as two:
        await store_all(one.tier, items)
        await two.tier.refresh()
        await one.tier.remove([item.chunk.key for item in items])
        for _ in range(20):
            await two.tier.refresh()
        assert two.tier.usage().chunks == 0


async def test_a_run_of_chunks_is_one_object_and_one_read(
    make_bucket: MakeBucket, prefix: str
) -> None:
    class Counting(S3Bucket):
        reads = 0

        async def get_range(self, name: str, offset: int, length: int) -> bytes | bytearray:
            self.reads += 1
            return await super().get_range(name, offset, length)

    bucket = make_bucket()
    bucket.__class__ = Counting
    async with Node(lambda: bucket, prefix, "one") as node:
        items = make_items("a", 8)
        await store_all(node.tier, items)
        assert len(node.tier._index.names()) == 1
        wanted = [items[i] for i in (6, 1, 2, 3, 5)]  # two runs
        outcomes = await node.tier.load(
            [LoadItem(item.chunk.key, memoryview(bytearray(8192))) for item in wanted]
        )
        assert outcomes == [Loaded(item.chunk) for item in wanted]
        assert isinstance(bucket, Counting)
        assert bucket.reads == 2


async def test_a_flipped_bit_costs_one_chunk_and_stays_ignored(
    make_bucket: MakeBucket, prefix: str
) -> None:
    async with Node(make_bucket, prefix, "one") as node:
        items = make_items("a", 3)
        await store_all(node.tier, items)
        await flip_bit(node.tier, items[1].chunk.key)
        assert isinstance((await load_one(node.tier, items[1]))[0], Corrupt)
        for _ in range(21):  # a full listing among them
            await node.tier.refresh()
        assert node.tier.find([items[1].chunk.key]) == [None]
        assert (await load_one(node.tier, items[2]))[0] == Loaded(items[2].chunk)
        await store_all(node.tier, [items[1]])
        assert (await load_one(node.tier, items[1]))[0] == Loaded(items[1].chunk)


async def test_an_object_under_a_false_name_is_never_taken_for_the_chunk(
    make_bucket: MakeBucket, prefix: str
) -> None:
    async with Node(make_bucket, prefix, "one") as node:
        true, false = make_items("true", 1)[0], make_items("false", 1)[0]
        await store_all(node.tier, [true])
        [name] = node.tier._index.names()
        stored = node.tier._index.get(name)
        assert stored is not None
        body = bytearray(await node.tier._bucket.get_range(name, 0, stored.size_bytes))
        parts = node.tier._new_name([false])
        await node.tier._bucket.put(parts.encode(prefix), body)
        await node.tier.refresh()
        assert isinstance((await load_one(node.tier, false))[0], Corrupt)


async def test_the_oldest_objects_are_deleted_at_the_age_limit(
    make_bucket: MakeBucket, prefix: str
) -> None:
    now = 1_800_000_000.0
    async with Node(make_bucket, prefix, "one", max_age_s=60, clock=lambda: now) as node:
        old, young = make_items("old", 2), make_items("young", 2)
        await store_all(node.tier, old)
        now += 40
        await store_all(node.tier, young)
        await node.tier.refresh()
        assert node.listener.went == []
        now += 30
        await node.tier.refresh()
        assert node.listener.went == [(item.chunk.key, RemovalReason.AGE) for item in old]
        assert node.tier.find([young[0].chunk.key]) == [young[0].chunk]
        listed = await node.tier._bucket.list_after(prefix, "")
        assert [entry.name for entry in listed] == node.tier._index.names()


async def test_capacity_counts_what_other_nodes_stored(
    make_bucket: MakeBucket, prefix: str
) -> None:
    async with Node(make_bucket, prefix, "one") as one:
        await store_all(one.tier, make_items("one", 4, 100_000))
        async with Node(make_bucket, prefix, "two", capacity_bytes=600_000) as two:
            assert two.tier.usage().used_bytes > 400_000
            await store_all(two.tier, make_items("two", 3, 100_000))
            assert {reason for _, reason in two.listener.went} == {RemovalReason.CAPACITY}
            assert two.tier.usage().used_bytes <= 600_000


async def test_a_tier_that_cannot_reach_its_bucket_says_so(make_bucket: MakeBucket) -> None:
    bucket = make_bucket()
    bucket.bucket = "absent"
    with pytest.raises(TierError, match="S3 cannot be used"):
        await S3Tier(bucket, 1 << 20, RecordingListener(), node="n").open()
    closed = S3Bucket(
        "tiers",
        endpoint_url="http://127.0.0.1:9",
        region="r",
        access_key_id="a",
        secret_access_key="b",
        attempts=1,
    )
    with pytest.raises(TierError, match="S3 cannot be used"):
        await S3Tier(closed, 1 << 20, RecordingListener(), node="n").open()


class DictBucket:
    """A bucket in a dictionary that can be told to misbehave."""

    mover = "dictionary"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.trouble: BucketError | None = None
        self.hangs = False

    async def open(self) -> None:
        await self._answer()

    async def put(self, name: str, body: bytearray) -> None:
        await self._answer()
        self.objects[name] = bytes(body)

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        await self._answer()
        if name not in self.objects:
            raise ObjectMissingError("no such object")
        return self.objects[name][offset : offset + length]

    async def list_after(self, prefix: str, after: str) -> list[Listed]:
        await self._answer()
        names = sorted(n for n in self.objects if n.startswith(prefix) and n > after)
        return [Listed(name, len(self.objects[name])) for name in names[:3]]

    async def delete(self, names: Sequence[str]) -> None:
        await self._answer()
        for name in names:
            self.objects.pop(name, None)

    async def close(self) -> None:
        pass

    async def _answer(self) -> None:
        if self.hangs:
            await asyncio.sleep(3600)
        if self.trouble is not None:
            raise self.trouble
        await asyncio.sleep(0)


class TestS3TierOnADictionary(TierConformance):
    evicts_by_recency = False
    durable = True
    removes_durably = False

    @pytest.fixture(autouse=True)
    def _bucket(self) -> None:
        self.bucket = DictBucket()

    def make(self, listener: TierListener) -> S3Tier:
        return S3Tier(self.bucket, self.capacity_bytes, listener, node="n")

    async def corrupt(self, tier: Tier, key: Key) -> None:
        assert isinstance(tier, S3Tier)
        await flip_bit(tier, key)


async def test_an_outage_fails_calls_within_the_deadline_and_loses_nothing() -> None:
    bucket = DictBucket()
    tier = S3Tier(bucket, 1 << 20, RecordingListener(), node="n", timeout_s=0.1)
    await tier.open()
    items = make_items("a", 3)
    await store_all(tier, items)
    for trouble, hangs in ((BucketError("503 SlowDown"), False), (None, True)):
        bucket.trouble, bucket.hangs = trouble, hangs
        async with asyncio.timeout(60):
            outcome, _ = await load_one(tier, items[0])
            assert isinstance(outcome, Failed)
            assert outcome.reason in {"503 SlowDown", "no answer within 0.1 s"}
            for outcome in await tier.store(make_items("b", 2)):
                assert isinstance(outcome, Failed)
            await tier.refresh()
            await tier.remove([make_key("unknown")])
        assert tier.usage().used_bytes == sum(map(len, bucket.objects.values()))
    bucket.trouble, bucket.hangs = None, False
    assert (await load_one(tier, items[0]))[0] == Loaded(items[0].chunk)
    assert await tier.store(make_items("b", 2)) == [Stored(), Stored()]
    assert tier.usage().errors_total == {"load": 2, "store": 2, "refresh": 2}
    tier.check_integrity()
    await tier.close()
