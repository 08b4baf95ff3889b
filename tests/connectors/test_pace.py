"""What the scheduler half measures of its engine, tells the daemon, and waits for at most."""

from __future__ import annotations

from types import SimpleNamespace as Fields
from typing import Any

import pytest
from msgspec.structs import replace
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.kv_offload.base import LookupResult, ReqContext

from connectors.vllm.scheduler_side import WAIT_S_MIN
from connectors.vllm.steps import STEPS_MAX, StepTimer, prefill_spans
from kvbm.pace import REFIT_S, EnginePace
from kvbm.protocol import COMING, HERE, MISS
from tests.connectors.fake_client import LAYOUT, Clock, Scheduler, chain

A = chain("a", 8)
TOKENS = 16 * len(A)


def step(*new: tuple[str, int, int], running: tuple[tuple[str, int, int, int], ...] = ()) -> Any:
    """A step's output: (name, position, tokens) of new requests, those and answered of others."""
    counts = {name: count for name, _, count in new} | {name: n for name, _, n, _ in running}
    return Fields(
        scheduled_new_reqs=[Fields(req_id=name, num_computed_tokens=at) for name, at, _ in new],
        scheduled_cached_reqs=CachedRequestData(
            req_ids=[name for name, *_ in running],
            resumed_req_ids={name for name, *_ in running if name.startswith("resumed")},
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None for _ in running],
            num_computed_tokens=[at for _, at, _, _ in running],
            num_output_tokens=[answered for *_, answered in running],
        ),
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
    )


# -- steps ------------------------------------------------------------------------------


def test_a_prompt_s_part_of_a_step_is_told_from_an_answer_s() -> None:
    running = (
        ("prompt", 512, 256, 0),
        ("answer", 900, 1, 7),
        ("resumed", 0, 300, 44),
    )
    output = step(("new", 0, 512), running=running)
    assert prefill_spans(output) == [(0, 512), (512, 256), (0, 300)]


def test_only_steps_of_prompts_alone_are_timed() -> None:
    timer = StepTimer(EnginePace(), Clock())
    assert timer.handed_out(step(("a", 0, 512))) == 1
    assert timer.handed_out(step(running=(("a", 512, 1, 1),))) == 0
    assert timer.handed_out(step(("b", 0, 64), running=(("a", 512, 8, 1),))) == 0
    assert timer.handed_out(step(("b", 64, 512), running=(("a", 513, 1, 2),))) == 2


def test_a_step_takes_from_its_handing_out_or_the_end_of_the_one_before() -> None:
    """Two at a time: the second is handed out while the first runs."""
    clock, pace = Clock(), EnginePace()
    timer = StepTimer(pace, clock)
    first = timer.handed_out(step(("a", 0, 1000)))
    second = timer.handed_out(step(running=(("a", 1000, 1000, 0),)))
    clock.now_s += 1.0
    timer.ended({first})
    clock.now_s += 1.0
    timer.ended({second})
    clock.now_s += 60.0  # the engine had nothing to do
    third = timer.handed_out(step(("b", 0, 1000)))
    clock.now_s += 1.0
    timer.ended({third})
    assert pace.now().prefill_s(0, 1000) == pytest.approx(1.0, rel=0.05)


def test_steps_whose_results_never_come_are_forgotten() -> None:
    timer = StepTimer(EnginePace(), Clock())
    for number in range(3 * STEPS_MAX):
        timer.handed_out(step((f"{number}", 0, 512)))
    assert len(timer._steps) == STEPS_MAX
    timer.ended({1, 7, 999_999})
    assert len(timer._steps) == STEPS_MAX


# -- what the engine waits --------------------------------------------------------------


def compute_at(scheduler: Scheduler, tokens_per_s: float) -> None:
    """The engine has measured that."""
    for _ in range(8):
        scheduler.manager.pace.note_prefill([(0, 1000)], 1000 / tokens_per_s)
    scheduler.clock.now_s += REFIT_S


def ask(scheduler: Scheduler, context: ReqContext) -> list[LookupResult]:
    return [scheduler.manager.lookup(key, context) for key in A]


def test_nothing_is_waited_for_longer_than_computing_it_takes(scheduler: Scheduler) -> None:
    compute_at(scheduler, 1000.0)
    context = scheduler.request("a", A, [])
    assert scheduler.client.paces[-1].prefill_s(0, 1000) == pytest.approx(1.0, rel=0.01)
    scheduler.client.answer(scheduler.last_lookup, [HERE, *[COMING] * 7], tokens=TOKENS)
    hit, miss, pending = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING
    scheduler.clock.now_s += 3.0  # in vLLM's queue: costs nothing
    assert ask(scheduler, context) == [hit, *[pending] * 7]
    scheduler.clock.now_s += TOKENS / 1000 - 0.01
    assert ask(scheduler, context) == [hit, *[pending] * 7]
    scheduler.clock.now_s += 0.02
    assert ask(scheduler, context) == [hit, *[miss] * 7]
    assert scheduler.counts()["deadlines_missed/onboard"] == 1


def test_what_the_engine_has_itself_need_not_be_computed(scheduler: Scheduler) -> None:
    compute_at(scheduler, 1000.0)
    context = scheduler.request("a", A, [])
    scheduler.manager.note_local_hit("a", TOKENS - 32)
    scheduler.client.answer(scheduler.last_lookup, [COMING] * 8, tokens=TOKENS)
    assert ask(scheduler, context)[0] is LookupResult.HIT_PENDING
    scheduler.clock.now_s += 0.033
    assert ask(scheduler, context)[0] is LookupResult.MISS


def test_a_deadline_that_was_set_is_never_exceeded(scheduler: Scheduler) -> None:
    compute_at(scheduler, 1.0)
    context = scheduler.request("a", A, [])
    scheduler.client.answer(scheduler.last_lookup, [COMING] * 8, tokens=TOKENS)
    scheduler.clock.now_s += 5.0
    assert ask(scheduler, context)[0] is LookupResult.HIT_PENDING
    scheduler.clock.now_s += 0.01
    assert ask(scheduler, context)[0] is LookupResult.MISS


def test_a_daemon_that_always_loads_is_waited_for(scheduler: Scheduler) -> None:
    compute_at(scheduler, 1e6)
    scheduler.client.layout = replace(LAYOUT, always_load=True)
    context = scheduler.request("a", A, [])
    scheduler.client.answer(scheduler.last_lookup, [COMING] * 8, tokens=TOKENS)
    assert ask(scheduler, context)[0] is LookupResult.HIT_PENDING
    scheduler.clock.now_s += 4.9
    assert ask(scheduler, context)[0] is LookupResult.HIT_PENDING


def test_the_daemon_s_answer_too_is_not_waited_for_longer(scheduler: Scheduler) -> None:
    """But some milliseconds always, for a daemon that is only busy."""
    compute_at(scheduler, 1e6)
    context = scheduler.request("a", A, [])
    assert ask(scheduler, context)[0] is LookupResult.RETRY
    scheduler.clock.now_s += WAIT_S_MIN
    assert ask(scheduler, context)[0] is LookupResult.RETRY
    scheduler.clock.now_s += 0.001
    assert ask(scheduler, context)[0] is LookupResult.MISS
    assert scheduler.client.unanswered == 1


# -- what it tells of the end -----------------------------------------------------------


def test_a_request_that_loads_tells_how_much_and_how_long_it_took(scheduler: Scheduler) -> None:
    context = scheduler.request("a", A, [])
    scheduler.client.answer(scheduler.last_lookup, [HERE] * 8, tokens=TOKENS)
    scheduler.client.pump()
    scheduler.clock.now_s += 0.5
    scheduler.manager.note_local_hit("a", 32)
    scheduler.manager.note_scheduled("a", 96)
    scheduler.manager.prepare_load(A[2:], context)
    scheduler.clock.now_s += 0.25
    scheduler.manager.complete_load(A[2:], context)
    [outcome] = scheduler.client.outcomes
    assert (outcome.state, outcome.local_tokens, outcome.loaded_tokens) == ("loaded", 32, 96)
    assert (outcome.waited_s, outcome.load_s, outcome.late) == (0.5, 0.25, "")
    scheduler.clock.now_s += REFIT_S
    pace = scheduler.manager.pace.now()
    assert pace.copy_s + 6 * 8192 * pace.copy_byte_s == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("state", ["computed", "failed", "ended"])
def test_a_request_that_loads_nothing_tells_why(scheduler: Scheduler, state: str) -> None:
    context = scheduler.request("a", A, [])
    scheduler.client.answer(scheduler.last_lookup, [HERE, *[MISS] * 7], tokens=16)
    assert ask(scheduler, context)[:2] == [LookupResult.HIT, LookupResult.MISS]
    if state == "computed":
        scheduler.manager.note_scheduled("a", 0)
        scheduler.manager.release("a")
    elif state == "failed":
        scheduler.manager.note_scheduled("a", 16)
        scheduler.manager.note_worker_results(set(), 0, {"a"})
    scheduler.manager.on_request_finished(context)
    [outcome] = scheduler.client.outcomes
    assert outcome.state == state
    scheduler.clock.now_s += REFIT_S
    assert scheduler.manager.pace.now().copy_byte_s == 0, "what failed says nothing of speed"
