"""Lanes: bounded, each key once, in order, and patient only as long as they were told."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.lane import Lane
from storage_tiers.base import Chunk
from storage_tiers.testing import make_key

NEVER_S = 3600.0


def chunk(name: object, length: int = 100) -> Chunk:
    return Chunk(make_key(name), length, 0, None, 0)


async def test_chunks_leave_in_the_order_they_came() -> None:
    lane = Lane(10)
    chunks = [chunk(index) for index in range(5)]
    for each in chunks:
        assert lane.offer(each)
    assert await lane.take(3) == chunks[:3]
    assert await lane.take(3) == chunks[3:]


async def test_an_order_decides_each_batch_and_what_it_leaves_out_comes_last() -> None:
    lane = Lane(10)
    chunks = {name: chunk(name) for name in "abcde"}
    for each in chunks.values():
        lane.offer(each)
    wanted = [chunks[name].key for name in "dxb" if name in chunks]
    lane.order = lambda waiting: [key for key in wanted if key in waiting]
    assert await lane.take(1) == [chunks["d"]]
    wanted.insert(0, chunks["e"].key)
    assert await lane.take(3) == [chunks["e"], chunks["b"], chunks["a"]]
    lane.order = None
    assert await lane.take(3) == [chunks["c"]]
    assert lane.waiting_bytes == 0


async def test_a_key_offered_again_waits_once_at_its_first_place() -> None:
    lane = Lane(10)
    for name in ("a", "b", "a"):
        assert lane.offer(chunk(name))
    assert len(lane) == 2
    assert lane.waiting_bytes == 200
    assert await lane.take(10) == [chunk("a"), chunk("b")]


async def test_a_full_lane_refuses_a_new_key_but_not_one_that_waits() -> None:
    lane = Lane(2)
    assert lane.offer(chunk("a")) and lane.offer(chunk("b"))
    assert not lane.offer(chunk("c"))
    assert lane.offer(chunk("a"))
    assert chunk("c").key not in lane
    await lane.take(1)
    assert lane.offer(chunk("c"))
    assert await lane.take(10) == [chunk("b"), chunk("c")]


async def test_a_withdrawn_chunk_is_not_taken() -> None:
    lane = Lane(10)
    for name in ("a", "b", "c"):
        lane.offer(chunk(name))
    assert lane.withdraw(make_key("b"))
    assert not lane.withdraw(make_key("b"))
    assert not lane.withdraw(make_key("never offered"))
    assert await lane.take(10) == [chunk("a"), chunk("c")]
    assert not lane.withdraw(make_key("a"))
    assert lane.waiting_bytes == 0


async def test_a_batch_keeps_to_its_bytes_but_holds_at_least_one_chunk() -> None:
    lane = Lane(10)
    for name, length in (("a", 60), ("b", 40), ("c", 1), ("d", 500), ("e", 1)):
        lane.offer(chunk(name, length))
    batches = [await lane.take(10, bytes_max=100) for _ in range(4)]
    assert [[c.length for c in batch] for batch in batches] == [[60, 40], [1], [500], [1]]
    assert lane.waiting_bytes == 0


async def test_taking_from_an_empty_lane_waits_for_the_first_chunk() -> None:
    lane = Lane(10)
    task = asyncio.ensure_future(lane.take(10))
    await asyncio.sleep(0.01)
    assert not task.done()
    lane.offer(chunk("a"))
    async with asyncio.timeout(60):
        assert await task == [chunk("a")]


async def test_two_takers_share_what_comes_without_loss_or_repetition() -> None:
    lane = Lane(1000)
    got: list[Chunk] = []

    async def taker() -> None:
        while len(got) < 200:
            got.extend(await lane.take(3))

    tasks = [asyncio.ensure_future(taker()) for _ in range(2)]
    for index in range(200):
        lane.offer(chunk(index))
        if index % 7 == 0:
            await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert got == [chunk(index) for index in range(200)]


async def test_a_cancelled_taker_takes_nothing() -> None:
    lane = Lane(10)
    for linger_s in (0.0, NEVER_S):
        task = asyncio.ensure_future(lane.take(10, enough_bytes=1000, linger_s=linger_s))
        await asyncio.sleep(0.005)
        if linger_s:
            lane.offer(chunk("a"))
            await asyncio.sleep(0.005)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
    async with asyncio.timeout(60):
        assert await lane.take(10) == [chunk("a")]


async def test_lingering_ends_when_enough_bytes_wait() -> None:
    lane = Lane(10)
    task = asyncio.ensure_future(lane.take(10, enough_bytes=250, linger_s=NEVER_S))
    for name in ("a", "b"):
        lane.offer(chunk(name))
        await asyncio.sleep(0.01)
        assert not task.done()
    lane.offer(chunk("c"))
    async with asyncio.timeout(60):
        assert len(await task) == 3


async def test_lingering_ends_when_a_whole_batch_waits() -> None:
    lane = Lane(10)
    task = asyncio.ensure_future(lane.take(2, enough_bytes=1 << 40, linger_s=NEVER_S))
    lane.offer(chunk("a"))
    await asyncio.sleep(0.01)
    assert not task.done()
    lane.offer(chunk("b"))
    lane.offer(chunk("c"))
    async with asyncio.timeout(60):
        assert await task == [chunk("a"), chunk("b")]


async def test_lingering_ends_when_its_time_is_over() -> None:
    lane = Lane(10)
    lane.offer(chunk("a"))
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(60):
        assert await lane.take(10, enough_bytes=1 << 40, linger_s=0.05) == [chunk("a")]
    assert loop.time() - began >= 0.05


async def test_a_key_offered_again_does_not_prolong_the_linger() -> None:
    lane = Lane(10)
    lane.offer(chunk("a"))
    task = asyncio.ensure_future(lane.take(10, enough_bytes=1 << 40, linger_s=0.03))
    async with asyncio.timeout(60):
        while not task.done():
            lane.offer(chunk("a"))
            await asyncio.sleep(0.001)
    assert task.result() == [chunk("a")]


async def test_a_chunk_withdrawn_while_the_taker_lingers_makes_no_empty_batch() -> None:
    """`take` promises at least one chunk; it waits on if the only one was withdrawn."""
    lane = Lane(10)
    lane.offer(chunk("a"))
    task = asyncio.ensure_future(lane.take(10, enough_bytes=1 << 40, linger_s=0.02))
    await asyncio.sleep(0.005)
    assert lane.withdraw(make_key("a"))
    assert lane.waiting_bytes == 0
    await asyncio.sleep(0.05)
    assert not task.done(), "the batch is empty"
    lane.offer(chunk("b"))
    async with asyncio.timeout(60):
        assert await task == [chunk("b")]


async def test_a_chunk_withdrawn_while_the_taker_lingers_leaves_the_others() -> None:
    lane = Lane(10)
    lane.offer(chunk("a"))
    lane.offer(chunk("b"))
    task = asyncio.ensure_future(lane.take(10, enough_bytes=200, linger_s=NEVER_S))
    lane.withdraw(make_key("a"))
    await asyncio.sleep(0.005)
    assert not task.done(), "withdrawn bytes still count as waiting"
    lane.offer(chunk("c"))
    async with asyncio.timeout(60):
        assert await task == [chunk("b"), chunk("c")]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(0, 9)),
        st.tuples(st.just("withdraw"), st.integers(0, 9)),
        st.tuples(st.just("take"), st.integers(1, 4)),
    ),
    max_size=60,
)


@given(STEPS)
@settings(max_examples=100, deadline=None)
def test_a_lane_does_what_an_ordered_dictionary_does(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        lane, model = Lane(6), OrderedDict[int, Chunk]()
        for step, number in steps:
            if step == "offer":
                accepted = number in model or len(model) < 6
                assert lane.offer(chunk(number, number + 1)) == accepted
                if accepted:
                    model.setdefault(number, chunk(number, number + 1))
            elif step == "withdraw":
                assert lane.withdraw(make_key(number)) == (model.pop(number, None) is not None)
            elif model:
                first = [model.popitem(last=False)[1] for _ in range(min(number, len(model)))]
                assert await lane.take(number) == first
            assert len(lane) == len(model)
            assert lane.waiting_bytes == sum(c.length for c in model.values())
            assert all((make_key(name) in lane) == (name in model) for name in range(10))

    asyncio.run(run())
