"""The router as a frontend uses it, with a real index."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from router.approximate import RouteMemory
from router.index import Hashes, Index, Tier, WorkerId
from router.load import ActiveSequences
from router.queue import Urgency, WaitingLine
from router.router import Prompt, Query, Rejected, Routed, Router
from router.selector import Chosen, Selector, Wishes
from router.workers import Workers
from runtime.hashing import block_hashes, sequence_hashes
from tests.router.builders import BLOCK, worker

DICE = random.Random(7)


class Fleet:
    """A router over workers 1..count."""

    def __init__(self, count: int = 3, *, memory: bool = False, **settings: Any) -> None:
        self.workers = Workers()
        self.index = Index(10_000)
        self.active = ActiveSequences(self.workers)
        self.router = Router(
            self.workers,
            self.index,
            self.active,
            Selector(self.workers, dice=random.Random(1)),
            block_tokens=BLOCK,
            memory=RouteMemory(Index(10_000)) if memory else None,
            **settings,
        )
        for instance in range(1, count + 1):
            self.router.add_worker(worker(instance, batch_tokens_max=1000))

    def store(self, instance: int, tokens: list[int], blocks: int, tier: Tier = Tier.G1) -> None:
        local = hashes(tokens)[:blocks]
        self.index.stored(WorkerId(instance), tier, None, sequence_hashes(local), local)

    async def sent(self, asked: Query, deadline_s: float = 5.0) -> Routed:
        routed = await self.router.route(asked, deadline_s=deadline_s)
        assert isinstance(routed, Routed), routed
        return routed

    def at_rest(self) -> bool:
        self.active.check_integrity()
        self.workers.check_integrity()
        return not len(self.active)


def hashes(tokens: list[int]) -> Hashes:
    return block_hashes(np.array(tokens, dtype=np.uint32), BLOCK)


def prompt(length: int) -> list[int]:
    return [DICE.randrange(50_000) for _ in range(length)]


def query(name: str, tokens: list[int], **more: Any) -> Query:
    local = hashes(tokens)
    return Query(name, Prompt(len(tokens), local, sequence_hashes(local)), **more)


async def test_a_prompt_goes_where_it_is_and_is_counted_until_it_ends() -> None:
    fleet = Fleet()
    tokens = prompt(100)
    fleet.store(2, tokens, 5)
    with await fleet.sent(query("a", tokens)) as routed:
        assert routed.worker == WorkerId(2)
        row = fleet.workers.row(routed.worker)
        assert fleet.workers.prefill_tokens[row] == 20 and fleet.workers.blocks[row] == 7
        routed.first_token()
        assert fleet.workers.prefill_tokens[row] == fleet.workers.prefill_s[row] == 0
        routed.output(12)  # fills the block that the prompt began
        assert fleet.workers.blocks[row] == 7
        routed.output(1)
        assert fleet.workers.blocks[row] == 8
        routed.output(BLOCK * 3 - 1)
        assert fleet.workers.blocks[row] == 10
    assert fleet.at_rest()


async def test_lower_tiers_count_for_what_loading_saves() -> None:
    fleet = Fleet(2)
    tokens = prompt(20 * BLOCK + 3)
    fleet.store(1, tokens, 6)
    fleet.store(2, tokens, 5)
    fleet.store(2, tokens, 20, Tier.G2)
    decision = fleet.router.decide(query("a", tokens))
    assert isinstance(decision, Chosen) and decision.worker == WorkerId(2)
    assert decision.covered_blocks() == {"g1": 5, "g2": 15, "g3": 0, "g4": 0}
    told = fleet.router.explain(query("a", tokens))
    assert told["candidates"][0]["worker"] == "2.0"
    assert told["candidates"][0]["terms"]["load"] > 0


async def test_a_second_request_follows_the_first_before_any_event() -> None:
    fleet = Fleet(memory=True)
    tokens = prompt(40 * BLOCK)
    first = await fleet.sent(query("a", tokens))
    first.first_token()
    for number in range(5):
        again = await fleet.sent(query(f"b{number}", tokens))
        assert again.worker == first.worker
        again.end()
    fleet.router.remove_worker(first.worker)
    other = await fleet.sent(query("c", tokens))
    assert other.worker != first.worker and set(other.chosen.covered_blocks().values()) == {0}


async def test_requests_wait_for_room_the_urgent_first() -> None:
    fleet = Fleet(1, hold_above=0.5)
    big = await fleet.sent(query("big", prompt(600)))
    order: list[str] = []

    async def ask(name: str, urgency: Urgency) -> None:
        with await fleet.sent(query(name, prompt(600), urgency=urgency)) as routed:
            order.append(name)
            await asyncio.sleep(0)
            routed.first_token()

    async with asyncio.TaskGroup() as tasks:
        for name, urgency in (("plain", Urgency()), ("urgent", Urgency(strict_priority=1))):
            tasks.create_task(ask(name, urgency))
        await asyncio.sleep(0.01)
        assert fleet.router.waiting == 2 and not order
        big.first_token()
    big.end()
    assert order == ["urgent", "plain"] and fleet.router.waiting == 0 and fleet.at_rest()


async def test_waiting_ends_with_the_deadline_or_the_caller_and_never_sticks() -> None:
    fleet = Fleet(1, hold_above=0.5, line=WaitingLine(limit=2))
    big = await fleet.sent(query("big", prompt(600)))
    late = await fleet.router.route(query("late", prompt(10)), deadline_s=0.02)
    assert isinstance(late, Rejected) and late.kind == "deadline"
    given_up = asyncio.create_task(fleet.router.route(query("gone", prompt(10)), deadline_s=5))
    patient = asyncio.create_task(fleet.router.route(query("patient", prompt(10)), deadline_s=5))
    await asyncio.sleep(0.01)
    full = await fleet.router.route(query("full", prompt(10)), deadline_s=5)
    assert isinstance(full, Rejected) and full.kind == "queue-full"
    big.end()  # it is the first one's turn now, who has gone in the same moment
    given_up.cancel()
    async with asyncio.timeout(60):
        routed = await patient
    assert isinstance(routed, Routed) and given_up.cancelled()
    routed.end()
    assert fleet.at_rest()


async def test_whoever_waits_hears_that_no_worker_is_left() -> None:
    fleet = Fleet(1, hold_above=0.5)
    await fleet.sent(query("big", prompt(600)))
    waiting = asyncio.create_task(fleet.router.route(query("a", prompt(10)), deadline_s=5))
    await asyncio.sleep(0.01)
    assert fleet.router.remove_worker(WorkerId(1)) == ["big"]
    async with asyncio.timeout(60):
        rejected = await waiting
    assert isinstance(rejected, Rejected) and rejected.kind == "no-worker"


async def test_a_request_waits_for_the_workers_it_may_go_to_and_no_others() -> None:
    fleet = Fleet(2, hold_above=0.5)
    only_first = Wishes(among=frozenset([WorkerId(1)]))
    big = await fleet.sent(query("big", prompt(600), wishes=only_first))
    asked = query("a", prompt(10), wishes=only_first)
    waiting = asyncio.create_task(fleet.router.route(asked, deadline_s=5))
    await asyncio.sleep(0.01)
    with await fleet.sent(query("b", prompt(10), wishes=Wishes(among=frozenset([WorkerId(2)])))):
        pass  # it comes and goes on the other worker, which has room
    assert fleet.router.waiting == 1 and not waiting.done()
    big.first_token()
    async with asyncio.timeout(60):
        routed = await waiting
    assert isinstance(routed, Routed) and routed.worker == WorkerId(1)
    routed.end()
    big.end()
    assert fleet.at_rest()


async def test_one_name_runs_once() -> None:
    fleet = Fleet()
    with await fleet.sent(query("a", prompt(10))):
        again = await fleet.router.route(query("a", prompt(10)), deadline_s=1)
        assert isinstance(again, Rejected) and again.kind == "duplicate"


@pytest.mark.parametrize("seed", range(5))
async def test_any_load_comes_to_rest(seed: int) -> None:
    """Requests of many lengths on few workers that come and go; all end, counted or rejected."""
    dice = random.Random(seed)
    fleet = Fleet(3, hold_above=0.1, memory=True, line=WaitingLine(limit=5))
    stems = [prompt(dice.randrange(400)) for _ in range(4)]
    kinds: set[str] = set()

    async def ask(number: int) -> None:
        tokens = dice.choice(stems) + prompt(dice.randrange(1, 300))
        asked = query(
            f"r{number}",
            tokens,
            urgency=Urgency(strict_priority=dice.randrange(2)),
            wishes=Wishes(session=dice.choice([None, "s"])),
        )
        try:
            async with asyncio.timeout(dice.choice([0.005, 5])):
                routed = await fleet.router.route(asked, deadline_s=dice.choice([0.005, 5]))
                if isinstance(routed, Rejected):
                    kinds.add(routed.kind)
                    return
                with routed:
                    kinds.add("routed")
                    await asyncio.sleep(dice.random() * 0.03)
                    routed.first_token()
                    routed.output(dice.randrange(50))
        except TimeoutError:
            kinds.add("cancelled")

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for number in range(300):
            tasks.create_task(ask(number))
            if number % 50 == 49:
                fleet.router.remove_worker(WorkerId(1 + number // 50 % 3))
                fleet.router.add_worker(worker(1 + number // 50 % 3, batch_tokens_max=1000))
            await asyncio.sleep(0.001)
    assert "routed" in kinds and len(kinds) > 1, "which of the other ends come is a matter of time"
    assert fleet.router.waiting == 0 and fleet.at_rest()
