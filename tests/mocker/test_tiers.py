"""Simulated tiers: what they keep, what they tell, and how long loads from them take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mocker.content import Chain, TraceContent
from mocker.engine import Engine
from mocker.events import BlockEvent, BlocksRemoved, BlocksStored
from mocker.tiers import Found, Link, LruTier, NodeTiers
from mocker.timing import PS_PER_S, LinkTiming, TierTiming
from tests.mocker.builders import BLOCK, TIMING, ended, request, settings, times

TIERS = TierTiming(
    g2=LinkTiming(PS_PER_S, 5),  # a byte a picosecond
    g3=LinkTiming(PS_PER_S // 10, 50),
    g4=LinkTiming(PS_PER_S // 100, 500),
)


def chain(*ids: int) -> Chain:
    made = Chain(TraceContent(ids, 1, len(ids), 0))
    made.extend(len(ids))
    return made


def node(g2: int = 0, g3: int = 0, g4: int = 0) -> tuple[NodeTiers, list[BlockEvent]]:
    events: list[BlockEvent] = []
    tiers = NodeTiers(
        0,
        TIERS,
        LruTier("G2", g2) if g2 else None,
        LruTier("G3", g3) if g3 else None,
        LruTier("G4", g4) if g4 else None,
        events.append,
    )
    return tiers, events


def kept_by_events(events: list[BlockEvent], tier: str) -> set[int]:
    kept: set[int] = set()
    for event in events:
        if event.tier != tier:
            continue
        if isinstance(event, BlocksStored):
            assert not kept & set(event.block_hashes)
            kept |= set(event.block_hashes)
        else:
            assert kept >= set(event.block_hashes)
            kept -= set(event.block_hashes)
    return kept


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=30), st.integers(1, 6)
)
def test_events_tell_exactly_what_a_tier_keeps(runs: list[list[int]], capacity: int) -> None:
    tiers, events = node(g2=capacity)
    everything: set[int] = set()
    for run in runs:
        sequence = chain(*run)
        everything |= set(sequence.hashes)
        tiers.store(0, 0, sequence, 0, len(run))
        tiers.check_integrity()
        assert tiers.g2 is not None
        assert kept_by_events(events, "G2") == {h for h in everything if h in tiers.g2}


def test_the_end_of_a_sequence_leaves_a_tier_before_its_beginning() -> None:
    tiers, events = node(g2=3)
    old, new = chain(1, 2, 3), chain(7)
    tiers.store(0, 0, old, 0, 3)
    tiers.store(9, 1, new, 0, 1)
    assert events[1:] == [
        BlocksRemoved(9, 1, 0, "G2", old.hashes[2:]),
        BlocksStored(9, 1, 0, "G2", None, new.hashes, new.locals),
    ]


def test_stored_events_name_the_parent_of_each_run() -> None:
    tiers, events = node(g2=9)
    sequence = chain(1, 2, 3, 4)
    tiers.store(0, 0, sequence, 1, 2)
    tiers.store(0, 0, sequence, 0, 4)
    runs = [(e.parent_hash, list(e.tokens_hashes)) for e in events if isinstance(e, BlocksStored)]
    hashes, local = sequence.hashes, sequence.locals
    assert runs == [(hashes[0], local[1:2]), (None, local[:1]), (hashes[1], local[2:])]


def test_a_lookup_takes_each_block_from_the_nearest_tier_up_to_the_first_gap() -> None:
    tiers, _ = node(g2=9, g3=9)
    sequence = chain(1, 2, 3, 4, 5)
    assert tiers.g2 is not None and tiers.g3 is not None
    tiers.g3.store(sequence.hashes[:3])
    tiers.g2.store([sequence.hashes[0], sequence.hashes[4]])
    assert tiers.find(sequence.hashes, 0, 5) == [Found("G2", 1), Found("G3", 2)]
    assert tiers.find(sequence.hashes, 3, 5) == []


def test_loads_on_one_link_follow_one_another_and_latencies_overlap() -> None:
    bus = Link(TIERS.g2)
    assert bus.load(100, 30) == 135
    assert bus.load(110, 10) == 145
    assert bus.load(1000, 10) == 1015


def test_a_prefix_in_host_memory_is_loaded_and_the_rest_computed() -> None:
    tiers, events = node(g2=32)
    first = Engine(settings(), index=0, tiers=tiers)
    second = Engine(settings(), index=1, tiers=tiers, emit=events.append)
    ended(first, [request(1, [1, 2, 3], 1)])
    record = ended(second, [request(2, [1, 2, 3, 9], 1)], now_ps=5000)[2]
    load_ps = 3 * BLOCK + 5
    assert times(record) == [5000 + load_ps + TIMING.prefill_ps(BLOCK, 3 * BLOCK)]
    assert record.cached_tokens == {"G1": 0, "G2": 3 * BLOCK}
    told = [e for e in events if e.tier == "G1" and isinstance(e, BlocksStored)]
    assert [(e.at_ps, len(e.block_hashes)) for e in told] == [(5017, 3), (times(record)[0], 1)]


def test_others_go_on_while_one_loads() -> None:
    tiers, _ = node(g4=32)
    ended(Engine(settings(), tiers=tiers), [request(1, [1, 2, 3], 1)])
    engine = Engine(settings(), index=1, tiers=tiers)
    records = ended(engine, [request(2, [1, 2, 3, 4], 1), request(3, [7], 4)], now_ps=0)
    load_end_ps = 3 * BLOCK * 100 + 500
    assert times(records[3])[-1] < load_end_ps
    assert times(records[2]) == [load_end_ps + TIMING.prefill_ps(BLOCK, 3 * BLOCK)]


def test_what_came_from_a_lower_tier_is_in_host_memory_afterwards() -> None:
    tiers, _ = node(g2=32, g3=32)
    sequence = chain(1, 2)
    assert tiers.g2 is not None and tiers.g3 is not None
    tiers.g3.store(sequence.hashes)
    record = ended(Engine(settings(), tiers=tiers), [request(1, [1, 2, 3], 1)])[1]
    assert record.cached_tokens == {"G1": 0, "G3": 2 * BLOCK}
    assert all(block_hash in tiers.g2 for block_hash in sequence.hashes)


def test_a_cancelled_load_frees_its_blocks() -> None:
    tiers, _ = node(g4=32)
    ended(Engine(settings(), tiers=tiers), [request(1, [1, 2, 3], 1)])
    engine = Engine(settings(), index=1, tiers=tiers)
    engine.submit(request(2, [1, 2, 3, 4], 1), 0)
    assert engine.start(0) is None
    assert engine.pool.used_count == 3
    assert engine.cancel(2, 1)
    assert engine.pool.used_count == 0
    assert engine.wake_ps is None
    engine.check_integrity()
