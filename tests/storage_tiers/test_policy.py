"""What each eviction and admission policy is for, and what all of them promise."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from benchmarks.policy import AdmitAll, bound, fingerprint, replay, replay_admitted
from benchmarks.workloads import synthetic
from storage_tiers.admission import AdmitSeenTwice, AdmitValue, Ghosts
from storage_tiers.leaves import NONE
from storage_tiers.policy import EvictionPolicy, LruPolicy, S3FifoPolicy
from storage_tiers.value import ValuePolicy

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


def test_value_keeps_what_many_requests_begin_with_and_not_what_one_of_them_added() -> None:
    """Thirty prompts, some more popular, each followed by a question that is asked once."""

    def found(policy: EvictionPolicy) -> int:
        cache = Cache(policy, 120)
        dice = random.Random(3)
        hits = 0
        for step in range(600):
            number = min(int(dice.expovariate(0.2)), 29)
            prompt = [-1 - number * 10 - i for i in range(8)]
            hits += cache.use([*prompt, *range(step * 20, step * 20 + 20)], step * 10.0)
        return hits

    assert found(ValuePolicy()) > 1.5 * found(LruPolicy()) > 0


def test_value_lets_go_of_a_loop_that_stopped_before_a_person_who_thinks() -> None:
    """Both have the same turns and growth; only the pauses before their last turns differ.

    Loops that paused for a moment go on within a moment or never, people within minutes.
    """
    policy = ValuePolicy()
    cache = Cache(policy, 100_000)
    events: list[tuple[float, list[int]]] = []
    for session in range(400):
        pause_s = 3.0 if session % 2 else 120.0
        for turn in range(6):
            blocks = [session * 100 + i for i in range(4 * turn + 4)]
            events.append((session * 20.0 + turn * pause_s, blocks))
    end_s = 8100.0
    for at_s, blocks in sorted(events):
        cache.use(blocks, at_s)
    for session, pauses in ((900, (60, 57, 54, 51)), (901, (420, 300, 180, 60))):
        for turn, before_s in enumerate(pauses):
            events.append((end_s - before_s, [session * 100 + i for i in range(4 * turn + 4)]))
    for at_s, blocks in sorted(events[-8:]):
        cache.use(blocks, at_s)
    cache.use([7], end_s)
    leaves = {90_015: "loop", 90_115: "person"}
    block_of = {record: block for block, record in cache.record.items()}
    order = [block_of[record] for record in policy.victims() if block_of[record] in leaves]
    assert [leaves[block] for block in order] == ["loop", "person"]


def test_admissions_spare_writes_and_value_costs_fewer_hits_than_seen_twice() -> None:
    requests = synthetic()["chats+scans"][:1200]
    everything = replay_admitted(requests, 1000, ValuePolicy(), AdmitAll())
    seen = replay_admitted(requests, 1000, ValuePolicy(), AdmitSeenTwice(1 << 16))
    policy = ValuePolicy()
    value = replay_admitted(requests, 1000, policy, AdmitValue(policy))
    assert seen.written < everything.written and value.written < everything.written
    assert value.found > seen.found


@pytest.mark.parametrize("deepest_first", [True, False])
def test_spans_stay_whole_when_paths_are_used_in_part_and_chunks_leave_amid_them(
    deepest_first: bool,
) -> None:
    dice = random.Random(11)
    policy = ValuePolicy()
    path_of: dict[int, list[int]] = {}  # resident record -> records from the root to it
    for step in range(2000):
        now_s = step * 0.4
        path = list(dice.choice(list(path_of.values()))) if path_of and step % 5 else []
        used = path[dice.randint(0, len(path)) :] if step % 3 else path
        for record in reversed(used) if deepest_first else used:
            policy.hit(record, fingerprint(record), now_s)
        for _ in range(dice.randint(0, 4)):
            record = next(r for r in range(500) if r not in path_of)
            policy.inserted(
                record,
                fingerprint(record),
                now_s,
                parent=path[-1] if path else NONE,
                cost_s=1.0,
                size_bytes=1,
            )
            path = [*path, record]
            path_of[record] = path
        for _ in range(dice.randint(0, 4)):
            if not path_of:
                break
            gone = dice.choice(list(path_of)) if step % 4 else next(policy.victims())
            if step % 7 == 0:
                policy.detach([gone])
            policy.removed(gone, fingerprint(gone))
            del path_of[gone]
            for record, above in path_of.items():
                if gone in above:
                    path_of[record] = above[above.index(gone) + 1 :]
        policy.check_integrity()
    for record in policy.victims():
        policy.removed(record, fingerprint(record))
        policy.check_integrity()
    assert not len(policy)


def test_state_is_at_most_24_bytes_a_resident_where_a_request_adds_three_chunks() -> None:
    policy = ValuePolicy()
    for record in range(9999):
        parent = record - 1 if record % 3 else NONE
        policy.inserted(record, fingerprint(record), 0.0, parent=parent, cost_s=1.0, size_bytes=1)
    assert policy.state_bytes() / len(policy) <= 24
