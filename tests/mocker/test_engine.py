"""The engine's scheduling, in scenarios small enough to compute every time by hand."""

from __future__ import annotations

import pytest

from mocker.engine import Engine, EngineSettings, Output, Refused, single_steps
from mocker.events import BlockEvent, BlocksRemoved, BlocksStored
from mocker.sequence import Record, Request
from tests.mocker.builders import BLOCK, TIMING, ended, request, settings, times


def test_a_request_alone_takes_a_prefill_and_a_decode_for_each_further_token() -> None:
    record = ended(Engine(settings()), [request(1, [1, 2], 4)], now_ps=1000)[1]
    # Prefill: 10 + 20 x 8 + 2 x 36 = 242. Decodes read 9, 10, 11 tokens: 110 + 3 x each.
    assert times(record) == [1242, 1242 + 137, 1242 + 137 + 140, 1242 + 137 + 140 + 143]
    assert record.ttft_ps == 242
    assert record.itls_ps.tolist() == [137, 140, 143]
    assert (record.outcome, record.e2e_ps) == ("finished", 662)


def test_a_prompt_larger_than_the_budget_is_computed_in_chunks() -> None:
    record = ended(Engine(settings()), [request(1, range(10), 1)])[1]
    assert times(record) == [TIMING.prefill_ps(32) + TIMING.prefill_ps(8, 32)]


def test_prefills_and_decodes_share_a_step() -> None:
    engine = Engine(settings())
    engine.submit(request(1, [1], 3), 0)
    first_ps = engine.start(0)
    assert first_ps == TIMING.prefill_ps(4) == 130
    engine.submit(request(2, [2, 3], 1), 5)
    assert engine.finish() == [Output(1, 0, last=False)]
    # One decode that reads 5 tokens and a prefill of 8: 10 + 20 x 9 + 2 x 36 + 3 x 5.
    assert engine.start(first_ps) == first_ps + 277
    assert engine.finish() == [Output(1, 1, last=False), Output(2, 0, last=True)]


def test_a_second_chunk_takes_what_decodes_and_earlier_prefills_leave_of_the_budget() -> None:
    engine = Engine(settings())
    for each in (request(1, range(5), 1), request(2, range(20, 25), 1)):
        engine.submit(each, 0)
    steps = list(single_steps(engine, 0))
    assert [[o.request_id for o in outputs] for _, outputs in steps] == [[1], [2]]
    first_ps = TIMING.step_ps(32, 210 + 78, 0, 0)  # 20 tokens, and 12 of the second
    assert [end_ps for end_ps, _ in steps] == [first_ps, first_ps + TIMING.prefill_ps(8, 12)]


def test_a_cached_prefix_saves_exactly_its_prefill() -> None:
    engine = Engine(settings())
    cold = ended(engine, [request(1, range(8), 1)])[1]
    warm = ended(engine, [request(2, [*range(6), 90, 91], 1)], now_ps=10**6)[2]
    assert cold.cached_tokens == {"G1": 0}
    assert warm.cached_tokens == {"G1": 6 * BLOCK}
    assert cold.ttft_ps is not None and warm.ttft_ps is not None
    saved_ps = 6 * BLOCK * TIMING.token_ps + TIMING.pair_ps * (24 * 25 // 2)
    assert cold.ttft_ps - warm.ttft_ps == saved_ps


def test_of_a_prompt_that_is_all_cached_the_last_block_is_computed() -> None:
    engine = Engine(settings())
    ended(engine, [request(1, [1, 2], 1)])
    assert ended(engine, [request(2, [1, 2], 1)])[2].cached_tokens == {"G1": BLOCK}


def test_a_partial_last_block_is_never_shared() -> None:
    engine = Engine(settings())
    ended(engine, [request(1, [1, 2], 1, prompt=7)])
    assert ended(engine, [request(2, [1, 2, 3], 1)])[2].cached_tokens == {"G1": BLOCK}


def test_more_sequences_than_may_run_wait_for_one_to_end() -> None:
    engine = Engine(settings(max_num_seqs=2))
    records = ended(engine, [request(n, [n], 3) for n in range(3)])
    assert records[2].scheduled_ps == records[0].finished_ps == records[1].finished_ps


def test_without_blocks_the_last_admitted_is_preempted_and_computed_anew() -> None:
    """Three blocks: each prompt takes one, and the first request's answer the third."""
    engine = Engine(settings(num_blocks=3))
    records = ended(engine, [request(1, [1], 5), request(2, [2], 2)])
    first, second = records[1], records[2]
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert engine.preemptions_total == 1
    begin_ps = TIMING.step_ps(8, 20, 0, 0)  # both prompts
    assert times(first)[0] == times(second)[0] == begin_ps
    assert times(first)[1] == begin_ps + TIMING.decode_ps(1, 5)
    # Its prompt and one token need two blocks, which there are when the first has ended. The
    # prompt's is cached still, so one token is computed.
    assert first.finished_ps is not None
    assert times(second) == [begin_ps, first.finished_ps + TIMING.prefill_ps(1, 4)]


def test_a_preempted_request_whose_blocks_were_evicted_computes_all_of_them() -> None:
    engine = Engine(settings(num_blocks=3))
    records = ended(engine, [request(1, [1], 8), request(2, [2], 2)])
    begin_ps = TIMING.step_ps(8, 20, 0, 0)
    assert records[1].finished_ps is not None
    again_ps = records[1].finished_ps + TIMING.prefill_ps(5)
    assert times(records[2]) == [begin_ps, again_ps]


def test_events_tell_what_the_pool_has_with_parents_and_times() -> None:
    events: list[BlockEvent] = []
    engine = Engine(settings(num_blocks=4), index=3, emit=events.append)
    one = request(1, [1, 2], 6)
    record = ended(engine, [one])[1]
    hashes, local = one.chain.hashes, one.chain.locals
    first_ps, last_ps = times(record)[0], times(record)[-1]
    assert events == [
        BlocksStored(first_ps, 3, 0, "G1", None, hashes[:2], local[:2]),
        BlocksStored(last_ps, 3, 0, "G1", hashes[1], hashes[2:], local[2:]),
    ]
    events.clear()
    ended(engine, [request(2, [7, 8], 1)], now_ps=10**6)
    # One block had never been whole; of those that were, the last of the sequence goes.
    assert events[0] == BlocksRemoved(10**6, 3, 0, "G1", [hashes[2]])
    assert isinstance(events[1], BlocksStored)


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_a_cancelled_request_frees_everything(when: str) -> None:
    records: list[Record] = []
    engine = Engine(settings(), on_end=records.append)
    engine.submit(request(1, range(10), 50), 0)
    now_ps = 0
    if when != "waiting":
        assert engine.start(0) is not None
        now_ps = 1
    if when == "decoding":
        for _ in range(2):
            now_ps = engine.end_ps or 0
            engine.finish()
            engine.start(now_ps)
        now_ps += 300  # within the row's second step, each takes about 233
    assert engine.cancel(1, now_ps)
    assert not engine.cancel(1, now_ps)
    if engine.end_ps is not None:
        assert engine.finish() == []
    engine.check_integrity()
    assert engine.pool.used_count == engine.running_count == engine.waiting_count == 0
    assert [r.outcome for r in records] == ["cancelled"]
    assert len(records[0].token_times_ps) == (2 if when == "decoding" else 0)


def test_what_can_never_run_is_refused_with_the_reason() -> None:
    engine = Engine(settings(num_blocks=3, waiting_max=1))
    assert engine.submit(request(1, [1, 2], 6), 0) == Refused("needs 4 blocks, the engine has 3")
    assert engine.submit(request(2, [1, 2], 5), 0) is None
    assert engine.submit(request(3, [1], 1), 0) == Refused("1 requests wait already")
    assert engine.refused_total == 2


def test_a_request_that_is_here_already_is_refused() -> None:
    engine = Engine(settings())
    engine.submit(request(1, [1], 1), 0)
    assert engine.submit(request(1, [1], 1), 0) == Refused("request 1 is here already")


def test_an_empty_prompt_or_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="each needs at least one"):
        request(1, [], 1)
    with pytest.raises(ValueError, match="each needs at least one"):
        request(1, [1], 0)


def test_settings_under_which_not_every_sequence_could_decode_are_refused() -> None:
    with pytest.raises(ValueError, match="not every sequence could decode"):
        EngineSettings(TIMING, num_blocks=1, max_num_seqs=10, max_num_batched_tokens=9)


def test_the_log_of_times_forgets_what_no_sequence_needs() -> None:
    engine = Engine(settings(bulk=False, max_num_seqs=2))
    requests: list[Request] = [request(n, [n], 60) for n in range(300)]
    records = ended(engine, requests)
    assert all(len(times(record)) == 60 for record in records.values())
    assert len(engine._log) < 8192 < engine._log.end
