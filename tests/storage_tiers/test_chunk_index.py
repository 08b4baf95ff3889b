"""The columnar index against a model of dictionaries, and what each of its promises is for."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage_tiers.base import Chunk, Key
from storage_tiers.chunk_index import PLACE_UNIT, ChunkIndex
from storage_tiers.leaves import NONE
from storage_tiers.policy import EvictionPolicy, LruPolicy, S3FifoPolicy
from storage_tiers.testing import make_key
from storage_tiers.value import ValuePolicy

POLICIES = [LruPolicy, S3FifoPolicy, ValuePolicy]
NUMBERS = st.integers(0, 60)


def key_of(number: int) -> Key:
    """Keys whose homes crowd at the table's end, so that entries run into each other and wrap."""
    low = 0xFFFF_FFFF_FFFF_FFF0 + number % 13
    return Key(low.to_bytes(8, "little") + number.to_bytes(8, "little"))


def chunk_of(number: int) -> Chunk:
    """Three chains of chunks: 0, 3, 6, ... follow each other, and so on."""
    parent = key_of(number - 3) if number >= 3 else None
    return Chunk(key_of(number), 4096 + number, number * 7, parent, number // 3)


@dataclass
class Held:
    """A record that somebody holds, and the chunk it stands for."""

    record: int
    chunk: Chunk


class IndexMachine(RuleBasedStateMachine):
    """Chunks come and go in any order, held or not."""

    policy: type[EvictionPolicy] = LruPolicy

    def __init__(self) -> None:
        super().__init__()
        self.freed: list[int] = []
        self.clock_s = 100.0
        self.index = ChunkIndex(self.policy(), self.freed.append, now_s=lambda: self.clock_s)
        self.places: dict[int, int] = {}  # number -> place
        self.held: list[Held] = []
        self.next_place = 0
        self.owed: Counter[int] = Counter()  # places of chunks that left while held

    @rule(number=NUMBERS)
    def add(self, number: int) -> None:
        if number in self.places:
            return
        self.next_place += PLACE_UNIT
        self.places[number] = self.next_place
        record = self.index.add(chunk_of(number), self.next_place, tag=number)
        assert self.index.chunk(record) == chunk_of(number)
        assert self.index.place(record) == self.next_place

    @rule(numbers=st.sets(NUMBERS, max_size=20))
    def remove(self, numbers: set[int]) -> None:
        gone = numbers & self.places.keys()
        records = self.index.records([key_of(number) for number in gone]).tolist()
        self.freed.clear()
        self.index.remove_all(records)
        expected = []
        for number, record in zip(gone, records, strict=True):
            place = self.places.pop(number)
            if any(each.record == record for each in self.held):
                self.owed[place] += 1
            else:
                expected.append(place)
        assert sorted(self.freed) == sorted(expected)

    @rule(numbers=st.lists(NUMBERS, max_size=10))
    def touch(self, numbers: list[int]) -> None:
        self.clock_s += 1
        self.index.touch([key_of(number) for number in numbers])

    @rule(seconds=st.integers(-50, 50))
    def the_clock_is_set(self, seconds: int) -> None:
        self.clock_s += seconds

    @rule(numbers=st.sets(NUMBERS, max_size=10), at_once=st.booleans())
    def pin(self, numbers: set[int], at_once: bool) -> None:
        keys = [key_of(number) for number in numbers & self.places.keys()]
        records = self.index.records(keys)
        if at_once:
            self.index.pin_all(records)
        else:
            for record in records.tolist():
                self.index.pin(record)
        chunks = self.index.find(keys)
        for record, chunk in zip(records.tolist(), chunks, strict=True):
            assert chunk is not None
            self.held.append(Held(record, chunk))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), at_once=st.booleans())
    def unpin(self, data: st.DataObject, at_once: bool) -> None:
        each = data.draw(st.sampled_from(self.held))
        self.held.remove(each)
        assert self.index.chunk(each.record) == each.chunk, "a held record stands for its chunk"
        place = self.index.place(each.record)
        self.freed.clear()
        if at_once:
            self.index.unpin_all(np.array([each.record]))
        else:
            self.index.unpin(each.record)
        if self.owed[place] and not any(other.record == each.record for other in self.held):
            assert self.freed == [place]
            del self.owed[place]
        else:
            assert not self.freed

    @precondition(lambda self: self.places)
    @rule()
    def evict(self) -> None:
        record = next(self.index.evictable(), NONE)
        held = {each.record for each in self.held}
        if record == NONE:
            assert held, "something can go where nothing is held"
            return
        assert record not in held
        self.places.pop(self.index.tag(record))
        self.index.remove(record)

    @invariant()
    def it_knows_what_the_model_knows(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len(self.places)
        keys = [key_of(number) for number in range(64)]
        expected = [chunk_of(n) if n in self.places else None for n in range(64)]
        assert self.index.find(keys) == expected
        assert [found and self.index.find([found.key])[0] for found in expected] == expected
        assert set(self.index.all_keys()) == {key_of(number) for number in self.places}
        records = self.index.records([key_of(number) for number in self.places])
        places, lengths, tags = self.index.rows(records)
        assert places.tolist() == list(self.places.values())
        assert lengths.tolist() == [4096 + number for number in self.places]
        assert tags.tolist() == list(self.places)


class ValueIndexMachine(IndexMachine):
    policy = ValuePolicy


class FifoIndexMachine(IndexMachine):
    policy = S3FifoPolicy


TestLruIndex = IndexMachine.TestCase
TestValueIndex = ValueIndexMachine.TestCase
TestFifoIndex = FifoIndexMachine.TestCase
for case in (TestLruIndex, TestValueIndex, TestFifoIndex):
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def many(count: int, *, chained: bool = True) -> list[Chunk]:
    keys = [make_key(f"many{number}") for number in range(count)]
    return [
        Chunk(key, 4096, number, keys[number - 1] if chained and number else None, number)
        for number, key in enumerate(keys)
    ]


def test_it_grows_and_shrinks_without_losing_anything() -> None:
    """Growing places all entries anew at once; random removal leaves gaps to close."""
    index = ChunkIndex(LruPolicy(), lambda _: None)
    chunks = many(5000)
    for number, chunk in enumerate(chunks):
        index.add(chunk, number * PLACE_UNIT)
    keys = [chunk.key for chunk in chunks]
    assert index.find(keys) == chunks
    index.check_integrity()
    gone = random.Random(5).sample(range(5000), 4000)
    index.remove_all(index.records([keys[number] for number in gone]).tolist())
    left = set(range(5000)) - set(gone)
    assert [n for n, chunk in enumerate(index.find(keys)) if chunk is not None] == sorted(left)
    index.check_integrity()


def test_growing_with_entries_that_go_round_the_table_keeps_them_in_reach() -> None:
    index = ChunkIndex(LruPolicy(), lambda _: None)
    keys = [Key(b"\xff" * 8 + number.to_bytes(8, "little")) for number in range(1, 1100)]
    for key in keys:
        index.add(Chunk(key, 4096, 0, None, 0), 0)
    assert len(index) == 1099 and all(key in index for key in keys)
    index.check_integrity()


def test_a_row_a_resident_is_all_it_costs() -> None:
    """At a million chunks 128 bytes each are the daemon's budget; the policy takes a quarter."""
    index = ChunkIndex(LruPolicy(), lambda _: None)
    columns = (index._words, index._flags, index._table)
    assert sum(column.nbytes for column in columns) / len(index._flags) <= 73


@pytest.mark.parametrize("make", POLICIES)
def test_a_restored_index_evicts_in_the_order_of_use(make: type[EvictionPolicy]) -> None:
    """A parent counts as used when its last descendant was, whenever its own use was recorded."""
    index = ChunkIndex(make(), lambda _: None, now_s=lambda: 1000.0)
    old, new = many(3), [Chunk(make_key(f"new{n}"), 4096, 0, None, 0) for n in range(3)]
    # The chain's root was recorded first, its leaf last.
    order = [old[0], new[0], new[1], old[1], new[2], old[2]]
    index.restore(
        [(chunk, number * PLACE_UNIT, 0) for number, chunk in enumerate(order)],
        [float(number) for number in range(6)],
    )
    index.check_integrity()
    left: list[Key] = []
    while len(index):
        record = next(index.evictable())
        left.append(index.key(record))
        index.remove(record)
        index.check_integrity()
    chain = [left.index(chunk.key) for chunk in old]
    assert chain == sorted(chain, reverse=True), "leaves go before their parents"
    if make is not ValuePolicy:
        singles = [left.index(chunk.key) for chunk in new]
        assert singles == sorted(singles)
    if make is LruPolicy:
        assert left[:2] == [new[0].key, new[1].key] and left[-1] == old[0].key


def test_children_that_stay_when_many_leave_can_still_go() -> None:
    """Clearing a slab takes chunks out of the middle of sequences."""
    index = ChunkIndex(LruPolicy(), lambda _: None)
    chunks = many(30)
    for chunk in chunks:
        index.add(chunk, 0)
    index.remove_all(index.records([chunk.key for chunk in chunks[5:20:3]]).tolist())
    index.check_integrity()
    while len(index):
        index.remove(next(index.evictable()))
    index.check_integrity()


def test_marks_are_taken_once_and_leave_with_their_chunk() -> None:
    index = ChunkIndex(LruPolicy(), lambda _: None)
    records = [index.add(chunk, 0) for chunk in many(5, chained=False)]
    for record in records:
        index.mark(record)
        index.mark(record)
    index.remove(records[0])
    assert index.marked == 4
    assert index.take_marked(3) == records[1:4]
    assert index.take_marked(3) == records[4:]
    assert index.marked == 0 and index.take_marked(3) == []
