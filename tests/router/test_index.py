"""The index at its edges: bounds, snapshots that are none, memory, many workers."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from router.index import Index, Outcome, Tier, WorkerId
from router.index_snapshot import SnapshotError
from runtime.hashing import sequence_hashes

ONE = WorkerId(1)


def words(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def full_index() -> Index:
    """Two workers with clashing names, two tiers, one hole."""
    index = Index(1000)
    tokens = words(30)
    index.stored(ONE, Tier.G1, None, np.arange(30, dtype=np.uint64), tokens)
    index.stored(WorkerId(2), Tier.G1, None, np.arange(5, 25, dtype=np.uint64), tokens[:20])
    index.stored(WorkerId(2), Tier.G2, 24, np.arange(25, 30, dtype=np.uint64), tokens[20:25])
    index.removed(ONE, Tier.G1, np.array([7], dtype=np.uint64))
    return index


def test_lower_tiers_go_on_where_better_ones_end() -> None:
    reach = full_index().find(words(30)).reach
    assert reach[:, 0].tolist() == [7, 7, 7, 7]
    assert reach[:, 1].tolist() == [20, 25, 25, 25]


def test_a_full_index_keeps_what_it_has_and_says_so() -> None:
    index = Index(100)
    names, tokens = words(150), words(150, 2)
    assert index.stored(ONE, Tier.G1, None, names, tokens) is Outcome.CAPACITY
    assert index.stored(ONE, Tier.G2, None, names[:100], tokens[:100]) is Outcome.DONE
    assert index.stored(WorkerId(2), Tier.G1, None, names[1:2], tokens[:1]) is Outcome.CAPACITY
    assert index.outcomes_total[Outcome.CAPACITY] == 2
    assert len(index) == index.find(tokens).reach[Tier.G1, 0] == 100
    index.check_integrity()
    index.removed(ONE, Tier.G1, names[50:100])
    index.removed(ONE, Tier.G2, names[50:100])
    assert index.stored(ONE, Tier.G1, int(names[49]), names[50:], tokens[50:]) is Outcome.CAPACITY
    assert index.find(tokens).reach[Tier.G1, 0] == 100


def test_what_cannot_be_applied_is_counted() -> None:
    index = Index(100)
    names = words(4)
    assert index.stored(ONE, Tier.G1, 5, names, names) is Outcome.PARENT_NOT_FOUND
    assert index.stored(ONE, Tier.G1, None, names, names[:3]) is Outcome.MALFORMED
    assert index.removed(ONE, Tier.G1, names) is Outcome.BLOCK_NOT_FOUND
    assert index.cleared(WorkerId(9)) is index.remove_worker(WorkerId(9)) is Outcome.DONE
    assert {o: n for o, n in index.outcomes_total.items() if n} == {
        Outcome.PARENT_NOT_FOUND: 1,
        Outcome.MALFORMED: 1,
        Outcome.BLOCK_NOT_FOUND: 1,
        Outcome.DONE: 2,
    }


def test_more_workers_than_there_is_room_for_are_refused() -> None:
    index = Index(5000, workers_max=300)
    tokens = words(3)
    for number in range(300):
        assert index.stored(WorkerId(number), Tier.G1, None, tokens, tokens) is Outcome.DONE
    assert index.stored(WorkerId(300), Tier.G1, None, tokens, tokens) is Outcome.WORKERS
    index.remove_worker(WorkerId(7))
    assert index.stored(WorkerId(300), Tier.G1, None, tokens[:2], tokens[:2]) is Outcome.DONE
    matches = index.find(tokens)
    assert matches.workers[7] == WorkerId(300)
    assert matches.reach[Tier.G1].tolist() == [3] * 7 + [2] + [3] * 292
    index.check_integrity()


def test_memory_goes_back_when_blocks_go() -> None:
    index = Index(1 << 20)
    empty_bytes = index.allocated_bytes
    names, tokens = words(200_000), words(200_000, 2)
    index.stored(ONE, Tier.G1, None, names, tokens)
    index.stored(WorkerId(2), Tier.G1, None, names[1:] ^ np.uint64(1), tokens[1:])
    assert index.allocated_bytes > 100 * empty_bytes
    for first in range(0, 200_000, 1000):
        index.removed(ONE, Tier.G1, names[first : first + 1000])
    index.cleared(WorkerId(2))
    assert len(index) == 0
    assert any(not index.upkeep() for _ in range(10_000))
    assert index.allocated_bytes < 2 * empty_bytes
    index.check_integrity()


def test_arrays_that_are_read_only_are_taken() -> None:
    index = Index(100)
    frozen = np.frombuffer(words(8).tobytes(), dtype=np.uint64)
    assert index.stored(ONE, Tier.G1, None, frozen, frozen) is Outcome.DONE
    assert index.find(frozen).reach[Tier.G1, 0] == 8
    assert index.removed(ONE, Tier.G1, frozen) is Outcome.DONE


def test_a_search_of_nothing_finds_nothing() -> None:
    assert Index(10).find(words(0)).reach.shape == (len(Tier), 0)
    assert full_index().find(words(0)).reach.tolist() == [[0, 0]] * len(Tier)


def test_a_snapshot_does_not_fit_into_less() -> None:
    snapshot = full_index().snapshot()
    small = Index(20)
    small.stored(ONE, Tier.G1, None, words(3), words(3))
    with pytest.raises(SnapshotError):
        small.restore(snapshot)
    with pytest.raises(SnapshotError):
        Index(1000, workers_max=1).restore(snapshot)
    assert len(small) == small.find(words(3)).reach[Tier.G1, 0] == 3


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_snapshot_is_refused_or_whole(data: st.DataObject) -> None:
    """Bytes changed, or cut, the checksum right or not: nothing held is lost, nothing breaks."""
    good = full_index().snapshot()
    bad = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if bad:
            bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()) and len(bad) > 24:
        bad[16:24] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(bad[24:])))
    index = Index(100)
    index.stored(ONE, Tier.G1, None, words(3), words(3))
    try:
        index.restore(bytes(bad))
    except SnapshotError:
        assert index.find(words(3)).reach[Tier.G1].tolist() == [3]
    index.check_integrity()
    index.remove_worker(ONE)
    index.check_integrity()


@pytest.mark.parametrize("own_names", [False, True])
def test_tables_grow_and_shrink_while_workers_come_and_go(own_names: bool) -> None:
    """Enough blocks that tables have many segments; against a set of what each worker holds."""
    draw = np.random.default_rng(5)
    index = Index(1 << 20)
    tokens = words(200 * 400, 6).reshape(200, 400)
    held: dict[WorkerId, set[int]] = {WorkerId(n): set() for n in range(4)}
    for step in range(240):
        worker, chain = WorkerId(int(draw.integers(4))), int(draw.integers(200))
        names = sequence_hashes(tokens[chain])
        if own_names:
            names ^= np.uint64(worker.instance % 2 + 1)
        if step < 150 or draw.integers(4) == 0:
            assert index.stored(worker, Tier.G2, None, names, tokens[chain]) is Outcome.DONE
            held[worker].add(chain)
        elif step % 30 == 29:
            index.cleared(worker)
            held[worker].clear()
        else:
            chain = min(held[worker], default=chain)
            names = sequence_hashes(tokens[chain])
            if own_names:
                names ^= np.uint64(worker.instance % 2 + 1)
            removed = index.removed(worker, Tier.G2, names)
            assert (removed is Outcome.DONE) == (chain in held[worker])
            held[worker].discard(chain)
        if step % 20 == 0:
            index.check_integrity()
            index.restore(index.snapshot())
        assert len(index) == 400 * len(set().union(*held.values()))
    for chain in range(200):
        matches = index.find(tokens[chain])
        for lane, one in enumerate(matches.workers):
            expected = 400 if one is not None and chain in held[one] else 0
            assert matches.reach[Tier.G2, lane] == expected
    for worker in held:
        index.remove_worker(worker)
    assert any(not index.upkeep() for _ in range(10_000))
    assert len(index) == 0 and index.allocated_bytes < 1 << 18
    index.check_integrity()
