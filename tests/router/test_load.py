"""Load columns against a model that counts anew each time."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from router.cost import SecondsCost
from router.load import Active, ActiveSequences
from router.workers import Workers
from tests.router.builders import request, table, worker


class Load(RuleBasedStateMachine):
    """Prompts are paths in a small tree, so that many share their beginning."""

    requests: Bundle[str] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.workers: Workers = table(3)
        self.active = ActiveSequences(self.workers, limit=8)
        self.number = 0

    @rule(
        target=requests,
        row=st.integers(0, 2),
        path=st.lists(st.integers(0, 1), max_size=6),
        blocks=st.integers(0, 3),
        tokens=st.integers(0, 1000),
        seconds=st.floats(0, 5),
    )
    def begin(self, row: int, path: list[int], blocks: int, tokens: int, seconds: float) -> str:
        self.number += 1
        name = f"request {self.number}"
        prompt = [hash(tuple(path[: end + 1])) for end in range(len(path))]
        full = len(self.active) == 8
        assert self.active.begin(name, Active(row, prompt, blocks, tokens, seconds)) is not full
        assert not self.active.begin(name, Active(row, prompt, blocks, tokens, seconds))
        return name

    @rule(request=requests)
    def prefilled(self, request: str) -> None:
        assert self.active.prefilled(request) is (request in self.active)

    @rule(request=requests, blocks=st.integers(1, 4))
    def grow(self, request: str, blocks: int) -> None:
        assert self.active.grow(request, blocks) is (request in self.active)

    @rule(request=consumes(requests))
    def end(self, request: str) -> None:
        known = request in self.active
        assert self.active.end(request) is known
        assert request not in self.active

    @rule(row=st.integers(0, 2))
    def worker_goes(self, row: int) -> None:
        theirs = {name for name, one in self.active.items() if one.row == row}
        assert set(self.active.worker_removed(row)) == theirs
        assert self.workers.blocks[row] == self.workers.requests[row] == 0

    @invariant()
    def counts_are_right(self) -> None:
        self.active.check_integrity()


TestLoad = Load.TestCase
TestLoad.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prompt_two_sequences_share_counts_once() -> None:
    workers = table(1)
    active = ActiveSequences(workers)
    active.begin("a", Active(0, [1, 2, 3], 1, 64, 0.5))
    active.begin("b", Active(0, [1, 2, 9], 1, 16, 0.1))
    assert workers.blocks[0] == 4 + 2
    assert workers.prefill_tokens[0] == 80
    active.prefilled("a")
    assert workers.prefill_tokens[0] == 16
    active.end("a")
    assert workers.blocks[0] == 4 and workers.requests[0] == 1
    active.end("b")
    assert workers.prefill_s[0] == 0.0, "no rounding error is left"


def test_a_row_used_again_starts_with_nothing() -> None:
    workers = table(2)
    active = ActiveSequences(workers)
    active.begin("a", Active(1, [1], 5, 64, 0.5))
    row = workers.remove(workers.at(1).id)
    assert active.worker_removed(row) == ["a"]
    assert workers.add(worker(9)) == row
    assert not active.end("a") and workers.blocks[row] == 0


def test_the_prompt_that_is_first_is_computed_as_time_passes() -> None:
    """Two prompts of 3 and 2 s: what has passed goes into the first, and no more than it takes."""
    now = 100.0
    workers = Workers(lambda: now)
    workers.add(worker(1, kv_blocks=50))
    active = ActiveSequences(workers)

    def waits() -> float:
        costs = SecondsCost()(request(workers), workers, workers.present[:1])
        return float(costs.terms["wait"][0])

    active.begin("a", Active(0, [], 1, 300, 3.0))
    now = 101.0
    active.begin("b", Active(0, [], 1, 200, 2.0))
    assert waits() == 4.0
    now = 110.0
    assert waits() == 2.0, "the second has not begun, whatever the first takes"
    active.prefilled("a")
    assert waits() == 2.0
    now = 111.5
    assert waits() == 0.5
    workers.blocks[0] = 60
    assert waits() == 2.0, "who waits for room is not being computed"
    workers.blocks[0] = 2
    active.end("b")
    assert waits() == 0.0
    active.end("a")
    active.check_integrity()
