"""What each eviction and admission policy is for, and what all of them promise."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.policy import bound, fingerprint, replay, synthetic
from storage_tiers.admission import (
    AGES,
    SLOTS_MIN,
    AdmitAll,
    AdmitSeenTwice,
    AdmitValue,
    Ghosts,
    Survival,
    class_of,
    gittins,
)
from storage_tiers.leaves import NONE
from storage_tiers.policy import EvictionPolicy, LruPolicy, S3FifoPolicy, ValuePolicy

ALL = [LruPolicy, S3FifoPolicy, ValuePolicy]
every_policy = pytest.mark.parametrize("make", ALL)


class Cache:
    """An index as small as can be: records by block, room in bytes, sequences of blocks."""

    def __init__(self, policy: EvictionPolicy, room_bytes: int) -> None:
        self.policy = policy
        self.room_bytes = room_bytes
        self.record: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self.parent: dict[int, int | None] = {}
        self.left: list[int] = []
        self.free: list[int] = []
        self.used_bytes = 0

    def use(self, blocks: list[int], now_s: float, size: int = 1, cost_s: float = 1.0) -> int:
        """How many of these were here. The rest arrives, evicting what must go."""
        depth = 0
        while depth < len(blocks) and blocks[depth] in self.record:
            depth += 1
        for block in reversed(blocks[:depth]):
            self.policy.hit(self.record[block], fingerprint(block), now_s)
        for index in range(depth, len(blocks)):
            pinned = set(blocks[:index])
            while self.used_bytes + size > self.room_bytes:
                self.evict(pinned)
            block, above = blocks[index], blocks[index - 1] if index else None
            record = self.free.pop() if self.free else len(self.record)
            self.record[block], self.size[block], self.parent[block] = record, size, above
            self.used_bytes += size
            self.policy.inserted(
                record,
                fingerprint(block),
                now_s,
                parent=NONE if above is None else self.record[above],
                cost_s=cost_s,
                size_bytes=size,
            )
        return depth

    def evict(self, pinned: set[int]) -> None:
        block_of = {record: block for block, record in self.record.items()}
        for record in self.policy.victims():
            block = block_of[record]
            assert self.record.keys().isdisjoint(self.children_of(block)), "a parent goes first"
            if block not in pinned:
                self.remove(block)
                return
        raise AssertionError("nothing can go")

    def children_of(self, block: int) -> set[int]:
        return {child for child, above in self.parent.items() if above == block}

    def remove(self, block: int) -> None:
        record = self.record.pop(block)
        self.used_bytes -= self.size.pop(block)
        del self.parent[block]
        self.free.append(record)
        self.policy.removed(record, fingerprint(block))
        self.left.append(block)


@every_policy
def test_no_policy_evicts_a_parent_or_a_pinned_chunk_whatever_happens(
    make: Callable[[], EvictionPolicy],
) -> None:
    dice = random.Random(7)
    cache = Cache(make(), 60)
    paths = [[p * 100 + i if i > 2 else p % 4 * 100 + i for i in range(9)] for p in range(40)]
    for step in range(1500):
        path = paths[min(int(dice.expovariate(0.1)), 39)]
        cache.use(path[: dice.randint(1, 9)], step * 0.7, size=dice.randint(1, 3))
        if step % 50 == 0:
            leaves = [b for b in cache.record if b not in cache.parent.values()]
            cache.remove(dice.choice(leaves))
        assert sum(cache.size.values()) <= 60
        if step % 100 == 0:
            cache.policy.check_integrity()
    cache.policy.check_integrity()


@every_policy
def test_a_walk_passes_over_pinned_chunks_and_offers_each_other_leaf_once(
    make: Callable[[], EvictionPolicy],
) -> None:
    policy = make()
    for record in range(30):
        parent = record - 1 if record % 3 else NONE
        policy.inserted(
            record, fingerprint(record), record, parent=parent, cost_s=1.0, size_bytes=1
        )
    assert sorted(policy.victims()) == list(range(2, 30, 3))
    gone = []
    for record in policy.victims():
        if record not in (2, 14):
            policy.removed(record, fingerprint(record))
            gone.append(record)
    policy.check_integrity()
    assert 2 not in gone and 14 not in gone and len(set(gone)) == len(gone) >= 8


@every_policy
def test_a_chunk_that_is_removed_from_the_middle_leaves_its_children_without_a_parent(
    make: Callable[[], EvictionPolicy],
) -> None:
    policy = make()
    for record, parent in enumerate((NONE, 0, 1)):
        policy.inserted(record, fingerprint(record), 0.0, parent=parent, cost_s=1.0, size_bytes=1)
    policy.removed(1, fingerprint(1))
    policy.inserted(1, fingerprint(9), 1.0, parent=NONE, cost_s=1.0, size_bytes=1)
    policy.removed(2, fingerprint(2))
    policy.check_integrity()
    assert set(policy.victims()) == {0, 1}


@every_policy
def test_the_same_calls_give_the_same_victims(make: Callable[[], EvictionPolicy]) -> None:
    requests = synthetic()["chats"][:1500]
    assert replay(requests, 500, make()) == replay(requests, 500, make())


def test_lru_evicts_what_was_used_longest_ago_and_its_tail_first() -> None:
    cache = Cache(LruPolicy(), 6)
    cache.use([1, 2, 3], 0.0)
    cache.use([11, 12, 13], 1.0)
    cache.use([1, 2, 3], 2.0)
    cache.use([21, 22], 3.0)
    assert cache.left == [13, 12]


def test_a_scan_flushes_lru_but_neither_s3_fifo_nor_value() -> None:
    """Twenty conversations return every minute; between their visits a scan fills the cache."""

    def found(policy: EvictionPolicy) -> int:
        cache = Cache(policy, 200)
        hits = 0
        fresh = 100_000
        for minute in range(30):
            for talk in range(20):
                hits += cache.use([talk * 10 + i for i in range(5)], minute * 60.0)
            for second in range(5, 55, 2):
                cache.use(list(range(fresh, fresh + 10)), minute * 60.0 + second)
                fresh += 10
        return hits

    assert found(LruPolicy()) == 0
    assert found(S3FifoPolicy()) > 1000
    assert found(ValuePolicy()) > 1000


def test_value_keeps_the_chunk_that_takes_longer_to_compute_per_byte() -> None:
    cache = Cache(ValuePolicy(), 4)
    cache.use([1], 0.0, cost_s=8.0)
    cache.use([2], 1.0, cost_s=1.0)
    cache.use([3], 2.0, size=2, cost_s=8.0)  # twice the bytes, half of the first one's value
    cache.use([4], 3.0, cost_s=1.0)
    cache.use([5], 4.0, cost_s=8.0)
    assert cache.left == [2, 4]


def test_value_learns_that_conversations_which_went_on_will_go_on() -> None:
    requests = synthetic()["chats"]
    lru, value = replay(requests, 1000, LruPolicy()), replay(requests, 1000, ValuePolicy())
    assert lru < value < bound(requests, 1000)


def test_seen_twice_stores_one_hit_chunks_never_and_repeated_ones_at_once() -> None:
    admission = AdmitSeenTwice(4096)

    def admits(key: int) -> bool:
        return admission.admits(key, 0.0, parent=NONE, cost_s=1.0, size_bytes=1, full=False)

    assert not any(admits(fingerprint(block)) for block in range(100))
    assert sum(admits(fingerprint(block)) for block in range(100)) > 90


def test_what_seen_twice_remembers_is_bounded() -> None:
    ghosts = Ghosts()
    ghosts.fit_to(1000)
    assert len(ghosts) == 512
    for block in range(100_000):
        ghosts.add(fingerprint(block))
    assert sum(fingerprint(block) in ghosts for block in range(100_000)) <= 512


def test_all_admits_all() -> None:
    assert AdmitAll().admits(1, 0.0, parent=NONE, cost_s=0.0, size_bytes=1, full=True)


def test_value_admission_refuses_what_is_worth_less_than_what_would_go() -> None:
    policy = ValuePolicy()
    cache = Cache(policy, 10)
    for block in range(10):
        cache.use([block], 0.0, cost_s=4.0)
    admission = AdmitValue(policy)

    def admits(cost_s: float, *, full: bool = True) -> bool:
        return admission.admits(99, 1.0, parent=NONE, cost_s=cost_s, size_bytes=1, full=full)

    assert admits(8.0) and not admits(0.5)
    assert admits(0.5, full=False), "where there is room nothing has to go"


def test_survival_learns_which_class_comes_back_and_when() -> None:
    survival = Survival()
    returns, leaves = class_of(3, 1, 0), class_of(1, 40, 0)
    for number in range(20_000):
        key = fingerprint(number)
        survival.probe(key, number, returns if number % 2 else leaves)
        if number % 2 and number > 60:
            survival.seen(fingerprint(number - 60), number)
    worth = np.array(survival.worth).reshape(-1, AGES)
    assert worth[returns, 0] > 3 * worth[leaves, 0]
    assert worth[returns].argmax() > 4, "it is worth most shortly before it is due"


def test_probes_are_never_more_than_the_residents() -> None:
    survival = Survival()
    for residents in range(0, 10_000, 256):
        survival.fit_to(residents)
        assert len(survival) <= max(SLOTS_MIN, residents)


def test_giving_up_late_pays_only_where_reuse_is_late() -> None:
    """By hand: a class that is reused in its third interval for certain, and one never."""
    reuse = np.zeros((2, AGES))
    reuse[0, 2] = 1.0
    rate = gittins(reuse)
    edges = np.exp2(np.arange(AGES + 1) / 2)
    widths = np.diff(edges)
    assert rate[0, 0] == pytest.approx(1 / (widths[0] + widths[1] + widths[2] / 2))
    assert rate[0, 2] == pytest.approx(1 / (widths[2] / 2))
    assert not rate[1].any()


def test_state_is_at_most_24_bytes_a_resident_besides_the_heads_of_rings() -> None:
    policy = ValuePolicy()
    for record in range(10_000):
        policy.inserted(record, fingerprint(record), 0.0, parent=NONE, cost_s=1.0, size_bytes=1)
    assert policy.state_bytes() / len(policy._parent) <= 24
