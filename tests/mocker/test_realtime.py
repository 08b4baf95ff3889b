"""The engine under the wall clock: the same tokens each time, in time, and nothing left behind."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocker.events import BlockEvent, BlocksStored
from mocker.realtime import EngineClosed, RealtimeEngine, RequestRefused, answer_to
from mocker.tiers import LruTier, NodeTiers
from mocker.timing import PS_PER_MS, PS_PER_S, StepTiming, TierTiming
from tests.mocker.builders import BLOCK, settings

TIMING = StepTiming(PS_PER_MS, PS_PER_MS, PS_PER_MS // 10, 0, 0)
SETTINGS = settings(timing=TIMING)
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)


async def collected(engine: RealtimeEngine, prompt: list[int], tokens: int) -> list[int]:
    async with asyncio.timeout(60):
        return [token async for token in engine.generate(prompt, tokens)]


@given(TOKENS, st.integers(1, 20), st.integers(0, 19))
def test_the_rest_of_an_answer_answers_its_beginning(
    prompt: list[int], tokens: int, cut: int
) -> None:
    answer = answer_to(prompt, tokens, 100)
    cut %= tokens
    assert answer_to([*prompt, *answer[:cut]], tokens - cut, 100) == answer[cut:]
    assert all(0 <= token < 100 for token in answer)


async def test_requests_at_once_are_answered_each_by_its_prompt() -> None:
    async with RealtimeEngine(SETTINGS, speedup=100) as engine:
        prompts = [[n, n + 1, n + 2] for n in range(20)]
        answers = await asyncio.gather(*(collected(engine, prompt, 9) for prompt in prompts))
        assert answers == [answer_to(prompt, 9) for prompt in prompts]
        assert len({tuple(answer) for answer in answers}) == 20
        engine.engine.check_integrity()
        assert engine.engine.pool.used_count == 0


async def test_no_token_comes_before_its_time() -> None:
    loop = asyncio.get_running_loop()
    async with RealtimeEngine(SETTINGS, speedup=2) as engine:
        began_s = loop.time()
        answer = engine.generate([1, 2, 3], 10)
        due_ps = 0
        async for _ in answer:
            due_ps += 2 * PS_PER_MS
            assert loop.time() - began_s >= due_ps / (2 * PS_PER_S) - 1e-3  # a timer's resolution


async def test_the_next_turn_finds_the_prompt_and_the_answer_in_the_cache() -> None:
    events: list[BlockEvent] = []
    async with RealtimeEngine(SETTINGS, speedup=1000, emit=events.append) as engine:
        prompt = list(range(2 * BLOCK + 1))
        answer = await collected(engine, prompt, 2 * BLOCK)
        stored = sum(len(e.block_hashes) for e in events if isinstance(e, BlocksStored))
        assert stored == 4  # of 16 tokens with KV, the last token of the answer has none
        computed = engine.engine.tokens_computed_total
        await collected(engine, [*prompt, *answer, 7], 1)
        assert engine.engine.tokens_computed_total - computed == len(prompt) + len(answer) + 1 - 16


async def test_closing_the_generator_ends_the_request() -> None:
    async with RealtimeEngine(SETTINGS, speedup=10) as engine:
        answer = engine.generate([1, 2, 3], 100)
        assert await anext(answer) == answer_to([1, 2, 3], 1)[0]
        assert engine.engine.running_count == 1
        await answer.aclose()
        assert engine.engine.running_count == engine.engine.pool.used_count == 0
        assert await collected(engine, [5], 3) == answer_to([5], 3)


async def test_cancelling_who_waits_ends_the_request() -> None:
    async with RealtimeEngine(settings(timing=StepTiming(PS_PER_S * 3600, 0, 0, 0, 0))) as engine:
        waiting = asyncio.ensure_future(collected(engine, [1], 1))
        while not engine.engine.running_count:
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert engine.engine.pool.used_count == 0


async def test_closing_the_engine_ends_all_answers() -> None:
    engine = RealtimeEngine(SETTINGS, speedup=0.001)
    waiting = asyncio.ensure_future(collected(engine, [1], 1))
    while not engine.engine.running_count:
        await asyncio.sleep(0)
    engine.close()
    with pytest.raises(EngineClosed):
        await waiting
    with pytest.raises(EngineClosed):
        await collected(engine, [1], 1)


async def test_a_token_that_takes_too_long_is_a_timeout() -> None:
    async with RealtimeEngine(SETTINGS, speedup=1e-6, token_deadline_s=0.01) as engine:
        with pytest.raises(TimeoutError):
            await collected(engine, [1], 1)
        assert engine.engine.running_count == 0


async def test_what_the_engine_refuses_is_refused() -> None:
    async with RealtimeEngine(SETTINGS) as engine:
        with pytest.raises(RequestRefused, match="blocks"):
            await collected(engine, [1] * 1000, 1)


async def test_wall_time_that_the_loop_has_lost_is_left_out() -> None:
    async with RealtimeEngine(SETTINGS, speedup=10) as engine:
        engine._began_s -= 10.0
        await collected(engine, [1], 3)
        assert engine.late_total == 0  # an idle engine is not late
        answer = engine.generate([1], 3)
        await anext(answer)
        engine._began_s -= 10.0
        assert [token async for token in answer] == answer_to([1], 3)[1:]
        assert engine.late_total == 1


async def test_loads_from_host_memory_take_their_time_here_too() -> None:
    tiers = NodeTiers(0, TierTiming(), LruTier("G2", 100))
    async with RealtimeEngine(SETTINGS, speedup=10, tiers=tiers) as first:
        await collected(first, list(range(12)), 1)
    async with RealtimeEngine(SETTINGS, speedup=10, tiers=tiers, index=1) as second:
        assert await collected(second, list(range(12)), 2) == answer_to(list(range(12)), 2)
        assert second.engine.tokens_computed_total == BLOCK + 1
        assert second.engine.wake_ps is None


@pytest.mark.parametrize("speedup", [0.0, -1.0, 1e7, float("nan")])
async def test_a_speedup_that_makes_no_sense_is_refused(speedup: float) -> None:
    with pytest.raises(ValueError, match="speedup"):
        RealtimeEngine(SETTINGS, speedup=speedup)
