"""Routes remembered for a time, against a model that keeps every residency's end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.approximate import LISTED_SLACK, RouteMemory
from router.index import Hashes, Index, WorkerId
from runtime.hashing import sequence_hashes

steps = st.lists(
    st.tuples(
        st.integers(0, 2),  # worker
        st.lists(st.integers(0, 1), max_size=5),  # the prompt's blocks
        st.floats(0, 6),  # time that passes before
    ),
    max_size=30,
)


def local(blocks: list[int]) -> Hashes:
    return np.array([block + 10 for block in blocks], dtype=np.uint64)


def send(memory: RouteMemory, worker: int, blocks: list[int]) -> None:
    memory.sent(WorkerId(worker), sequence_hashes(local(blocks)), local(blocks))


def found(memory: RouteMemory, blocks: list[int]) -> dict[int, int]:
    matches = memory.find(local(blocks))
    return {
        worker.instance: int(matches.reach[0, column])
        for column, worker in enumerate(matches.workers)
        if worker is not None and matches.reach[0, column]
    }


@settings(deadline=None)  # the first index compiles its kernels
@given(steps)
def test_a_prompt_is_found_until_its_time_is_over(
    steps: list[tuple[int, list[int], float]],
) -> None:
    now = 0.0
    index = Index(1000)
    memory = RouteMemory(index, ttl_s=10.0, clock=lambda: now)
    ends: dict[tuple[int, tuple[int, ...]], float] = {}
    for worker, blocks, pause in steps:
        now += pause
        send(memory, worker, blocks)
        for end in range(1, len(blocks) + 1):
            ends[worker, tuple(blocks[:end])] = now + 10.0
        for asked in ([0, 0, 1], [1, 0], blocks):
            expected = {}
            for one in range(3):
                reach = 0
                while reach < len(asked) and ends.get((one, tuple(asked[: reach + 1])), 0) > now:
                    reach += 1
                if reach:
                    expected[one] = reach
            assert found(memory, asked) == expected
        assert len(memory) == sum(end > now for end in ends.values())
    now += 10.0
    memory.expire()
    assert len(memory) == len(index) == 0
    index.check_integrity()


@settings(deadline=None)  # the first index compiles its kernels
@given(steps, st.integers(1, 12))
def test_memory_is_bounded_and_the_oldest_go_first(
    steps: list[tuple[int, list[int], float]], limit: int
) -> None:
    now = 0.0
    index = Index(1000)
    memory = RouteMemory(index, ttl_s=1e9, blocks_max=limit, clock=lambda: now)
    for worker, blocks, pause in steps:
        now += pause
        send(memory, worker, blocks)
        assert len(memory) <= limit
        held = sum(sum(index.held_blocks(WorkerId(one))) for one in range(3))
        assert held == len(memory)
        if len(blocks) <= limit:
            assert found(memory, blocks).get(worker, 0) == len(blocks), "the latest was kept"


def test_a_worker_that_goes_is_forgotten_alone() -> None:
    memory = RouteMemory(Index(1000), clock=lambda: 0.0)
    send(memory, 1, [0, 1])
    send(memory, 2, [0, 1, 1])
    memory.forget_worker(WorkerId(1))
    assert found(memory, [0, 1, 1]) == {2: 3} and len(memory) == 3
    send(memory, 1, [0])
    assert found(memory, [0, 1, 1]) == {1: 1, 2: 3}


def test_a_prompt_sent_all_the_time_takes_no_more_memory_each_time() -> None:
    now = 0.0
    memory = RouteMemory(Index(1000), ttl_s=100.0, clock=lambda: now)
    send(memory, 2, [1] * 5)
    for _ in range(2_000):
        now += 0.01
        send(memory, 1, [0] * 50)
        listed = sum(len(one.blocks) for one in memory._sent)
        if listed > 3 * LISTED_SLACK:
            raise AssertionError(f"{listed} blocks are listed for {len(memory)}")
    assert found(memory, [0] * 50) == {1: 50} and found(memory, [1] * 5) == {2: 5}
    now = 100.0
    assert found(memory, [1] * 5) == {} and found(memory, [0] * 50) == {1: 50}
    now = 200.0
    assert found(memory, [0] * 50) == {} and len(memory) == 0
