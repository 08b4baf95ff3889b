"""Decisions: who may be chosen, who is, and the reasons told."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from router.index import WorkerId
from router.limits import BusyLimits
from router.selector import AllBusy, Chosen, NoWorker, PolicyName, Selector, Wishes
from router.workers import WorkerError, Workers
from tests.router.builders import request, table, worker


def chosen(
    selector: Selector, workers: Workers, wishes: Wishes | None = None, **asked: object
) -> Chosen:
    decision = selector.select(request(workers, **asked), wishes)  # type: ignore[arg-type]
    assert isinstance(decision, Chosen), decision
    return decision


@pytest.mark.parametrize("policy", ["kv", "kv-blocks"])
def test_the_worker_with_the_prompt_has_it_unless_it_is_busy(policy: PolicyName) -> None:
    workers = table(3)
    selector = Selector(workers, policy, dice=random.Random(1))
    covered = [[0, 9, 3]] * 4
    assert chosen(selector, workers, covered=covered).worker == WorkerId(2)
    workers.prefill_tokens[1], workers.prefill_s[1] = 16 * 20, 16 * 20 * 1e-4
    assert chosen(selector, workers, covered=covered).worker == WorkerId(3)


def test_a_decision_explains_itself() -> None:
    workers = table(2)
    told = chosen(Selector(workers), workers, covered=[[4, 1], [6, 1], [6, 1], [9, 1]]).explain()
    assert json.loads(json.dumps(told)) == told
    first, second = told["candidates"]
    assert told["worker"] == first["worker"] == "1.0" and first["chosen"] and not second["chosen"]
    assert first["blocks_found"] == {"g1": 4, "g2": 2, "g3": 0, "g4": 3}
    assert first["cost"] == pytest.approx(sum(first["terms"].values())) and told["unit"] == "s"
    assert first["cost"] < second["cost"]


@pytest.mark.parametrize("policy", ["round-robin", "random", "power-of-two", "least-loaded"])
def test_policies_without_costs_spread_the_load(policy: PolicyName) -> None:
    workers = table(4)
    selector = Selector(workers, policy, dice=random.Random(2))
    counts: Counter[int] = Counter()
    for _ in range(400):
        row = chosen(selector, workers, covered=[[10, 0, 0, 0]] * 4).row
        workers.requests[row] += 1
        counts[row] += 1
    assert len(counts) == 4 and min(counts.values()) > 60


def test_a_request_may_name_its_worker_and_direct_demands_it() -> None:
    workers = table(3)
    pinned = Wishes(pinned=WorkerId(3))
    for policy in ("kv", "direct", "round-robin"):
        decision = chosen(Selector(workers, policy), workers, pinned)
        assert (decision.worker, decision.reason) == (WorkerId(3), "pinned")
    direct = Selector(workers, "direct")
    assert isinstance(direct.select(request(workers)), NoWorker)
    gone = direct.select(request(workers), Wishes(pinned=WorkerId(8)))
    assert isinstance(gone, NoWorker) and "8.0" in gone.why


def test_only_workers_that_are_named_and_have_the_taints_are_asked() -> None:
    workers = Workers()
    assert isinstance(Selector(workers).select(request(workers)), NoWorker)
    workers.add(worker(1, taints=["a"]))
    workers.add(worker(2, taints=["a", "b"]))
    workers.add(worker(3))
    selector = Selector(workers, "random", dice=random.Random(3))
    some = Wishes(among=frozenset([WorkerId(1), WorkerId(3), WorkerId(77)]))
    assert {chosen(selector, workers, some).row for _ in range(50)} == {0, 2}
    assert chosen(selector, workers, Wishes(taints=frozenset("ab"))).worker == WorkerId(2)
    nobody = selector.select(request(workers), Wishes(taints=frozenset("c")))
    assert nobody == NoWorker("no worker has c")


def test_workers_whose_health_check_has_not_passed_are_taken_only_if_there_are_no_others() -> None:
    workers = table(3)
    selector = Selector(workers, limits=BusyLimits(prefill_tokens=100))
    covered = [[9, 9, 0]] * 4  # the two that are not healthy have the prompt
    for instance in (1, 2):
        workers.change(replace(workers.at(workers.row(WorkerId(instance))), healthy=False))
    workers.check_integrity()
    assert chosen(selector, workers, covered=covered).worker == WorkerId(3)
    unwell = "its health check has not passed, and others' have"
    assert selector.why_not(Wishes()) == {WorkerId(1): unwell, WorkerId(2): unwell}
    # Those that a request names are all there is.
    assert chosen(selector, workers, Wishes(pinned=WorkerId(1))).worker == WorkerId(1)
    named = Wishes(among=frozenset([WorkerId(1), WorkerId(2)]))
    assert chosen(selector, workers, named, covered=covered).worker in {WorkerId(1), WorkerId(2)}
    assert chosen(selector, workers, Wishes(session="s")).worker == WorkerId(3)
    # One that is healthy and busy is waited for.
    workers.prefill_tokens[workers.row(WorkerId(3))] = 200.0
    assert isinstance(selector.select(request(workers), Wishes()), AllBusy)
    workers.remove(WorkerId(3))
    workers.check_integrity()
    assert chosen(selector, workers).worker in {WorkerId(1), WorkerId(2)}
    assert selector.why_not(Wishes()) == {}
    workers.add(worker(3))
    assert chosen(selector, workers).worker == WorkerId(3)


def test_a_preferred_taint_makes_a_worker_cheaper() -> None:
    workers = Workers()
    workers.add(worker(1))
    workers.add(worker(2, taints=["near"]))
    selector = Selector(workers, dice=random.Random(4))
    assert chosen(selector, workers, Wishes(preferred={"near": 1.0})).worker == WorkerId(2)
    assert chosen(selector, workers, Wishes(preferred={"near": -1.0})).worker == WorkerId(1)


def test_busy_workers_are_spared_and_all_busy_is_said() -> None:
    workers = Workers()
    workers.add(worker(1, kv_blocks=100, batch_tokens_max=1000))
    workers.add(worker(2, kv_blocks=100, batch_tokens_max=1000))
    workers.add(worker(3))  # has not said its sizes
    selector = Selector(workers, limits=BusyLimits(blocks_fraction=0.5, prefill_fraction=0.5))
    workers.blocks[0], workers.prefill_tokens[1] = 51, 501
    workers.blocks[2] = workers.prefill_tokens[2] = 1e9
    assert chosen(selector, workers, covered=[[10, 10, 0]] * 4).worker == WorkerId(3)
    named = Wishes(among=frozenset([WorkerId(1), WorkerId(2)]))
    assert selector.select(request(workers), named) == AllBusy(2)
    selector.limits = BusyLimits(prefill_tokens=600)
    assert chosen(selector, workers, named).worker in {WorkerId(1), WorkerId(2)}


def test_requests_of_a_session_go_to_one_worker() -> None:
    workers = table(5)
    one, other = Selector(workers), Selector(workers, "random")
    for session in map(str, range(20)):
        owner = chosen(one, workers, Wishes(session=session))
        assert owner.reason == "session"
        assert chosen(other, workers, Wishes(session=session)).worker == owner.worker


@pytest.mark.parametrize(
    "limits",
    [{"blocks_fraction": 0.0}, {"blocks_fraction": 1.5}, {"prefill_tokens": -1}],
)
def test_limits_out_of_range_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        BusyLimits(**limits)  # type: ignore[arg-type]


def test_rows_come_and_go_and_keep_their_columns() -> None:
    workers = table(40)
    workers.requests[:40] = range(40)
    with pytest.raises(WorkerError, match="registered already"):
        workers.add(worker(7))
    row = workers.remove(WorkerId(7))
    with pytest.raises(WorkerError, match="not registered"):
        workers.row(WorkerId(7))
    assert workers.add(worker(99)) == row == 6 and workers.requests[6] == 0
    assert workers.requests[39] == 39, "columns grew with what was in them"
    workers.check_integrity()
