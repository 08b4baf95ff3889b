"""The scheduler half: what it answers while, what it hands over when, and what it never does."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from connectors.vllm.options import Options
from connectors.vllm.scheduler_side import KvbmManager
from kvbm.client import Filled, SchedulerClient
from kvbm.protocol import COMING, HERE, MISS, PRESENT, MatchGroup
from tests.connectors.fake_client import (
    FULL,
    LAYOUT,
    SLIDING,
    FakeClient,
    Scheduler,
    chain,
)

A = chain("a", 4)
WINDOW = chain("a", 2, SLIDING)


@pytest.fixture
def a(scheduler: Scheduler) -> ReqContext:
    """Request `a` has arrived with its six chunks."""
    return scheduler.request("a", A, WINDOW)


def answers(scheduler: Scheduler, context: ReqContext) -> list[LookupResult]:
    return [scheduler.manager.lookup(key, context) for key in [*A, *WINDOW]]


def test_the_fake_client_has_the_real_ones_methods() -> None:
    def shape(cls: type[Any], name: str) -> list[tuple[str, Any]]:
        member = inspect.getattr_static(cls, name)
        if isinstance(member, property):
            return []
        return [(p.name, p.kind) for p in inspect.signature(member).parameters.values()]

    public = [name for name in vars(SchedulerClient) if not name.startswith("_")]
    assert {name: shape(FakeClient, name) for name in public} == {
        name: shape(SchedulerClient, name) for name in public
    }


# -- asking -----------------------------------------------------------------------------


def test_a_request_asks_for_all_its_chunks_in_one_message(
    scheduler: Scheduler, a: ReqContext
) -> None:
    [(groups, lookup)] = scheduler.client.asked
    names = [scheduler.key(key) for key in [*A, *WINDOW]]
    assert groups == [
        MatchGroup(FULL.tokens_per_chunk, FULL.window, b"".join(names[:4])),
        MatchGroup(SLIDING.tokens_per_chunk, SLIDING.window, b"".join(names[4:])),
    ]
    assert lookup.keys == names
    assert scheduler.manager.is_open("a") and not scheduler.manager.is_open("b")


def test_the_first_request_after_the_daemon_came_up_asks_it(idle_scheduler: Scheduler) -> None:
    idle_scheduler.client.come_up()
    idle_scheduler.request("a", A, WINDOW)
    assert idle_scheduler.manager.is_open("a")


def test_asking_anew_closes_the_earlier_ticket(scheduler: Scheduler, a: ReqContext) -> None:
    first = scheduler.last_lookup
    scheduler.manager.open("a", [A, WINDOW[:1]])
    second = scheduler.last_lookup
    assert scheduler.client.open_tickets == {second.ticket} and second is not first
    scheduler.client.answer(first, [HERE] * 6)
    assert scheduler.manager.lookup(A[0], a) is LookupResult.RETRY
    scheduler.client.answer(second, [MISS, HERE, MISS, MISS, HERE])
    assert answers(scheduler, a)[1] is answers(scheduler, a)[4] is LookupResult.HIT
    assert answers(scheduler, a)[5] is LookupResult.MISS, "not asked for this time"


# -- answering --------------------------------------------------------------------------


def test_until_the_daemon_answers_vllm_is_told_to_ask_again(
    scheduler: Scheduler, a: ReqContext
) -> None:
    assert answers(scheduler, a) == [LookupResult.RETRY] * 6
    scheduler.clock.now_s += 1.0  # the deadline itself is still in time
    assert answers(scheduler, a) == [LookupResult.RETRY] * 6
    scheduler.client.answer(scheduler.last_lookup, [HERE, MISS, COMING, PRESENT, HERE, HERE])
    hit, miss, pending = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING
    assert answers(scheduler, a) == [hit, miss, pending, miss, hit, hit]
    assert "deadlines_missed/answer" not in scheduler.counts()


def test_without_an_answer_by_the_deadline_everything_is_a_miss(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.request("b", chain("b", 1), [])
    scheduler.clock.now_s += 1.01
    for _ in range(3):
        assert answers(scheduler, a) == [LookupResult.MISS] * 6
    assert scheduler.client.unanswered == 1, "told once for each request"
    assert scheduler.counts()["deadlines_missed/answer"] == 1


def test_what_comes_is_waited_for_until_its_deadline(scheduler: Scheduler, a: ReqContext) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE, COMING, COMING, MISS, HERE, COMING])
    hit, miss, pending = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING
    assert answers(scheduler, a) == [hit, pending, pending, miss, hit, pending]
    scheduler.clock.now_s += 5.0
    scheduler.client.arrive(scheduler.last_lookup, 1)
    assert answers(scheduler, a) == [hit, hit, pending, miss, hit, pending]
    scheduler.clock.now_s += 0.01
    for _ in range(3):
        assert answers(scheduler, a) == [hit, hit, miss, miss, hit, miss]
    counts = scheduler.counts()
    assert counts["deadlines_missed/onboard"] == 1
    assert "deadlines_missed/answer" not in counts and scheduler.client.unanswered == 0


def test_a_late_answer_is_used_but_what_comes_then_is_not_waited_for(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.clock.now_s += 1.5
    assert scheduler.manager.lookup(A[0], a) is LookupResult.MISS
    scheduler.client.answer(scheduler.last_lookup, [HERE, COMING, MISS, MISS, MISS, MISS])
    assert answers(scheduler, a)[:2] == [LookupResult.HIT, LookupResult.MISS]


def test_a_preempted_request_gets_new_deadlines(scheduler: Scheduler, a: ReqContext) -> None:
    scheduler.clock.now_s += 1.5
    assert scheduler.manager.lookup(A[0], a) is LookupResult.MISS
    scheduler.manager.open("a", [A, WINDOW])
    assert scheduler.manager.lookup(A[0], a) is LookupResult.RETRY
    scheduler.client.answer(scheduler.last_lookup, [COMING] * 6)
    assert scheduler.manager.lookup(A[0], a) is LookupResult.HIT_PENDING


def test_of_what_was_not_asked_for_nothing_is_known(scheduler: Scheduler, a: ReqContext) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE] * 6)
    assert scheduler.manager.lookup(A[0], ReqContext("b")) is LookupResult.MISS
    assert scheduler.manager.lookup(chain("b", 1)[0], a) is LookupResult.MISS
    other_group = chain("a", 1, SLIDING)[0]
    assert scheduler.manager.lookup(other_group, a) is LookupResult.HIT
    scheduler.manager.on_new_request(ReqContext("c"))
    assert scheduler.manager.lookup(A[0], ReqContext("c")) is LookupResult.MISS


def test_without_a_daemon_nothing_is_found_nor_stored_at_once(idle_scheduler: Scheduler) -> None:
    a = idle_scheduler.request("a", A, WINDOW)
    assert answers(idle_scheduler, a) == [LookupResult.MISS] * 6
    assert idle_scheduler.store(a, [*A, *WINDOW])[0] == []
    assert idle_scheduler.counts() == {"connected": 0, "unstored_chunks/no_daemon": 6}


def test_a_daemon_that_goes_takes_its_answers_with_it(scheduler: Scheduler, a: ReqContext) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE] * 6)
    assert answers(scheduler, a) == [LookupResult.HIT] * 6
    scheduler.client.go_away()
    assert answers(scheduler, a) == [LookupResult.MISS] * 6
    assert not scheduler.manager.is_open("a")
    scheduler.client.come_up()
    assert answers(scheduler, a) == [LookupResult.MISS] * 6, "slots of before mean nothing now"
    assert scheduler.store(a, A)[0] == A, "nor is anything known to be kept"


# -- loading ----------------------------------------------------------------------------


def test_a_load_names_the_slots_of_its_chunks(scheduler: Scheduler, a: ReqContext) -> None:
    lookup = scheduler.last_lookup
    scheduler.client.answer(lookup, [HERE] * 6)
    scheduler.client.pump()
    spec = scheduler.manager.prepare_load([A[1], A[2], WINDOW[1]], a)
    slots = [
        slot for place in (1, 2, 5) for slot, _ in [lookup.slot(place) or pytest.fail("not here")]
    ]
    assert spec.offsets == [slot.offset for slot in slots]
    assert spec.generations == [slot.generation for slot in slots]
    assert spec.groups == [0, 0, 1]
    assert (spec.request, spec.epoch, spec.session) == ("a", b"epoch 1         ", 10)
    assert (spec.lengths, spec.rank_offsets) == (LAYOUT.lengths, LAYOUT.rank_offsets)
    assert scheduler.client.open_tickets == {lookup.ticket}, "held until the load is done"
    scheduler.manager.complete_load({A[1], A[2], WINDOW[1]}, a)
    assert not scheduler.client.open_tickets
    assert scheduler.counts() == {"connected": 1, "loaded_chunks/G2": 3}


@pytest.mark.parametrize(
    ("number", "source", "tier"),
    [
        (2, CacheHitSource.HOST, "G2"),
        (3, CacheHitSource.DISK, "G3"),
        (4, CacheHitSource.EXTERNAL_UNSPECIFIED, "G4"),
        (9, CacheHitSource.EXTERNAL_UNSPECIFIED, "unknown"),
    ],
)
def test_vllm_is_told_where_a_hit_came_from(
    scheduler: Scheduler, a: ReqContext, number: int, source: CacheHitSource, tier: str
) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE] + [COMING] * 5, source=number)
    scheduler.client.arrive(scheduler.last_lookup, 1, source=3)
    scheduler.client.pump()
    scheduler.manager.prepare_load(A[:2], a)
    unloaded = CacheHitSource.EXTERNAL_UNSPECIFIED
    assert [scheduler.manager.get_load_source(key, a) for key in A[:3]] == [
        source,
        CacheHitSource.DISK,
        unloaded,
    ]
    assert scheduler.manager.get_load_source(A[0], ReqContext("b")) is unloaded
    scheduler.manager.complete_load(A[:2], a)
    counts = scheduler.counts()
    assert counts[f"loaded_chunks/{tier}"] == (2 if tier == "G3" else 1)
    assert counts["loaded_chunks/G3"] == (2 if tier == "G3" else 1)


def test_a_chunk_lost_before_its_load_is_left_out_so_that_the_worker_fails_it(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE, HERE, MISS, MISS, MISS, MISS])
    scheduler.client.pump()
    assert len(scheduler.manager.prepare_load(A[:3], a).offsets) == 2
    scheduler.client.go_away()
    scheduler.client.pump()
    assert scheduler.manager.prepare_load(A[:2], a).offsets == []
    assert scheduler.manager.prepare_load(A[:2], ReqContext("b")).offsets == []


def test_a_request_whose_load_failed_is_computed_and_stored_again(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE] * 6)
    assert answers(scheduler, a) == [LookupResult.HIT] * 6
    scheduler.manager.prepare_load([*A, *WINDOW], a)
    scheduler.manager.note_worker_results(set(), 0, {"a"})
    assert not scheduler.client.open_tickets
    scheduler.manager.complete_load({*A, *WINDOW}, a)
    assert scheduler.counts() == {"connected": 1, "load_failures": 1}
    assert scheduler.client.loaded == [(0, 1)]
    assert not scheduler.manager.is_open("a")
    scheduler.manager.open("a", [A, WINDOW])
    assert len(scheduler.client.asked) == 1, "what made it fail may be there to stay"
    assert answers(scheduler, a) == [LookupResult.MISS] * 6
    assert scheduler.store(a, A)[0] == A
    assert scheduler.store(a, [*A, *WINDOW])[0] == WINDOW, "but each chunk once"


def test_a_request_named_like_a_finished_one_starts_anew(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.manager.note_worker_results(set(), 0, {"a"})
    scheduler.manager.complete_store(scheduler.store(a, A)[0], a)
    scheduler.manager.on_request_finished(a)
    again = scheduler.request("a", A, WINDOW)
    assert scheduler.manager.lookup(A[0], again) is LookupResult.RETRY
    assert scheduler.store(again, A)[0] == A


def test_each_load_of_a_request_is_counted_by_itself(scheduler: Scheduler, a: ReqContext) -> None:
    """A preempted request loads again when it comes back."""
    for keys in (A[:3], A[3:]):
        scheduler.client.answer(scheduler.last_lookup, [HERE] * 6)
        scheduler.client.pump()
        scheduler.manager.prepare_load(keys, a)
        scheduler.manager.complete_load(set(keys), a)
        assert scheduler.counts()["loaded_chunks/G2"] == len(keys)
        scheduler.manager.open("a", [A, WINDOW])


def test_a_failed_load_of_one_request_leaves_others_alone(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE] * 6)
    scheduler.manager.note_worker_results(set(), 4096, {"gone"})
    assert answers(scheduler, a) == [LookupResult.HIT] * 6
    assert scheduler.client.loaded == [(4096, 1)]
    scheduler.manager.note_worker_results(set(), 0, set())
    assert scheduler.client.loaded == [(4096, 1)], "nothing to report"


@pytest.mark.parametrize("end", ["released", "finished"])
def test_a_request_that_needs_nothing_more_holds_nothing(
    scheduler: Scheduler, a: ReqContext, end: str
) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE] * 6)
    assert answers(scheduler, a) == [LookupResult.HIT] * 6
    if end == "released":
        scheduler.manager.release("a")
        assert scheduler.store(a, A)[0] == [], "it still knows what is kept"
    else:
        scheduler.manager.on_request_finished(a)
    assert not scheduler.client.open_tickets and not scheduler.manager.is_open("a")
    assert answers(scheduler, a) == [LookupResult.MISS] * 6


# -- storing ----------------------------------------------------------------------------


def test_a_store_takes_a_leased_slot_for_each_chunk_of_each_group(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.client.answer(scheduler.last_lookup, [MISS] * 6)
    stored, spec = scheduler.store(a, [*A[:2], WINDOW[0]])
    assert stored == [*A[:2], WINDOW[0]]
    assert spec.groups == [0, 0, 1]
    assert (spec.request, spec.epoch, spec.session) == ("a", b"epoch 1         ", 10)
    assert (spec.lengths, spec.rank_offsets) == (LAYOUT.lengths, LAYOUT.rank_offsets)
    scheduler.manager.complete_store(set(stored), a)
    [filled] = scheduler.client.committed
    by_name = {item.key: item.slot for item in filled}
    slots = [by_name[scheduler.key(key)] for key in stored]
    assert [slot.length for slot in slots] == [8192, 8192, 2048]
    assert spec.offsets == [slot.offset for slot in slots]
    assert spec.generations == [slot.generation for slot in slots]
    assert scheduler.counts() == {"connected": 1, "stored_chunks": 3}


def test_no_two_jobs_share_a_number(scheduler: Scheduler, a: ReqContext) -> None:
    numbers = [
        scheduler.store(a, A[:1])[1].transfer,
        scheduler.store(a, A[1:2])[1].transfer,
        scheduler.manager.prepare_load(A[2:], a).transfer,
    ]
    assert len(set(numbers)) == 3


def test_what_finds_no_slot_is_not_stored_and_counted(scheduler: Scheduler, a: ReqContext) -> None:
    scheduler.client.slots_left = 3
    stored, spec = scheduler.store(a, [*A, *WINDOW])
    assert stored == A[:3] and spec.groups == [0, 0, 0]
    assert scheduler.counts() == {"connected": 1, "unstored_chunks/no_slot": 3}
    scheduler.client.slots_left = 2
    assert scheduler.store(a, [*A, *WINDOW])[0] == [A[3], WINDOW[0]], "and may be stored later"


def test_what_is_kept_is_not_stored_again_but_what_only_comes_is(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE, PRESENT, COMING, MISS, HERE, MISS])
    assert scheduler.store(a, [*A, *WINDOW])[0] == [A[2], A[3], WINDOW[1]]
    assert scheduler.counts() == {"connected": 1}, "nothing is counted as lost"


def test_two_requests_with_one_prefix_store_it_once(scheduler: Scheduler, a: ReqContext) -> None:
    twin = scheduler.request("twin", A, WINDOW)
    stored, _ = scheduler.store(a, A[:2])
    assert stored == A[:2]
    assert scheduler.store(twin, A[:3])[0] == A[2:3]
    scheduler.manager.complete_store(stored, a)
    assert scheduler.store(a, A[:2])[0] == [], "nor does one request store it twice"
    scheduler.manager.complete_store(A[2:3], twin)
    assert [len(filled) for filled in scheduler.client.committed] == [2, 1]


def test_chunks_are_committed_in_order_with_their_parents(
    scheduler: Scheduler, a: ReqContext
) -> None:
    scheduler.client.answer(scheduler.last_lookup, [HERE, MISS, MISS, MISS, MISS, MISS])
    stored, _ = scheduler.store(a, [*A, *WINDOW])
    scheduler.manager.complete_store(list(reversed(stored)), a)
    [filled] = scheduler.client.committed
    assert [item.position for item in filled] == [0, 1, 1, 2, 3]
    parents = {item.key: (item.parent, item.position) for item in filled}
    names, window = [scheduler.key(k) for k in A], [scheduler.key(k) for k in WINDOW]
    assert parents == {
        names[1]: (names[0], 1),  # which is kept, and not stored now
        names[2]: (names[1], 2),
        names[3]: (names[2], 3),
        window[0]: (None, 0),
        window[1]: (window[0], 1),
    }


def test_what_a_request_generates_continues_its_chain(scheduler: Scheduler) -> None:
    """Chunks beyond those it arrived with."""
    a = scheduler.request("a", A, WINDOW, known=1)
    assert len(scheduler.last_lookup.keys) == 2
    for key in (A[1], A[2], WINDOW[1]):
        scheduler.manager.complete_store(scheduler.store(a, [key])[0], a)
    found = [(item.key, item.parent) for filled in scheduler.client.committed for item in filled]
    pairs = [(A[1], A[0]), (A[2], A[1]), (WINDOW[1], WINDOW[0])]
    assert found == [(scheduler.key(key), scheduler.key(parent)) for key, parent in pairs]


def test_a_chunk_whose_place_is_unknown_begins_a_chain(scheduler: Scheduler) -> None:
    context = ReqContext("a")
    scheduler.manager.on_new_request(context)
    scheduler.manager.complete_store(scheduler.store(context, A[:1])[0], context)
    [[filled]] = scheduler.client.committed
    assert (filled.parent, filled.position) == (None, 0)


def test_a_finished_requests_chunks_are_committed_all_the_same(
    scheduler: Scheduler, a: ReqContext
) -> None:
    stored, _ = scheduler.store(a, A)
    scheduler.manager.on_request_finished(a)
    scheduler.manager.complete_store(stored, a)
    [filled] = scheduler.client.committed
    assert [item.key for item in filled] == [scheduler.key(key) for key in A]


def test_slots_of_a_store_that_failed_go_back(scheduler: Scheduler, a: ReqContext) -> None:
    stored, spec = scheduler.store(a, A)
    scheduler.manager.complete_store(stored, a, success=False)
    assert [slot.offset for slot in scheduler.client.given_back] == spec.offsets
    assert not scheduler.client.committed
    assert scheduler.counts() == {"connected": 1, "unstored_chunks/failed": 4}
    assert scheduler.store(a, A)[0] == A, "they may be stored yet"


def test_a_store_that_failed_in_one_worker_is_not_committed(
    scheduler: Scheduler, a: ReqContext
) -> None:
    good, good_spec = scheduler.store(a, A[:2])
    bad, bad_spec = scheduler.store(a, A[2:])
    assert good_spec.transfer != bad_spec.transfer
    scheduler.manager.note_worker_results({bad_spec.transfer}, 0, set())
    scheduler.manager.complete_store(good, a)  # the other rank is still at it
    scheduler.manager.complete_store(bad, a)
    [filled] = scheduler.client.committed
    assert [item.key for item in filled] == [scheduler.key(key) for key in A[:2]]
    assert [slot.offset for slot in scheduler.client.given_back] == bad_spec.offsets
    assert scheduler.counts() == {"connected": 1, "stored_chunks": 2, "unstored_chunks/failed": 2}
    assert not scheduler.manager._failed, "what is known of ended transfers is dropped"


@pytest.mark.parametrize("success", [True, False])
def test_slots_of_an_earlier_connection_are_neither_committed_nor_given_back(
    scheduler: Scheduler, a: ReqContext, success: bool
) -> None:
    """The daemon took them back when that connection ended; they may be another engine's."""
    stored, _ = scheduler.store(a, A)
    scheduler.client.go_away()
    scheduler.client.come_up()
    scheduler.client.pump()
    scheduler.manager.complete_store(stored, a, success=success)
    assert not scheduler.client.committed and not scheduler.client.given_back
    assert "stored_chunks" not in scheduler.counts()
    assert scheduler.store(a, A)[0] == A


# -- reset, statistics, end -------------------------------------------------------------


def test_after_a_reset_nothing_of_before_is_used_or_committed(
    scheduler: Scheduler, a: ReqContext
) -> None:
    manager, client = scheduler.manager, scheduler.client
    client.answer(scheduler.last_lookup, [HERE, HERE, MISS, MISS, MISS, MISS])
    assert manager.lookup(A[0], a) is LookupResult.HIT
    in_flight, _ = scheduler.store(a, A[2:])
    client.answer(scheduler.last_lookup, [HERE] * 6)  # said before, heard after
    manager.reset_cache()
    assert client.renewed == 1 and len(scheduler.namespaces) == 2
    client.come_up()
    assert answers(scheduler, a) == [LookupResult.MISS] * 6
    manager.complete_store(in_flight, a)
    assert not client.committed and not client.given_back

    stored, _ = scheduler.store(a, [*A, *WINDOW])
    assert stored == [*A, *WINDOW], "all of it is computed with the new weights"
    manager.complete_store(stored, a)
    [filled] = client.committed
    new = {scheduler.key(key, 1) for key in stored}
    assert {item.key for item in filled} == new
    assert {item.parent for item in filled if item.position} <= new

    manager.open("b", [A, WINDOW])
    assert set(scheduler.last_lookup.keys) == new
    assert not new & {scheduler.key(key, 0) for key in stored}


def test_after_a_reset_all_chunks_are_stored_again(scheduler: Scheduler, a: ReqContext) -> None:
    """What was kept, what was stored, and what was being stored: vLLM forgets such jobs."""
    scheduler.client.answer(scheduler.last_lookup, [HERE] + [MISS] * 5)
    stored, _ = scheduler.store(a, A[1:2])
    scheduler.manager.complete_store(stored, a)
    assert scheduler.store(a, A[2:3])[0] == A[2:3]
    scheduler.manager.release("a")
    assert scheduler.store(a, A)[0] == A[3:]
    scheduler.manager.reset_cache()
    scheduler.client.come_up()
    assert scheduler.store(a, A)[0] == A


def test_after_a_reset_no_parent_of_before_is_named(scheduler: Scheduler, a: ReqContext) -> None:
    scheduler.manager.reset_cache()
    scheduler.client.come_up()
    stored, _ = scheduler.store(a, A[2:3])
    scheduler.manager.complete_store(stored, a)
    [[filled]] = scheduler.client.committed
    assert filled == Filled(scheduler.key(A[2]), None, 2, filled.slot)


def test_statistics_tell_whether_the_daemon_serves_this_engine(idle_scheduler: Scheduler) -> None:
    assert idle_scheduler.counts() == {"connected": 0}
    assert idle_scheduler.counts() == {}
    idle_scheduler.client.come_up()
    assert idle_scheduler.counts() == {"connected": 1}, "an idle engine hears it too"
    idle_scheduler.client.go_away()
    assert idle_scheduler.counts() == {"connected": 0}


def test_the_client_lives_as_long_as_the_manager(scheduler: Scheduler) -> None:
    client = scheduler.client
    assert client.running and client.path == "nowhere" and list(client.lease_targets) == [9, 9]
    scheduler.manager.shutdown()
    assert client.running is False


def test_a_manager_that_was_never_started_can_be_shut_down() -> None:
    KvbmManager(Options(socket="nowhere")).shutdown()
