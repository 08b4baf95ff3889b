"""The conformance suite every tier passes, and builders for its tests.

A tier's test module subclasses `TierConformance`, or `ReadOnlyConformance` if others fill the tier,
gives `make` (and `corrupt` where bytes can be reached behind the tier's back), and says by class
attributes what the medium promises.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from storage_tiers.base import (
    Chunk,
    Corrupt,
    Failed,
    Full,
    Key,
    Known,
    Loaded,
    LoadItem,
    Missing,
    RemovalReason,
    Stored,
    StoreItem,
    Tier,
    TierListener,
    TierName,
)
from storage_tiers.codec import checksum

WAIT_S: Final = 10.0
"""Bound of every wait here; what is waited for takes milliseconds."""


@dataclass(slots=True)
class RecordingListener:
    """Keeps what a tier told it."""

    came: list[Key] = field(default_factory=list)
    went: list[tuple[Key, RemovalReason]] = field(default_factory=list)
    notes: dict[Key, bytes] = field(default_factory=dict)

    def appeared(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes] = ()) -> None:
        self.came.extend(keys)
        if notes:
            self.noted(tier, keys, notes)

    def noted(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        self.notes.update((key, note) for key, note in zip(keys, notes, strict=True) if note)

    def removed(self, tier: TierName, keys: Sequence[Key], reason: RemovalReason) -> None:
        self.went.extend((key, reason) for key in keys)


def make_key(name: object, tenant: int = 0) -> Key:
    """A key that is the same for the same name and tenant's tag."""
    return Key(hashlib.blake2b(str(name).encode(), digest_size=15).digest() + bytes([tenant]))


def make_items(
    name: str, count: int, length: int = 8192, *, seed: int = 0, chained: bool = True
) -> list[StoreItem]:
    """`count` chunks of random bytes: one sequence, root first, or unrelated ones."""
    source = random.Random(f"{name}/{seed}")
    items: list[StoreItem] = []
    parent: Key | None = None
    for position in range(count):
        data = source.randbytes(length)
        key = make_key(f"{name}/{position}")
        chunk = Chunk(
            key, length, checksum(data), parent if chained else None, position if chained else 0
        )
        items.append(StoreItem(chunk, memoryview(data)))
        parent = key
    return items


def with_notes(items: Sequence[StoreItem]) -> list[StoreItem]:
    """The same, each chunk with a note of its own length but the second, which has none."""
    return [
        item
        if place == 1
        else replace(item, chunk=replace(item.chunk, note=item.chunk.key * (place + 1)))
        for place, item in enumerate(items)
    ]


def notes_of(items: Sequence[StoreItem]) -> dict[Key, bytes]:
    """Those there are, by key."""
    return {item.chunk.key: item.chunk.note for item in items if item.chunk.note}


async def store_all(tier: Tier, items: Sequence[StoreItem]) -> None:
    """Store, and insist on it."""
    outcomes = await tier.store(items)
    assert outcomes == [Stored()] * len(items), outcomes


async def load_one(tier: Tier, item: StoreItem) -> tuple[Any, bytes]:
    """The outcome of loading a chunk, and the bytes that arrived."""
    buffer = bytearray(item.chunk.length)
    [outcome] = await tier.load([LoadItem(item.chunk.key, memoryview(buffer))])
    return outcome, bytes(buffer)


def _keys(items: Sequence[StoreItem]) -> list[Key]:
    return [item.chunk.key for item in items]


class LoadConformance:
    """What `storage_tiers.base.Tier` says of reading, one sentence a test; all tiers keep it."""

    length: ClassVar[int] = 64 << 10  # of a chunk of usual size

    # -- what a subclass gives -----------------------------------------------------------

    def make(self, listener: TierListener) -> Tier:
        """A tier; every call in one test over the same medium."""
        raise NotImplementedError

    async def put(self, tier: Tier, items: Sequence[StoreItem]) -> None:
        """Have these chunks in the tier."""
        await store_all(tier, items)

    async def corrupt(self, tier: Tier, key: Key) -> None:
        """Change one bit of the stored chunk without the tier's knowledge."""
        raise NotImplementedError

    def check(self, tier: Tier) -> None:
        """The tier's own integrity check; runs when a test ends."""
        check = getattr(tier, "check_integrity", None)
        if check is not None:
            check()
        usage = tier.usage()
        assert 0 <= usage.used_bytes <= usage.capacity_bytes

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[tuple[Tier, RecordingListener]]:
        listener = RecordingListener()
        tier = self.make(listener)
        await tier.open()
        try:
            yield tier, listener
            self.check(tier)
        finally:
            await tier.close()

    # -- reading -------------------------------------------------------------------------

    async def test_what_is_stored_is_loaded(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 5)
            await self.put(tier, items)
            for item in items:
                outcome, data = await load_one(tier, item)
                assert outcome == Loaded(item.chunk)
                assert data == item.data

    async def test_any_length_and_alignment_is_kept(self) -> None:
        async with self.opened() as (tier, _):
            for length in (1, 63, 64, 511, 4095, 4096, 4097, 70_001):
                [item] = make_items(f"length{length}", 1, length)
                room = bytearray(length + 1)
                room[1:] = item.data
                await self.put(tier, [StoreItem(item.chunk, memoryview(room)[1:])])
                buffer = bytearray(b"\xaa" * (length + 8))
                into = memoryview(buffer)[3:]
                [outcome] = await tier.load([LoadItem(item.chunk.key, into)])
                assert outcome == Loaded(item.chunk)
                assert into[:length] == item.data
                assert buffer[:3] == b"\xaa" * 3

    async def test_outcomes_are_in_the_order_of_the_items(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 6)
            await self.put(tier, items)
            wanted = [items[4], items[0], items[5], items[2]]
            buffers = [bytearray(item.chunk.length) for item in wanted]
            keys = _keys(wanted)
            outcomes = await tier.load(
                [LoadItem(key, memoryview(b)) for key, b in zip(keys, buffers, strict=True)]
            )
            assert outcomes == [Loaded(item.chunk) for item in wanted]
            assert [bytes(b) for b in buffers] == [bytes(item.data) for item in wanted]

    async def test_one_key_can_be_loaded_into_several_buffers_at_once(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 1)
            await self.put(tier, items)
            buffers = [bytearray(items[0].chunk.length) for _ in range(3)]
            outcomes = await tier.load(
                [LoadItem(items[0].chunk.key, memoryview(buffer)) for buffer in buffers]
            )
            assert outcomes == [Loaded(items[0].chunk)] * 3
            assert all(buffer == items[0].data for buffer in buffers)

    async def test_a_fresh_tier_is_empty(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 2)
            assert tier.find(_keys(items)) == [None, None]
            assert tier.usage().chunks == tier.usage().used_bytes == 0
            assert (await load_one(tier, items[0]))[0] == Missing()

    async def test_missing_among_present_keys_fails_only_itself(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 2)
            await self.put(tier, items)
            wanted = [items[0].chunk.key, make_key("unknown"), items[1].chunk.key]
            room = [memoryview(bytearray(items[0].chunk.length)) for _ in wanted]
            outcomes = await tier.load(list(map(LoadItem, wanted, room)))
            assert outcomes == [Loaded(items[0].chunk), Missing(), Loaded(items[1].chunk)]

    async def test_changed_bytes_are_found_and_the_key_is_gone(self) -> None:
        async with self.opened() as (tier, listener):
            items = make_items("a", 3)
            await self.put(tier, items)
            await self.corrupt(tier, items[1].chunk.key)
            outcome, _ = await load_one(tier, items[1])
            assert isinstance(outcome, Corrupt)
            assert outcome.reason
            assert [chunk is not None for chunk in tier.find(_keys(items))] == [True, False, True]
            assert listener.went == [(items[1].chunk.key, RemovalReason.CORRUPT)]
            assert tier.usage().corrupt_total == 1
            assert (await load_one(tier, items[1]))[0] == Missing()
            for item in (items[0], items[2]):
                assert (await load_one(tier, item))[1] == item.data

    async def test_a_cancelled_load_writes_nothing_after_it_raised(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 8, self.length // 2)
            await self.put(tier, items)
            for pause_s in (0, 0, 0.0005, 0.002, 0.005):
                buffers = [bytearray(item.chunk.length) for item in items]
                wanted = list(map(LoadItem, _keys(items), [memoryview(b) for b in buffers]))
                task = asyncio.ensure_future(tier.load(wanted))
                await asyncio.sleep(pause_s)
                task.cancel()
                await asyncio.wait([task])
                marker = bytes(items[0].chunk.length)
                for buffer in buffers:
                    buffer[:] = marker
                await asyncio.sleep(0.05)
                assert all(buffer == marker for buffer in buffers)

    async def test_closing_twice_is_harmless(self) -> None:
        async with self.opened() as (tier, _):
            await tier.close()
            await tier.close()


class TierConformance(LoadConformance):
    """The whole contract of `storage_tiers.base.Tier`, for a tier that stores."""

    evicts_by_recency: ClassVar[bool] = True  # else by age, whatever was touched
    durable: ClassVar[bool] = False  # another instance made by `make` finds what was stored
    removes_durably: ClassVar[bool] = True  # else a removed key may be found by another instance
    loads_notes: ClassVar[bool] = False  # with the chunk, as soon as it is stored
    capacity_bytes: ClassVar[int] = 1 << 20

    async def fill(self, tier: Tier, listener: RecordingListener) -> list[StoreItem]:
        """Store unrelated chunks one by one until one is evicted; those stored, in order."""
        stored: list[StoreItem] = []
        for index in range(2 * self.capacity_bytes // self.length):
            [item] = make_items(f"fill{index}", 1, self.length)
            await store_all(tier, [item])
            stored.append(item)
            if listener.went:
                return stored
        raise AssertionError("storing twice the capacity evicted nothing")

    # -- bytes ---------------------------------------------------------------------------

    # -- keys ----------------------------------------------------------------------------

    async def test_nothing_in_gives_nothing_out(self) -> None:
        async with self.opened() as (tier, _):
            assert tier.find([]) == []
            assert await tier.store([]) == []
            assert await tier.load([]) == []
            await tier.remove([])
            tier.touch([])

    async def test_find_answers_each_key_in_order(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 3)
            await store_all(tier, items)
            unknown = make_key("unknown")
            found = tier.find([items[2].chunk.key, unknown, items[0].chunk.key])
            assert found == [items[2].chunk, None, items[0].chunk]

    async def test_a_known_key_is_not_stored_again(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 2)
            await store_all(tier, items[:1])
            used = tier.usage().used_bytes
            assert await tier.store(items[:1]) == [Known()]
            assert tier.usage().used_bytes == used
            assert await tier.store(items) == [Known(), Stored()]

    async def test_a_key_twice_in_one_store_is_stored_once(self) -> None:
        async with self.opened() as (tier, _):
            [item] = make_items("a", 1)
            assert await tier.store([item, item]) == [Stored(), Known()]
            assert tier.usage().chunks == 1

    async def test_a_removed_key_is_missing_and_can_be_stored_again(self) -> None:
        async with self.opened() as (tier, listener):
            items = make_items("a", 3)
            await store_all(tier, items)
            await tier.remove([items[1].chunk.key, make_key("unknown")])
            assert listener.went == [(items[1].chunk.key, RemovalReason.REQUESTED)]
            assert tier.find(_keys(items)) == [items[0].chunk, None, items[2].chunk]
            assert (await load_one(tier, items[1]))[0] == Missing()
            await store_all(tier, [items[1]])
            assert (await load_one(tier, items[1]))[1] == items[1].data

    # -- notes ---------------------------------------------------------------------------

    async def test_a_chunk_is_loaded_with_its_own_note_or_none(self) -> None:
        async with self.opened() as (tier, _):
            items = with_notes(make_items("a", 4))
            await store_all(tier, items)
            for item in items:
                outcome, data = await load_one(tier, item)
                assert outcome == Loaded(item.chunk)
                assert outcome.chunk.note in ((item.chunk.note,) if self.loads_notes else (b"",))
                assert data == item.data

    async def test_notes_are_told_after_reopening(self) -> None:
        if not self.durable:
            return
        items = with_notes(make_items("a", 40))
        bare = make_items("bare", 3)
        async with self.opened() as (tier, listener):
            await store_all(tier, [*items, *bare])
            tier.touch(_keys(items[:2]))
            assert not listener.notes
        for _ in range(2):
            async with self.opened() as (tier, listener):
                async with asyncio.timeout(WAIT_S):  # they may come after the keys
                    while len(listener.notes) < len(notes_of(items)):
                        await asyncio.sleep(0.01)
                assert listener.notes == notes_of(items)
                for item in (*items, *bare):
                    assert (await load_one(tier, item))[1] == item.data

    # -- capacity ------------------------------------------------------------------------

    async def test_capacity_is_held_while_storing_many_times_it(self) -> None:
        async with self.opened() as (tier, listener):
            source = random.Random(7)
            count = 0
            for index in range(40):
                length = source.choice([3000, self.length // 3, self.length])
                for outcome in await tier.store(make_items(f"s{index}", 3, length)):
                    assert isinstance(outcome, Stored | Full)
                    count += isinstance(outcome, Stored)
                usage = tier.usage()
                assert usage.used_bytes <= usage.capacity_bytes
                assert usage.chunks == count - len(listener.went)
            assert {reason for _, reason in listener.went} == {RemovalReason.CAPACITY}

    async def test_a_chunk_larger_than_the_tier_is_refused(self) -> None:
        async with self.opened() as (tier, _):
            small = make_items("small", 1)
            await store_all(tier, small)
            [outcome] = await tier.store(make_items("big", 1, self.capacity_bytes + 1))
            assert isinstance(outcome, Full)
            assert outcome.reason
            assert tier.find(_keys(small)) == [small[0].chunk]

    async def test_the_oldest_chunk_is_evicted_and_the_listener_told(self) -> None:
        async with self.opened() as (tier, listener):
            stored = await self.fill(tier, listener)
            assert listener.went[0] == (stored[0].chunk.key, RemovalReason.CAPACITY)
            gone = {key for key, _ in listener.went}
            for item in stored:
                assert (tier.find([item.chunk.key]) == [None]) == (item.chunk.key in gone)
            assert tier.usage().evictions_total == {"capacity": len(gone)}

    async def test_a_touched_chunk_outlives_an_untouched_one(self) -> None:
        if not self.evicts_by_recency:
            return
        async with self.opened() as (tier, listener):
            [first, second] = (make_items(name, 1, self.length)[0] for name in ("first", "second"))
            await store_all(tier, [first])
            await store_all(tier, [second])
            tier.touch([first.chunk.key, make_key("unknown")])
            await self.fill(tier, listener)
            assert listener.went[0][0] == second.chunk.key
            assert tier.find([first.chunk.key]) == [first.chunk]

    async def test_leaves_are_evicted_before_their_parents(self) -> None:
        if not self.evicts_by_recency:
            return
        async with self.opened() as (tier, _):
            sequence = make_items("sequence", 6, self.length)
            for item in sequence:
                await store_all(tier, [item])
            tier.touch(_keys(sequence))  # the wrong way round on purpose
            for index in range(2 * self.capacity_bytes // self.length):
                await store_all(tier, make_items(f"other{index}", 1, self.length))
                left = [chunk is not None for chunk in tier.find(_keys(sequence))]
                assert left == sorted(left, reverse=True), "a child is left without its parent"
            assert tier.find(_keys(sequence)) == [None] * len(sequence)

    async def test_a_branching_tree_is_evicted_from_its_leaves(self) -> None:
        if not self.evicts_by_recency:
            return
        async with self.opened() as (tier, _):
            trunk = make_items("trunk", 3, self.length)
            await store_all(tier, trunk)
            [leaf] = make_items("leaf", 1, self.length)
            branch = Chunk(
                leaf.chunk.key, leaf.chunk.length, leaf.chunk.checksum, trunk[0].chunk.key, 1
            )
            await store_all(tier, [StoreItem(branch, leaf.data)])
            keys = [*_keys(trunk), branch.key]
            for index in range(2 * self.capacity_bytes // self.length):
                await store_all(tier, make_items(f"other{index}", 1, self.length))
                root, middle, last, side = (chunk is not None for chunk in tier.find(keys))
                assert root >= middle >= last
                assert root >= side

    # -- bad bytes -----------------------------------------------------------------------

    async def test_a_quarantined_key_can_be_stored_and_loaded_anew(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 1)
            await store_all(tier, items)
            await self.corrupt(tier, items[0].chunk.key)
            await load_one(tier, items[0])
            await store_all(tier, items)
            outcome, data = await load_one(tier, items[0])
            assert outcome == Loaded(items[0].chunk)
            assert data == items[0].data

    # -- many at once --------------------------------------------------------------------

    async def test_concurrent_stores_and_loads_mix_nothing_up(self) -> None:
        async with self.opened() as (tier, _):

            async def one(name: str) -> None:
                items = make_items(name, 4, 5000)
                for outcome in await tier.store(items):
                    assert isinstance(outcome, Stored | Known)
                for item in items * 2:
                    outcome, data = await load_one(tier, item)
                    assert isinstance(outcome, Loaded | Missing)
                    assert isinstance(outcome, Missing) or data == item.data

            async with asyncio.TaskGroup() as group:
                for index in range(12):
                    group.create_task(one(f"task{index % 8}"))  # some store the same keys

    async def test_loading_while_everything_is_evicted_never_gives_wrong_bytes(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 4, self.length)
            await store_all(tier, items)

            async def churn() -> None:
                for index in range(20):
                    await tier.store(make_items(f"churn{index}", 2, self.length, chained=False))

            async def read() -> None:
                for item in items * 6:
                    outcome, data = await load_one(tier, item)
                    assert isinstance(outcome, Loaded | Missing)
                    assert isinstance(outcome, Missing) or data == item.data

            async with asyncio.TaskGroup() as group:
                group.create_task(churn())
                group.create_task(read())

    async def test_a_cancelled_store_leaves_each_chunk_whole_or_absent(self) -> None:
        async with self.opened() as (tier, _):
            for round_, pause_s in enumerate((0, 0, 0.0005, 0.002, 0.005)):
                items = make_items(f"round{round_}", 4, self.length // 2)
                data = [bytearray(item.data) for item in items]
                given = [
                    StoreItem(item.chunk, memoryview(copy))
                    for item, copy in zip(items, data, strict=True)
                ]
                task = asyncio.ensure_future(tier.store(given))
                await asyncio.sleep(pause_s)
                task.cancel()
                await asyncio.wait([task])
                for copy in data:
                    copy[:] = bytes(len(copy))
                for item in items:
                    outcome, loaded = await load_one(tier, item)
                    assert isinstance(outcome, Loaded | Missing)
                    assert isinstance(outcome, Missing) or loaded == item.data

    # -- opening again -------------------------------------------------------------------

    async def test_what_was_stored_is_there_after_reopening(self) -> None:
        if not self.durable:
            return
        items = make_items("a", 5)
        async with self.opened() as (tier, _):
            await store_all(tier, items)
            await tier.remove([items[4].chunk.key])
        async with self.opened() as (tier, _):
            here = [chunk is not None for chunk in tier.find(_keys(items))]
            assert here[:4] == [True] * 4
            assert not (here[4] and self.removes_durably)
            for item in items[:4]:
                outcome, data = await load_one(tier, item)
                assert outcome == Loaded(item.chunk)
                assert data == item.data


class ReadOnlyConformance(LoadConformance):
    """A tier that others fill: nothing is stored through it, and nothing announced."""

    async def test_storing_is_refused_and_changes_nothing(self) -> None:
        async with self.opened() as (tier, listener):
            items = make_items("mine", 2)
            for outcome in await tier.store(items):
                assert isinstance(outcome, Full)
                assert outcome.reason
            assert tier.find(_keys(items)) == [None, None]
            assert tier.usage().stored_bytes_total == 0
            assert not listener.came and not listener.went

    async def test_find_tells_keys_and_lengths_in_order(self) -> None:
        async with self.opened() as (tier, listener):
            items = make_items("a", 3, 5000)
            await self.put(tier, items)
            first, unknown, third = tier.find([_keys(items)[2], make_key("no"), _keys(items)[0]])
            assert first is not None and (first.key, first.length) == (_keys(items)[2], 5000)
            assert third is not None and (third.key, third.length) == (_keys(items)[0], 5000)
            assert unknown is None
            assert listener.came == []

    async def test_a_removed_key_is_missing_here(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 2)
            await self.put(tier, items)
            await tier.remove([items[0].chunk.key, make_key("unknown")])
            assert (await load_one(tier, items[0]))[0] == Missing()
            assert (await load_one(tier, items[1]))[1] == items[1].data

    async def test_a_closed_tier_loads_nothing(self) -> None:
        async with self.opened() as (tier, _):
            items = make_items("a", 1)
            await self.put(tier, items)
            await tier.close()
            assert isinstance((await load_one(tier, items[0]))[0], Failed)
