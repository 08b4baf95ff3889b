"""The manager, its tiers and its background work in any order, against what a test can know.

The background runs on a loop that the machine turns by hand: a rule does something and lets it
run for some turns. Tiers take turns over their calls, and threads are replaced by turns, so that
every run of one example is the same.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm import offload
from kvbm.manager import Wanted
from kvbm.offload import LaneSettings
from kvbm.protocol import COMING, HERE, MISS, PRESENT, unpack_slots
from storage_tiers.arena import Slot
from storage_tiers.base import StoreItem, Tier, TierName
from storage_tiers.faulty import Faults, Faulty
from storage_tiers.memory import MemoryTier
from storage_tiers.throttled import Throttled
from tests.kvbm.builders import Asked, chunks_of, keys_of, make_node

ARENA_BYTES = 24 * 4096
LOWER_BYTES = (10 * 4096, 25 * 4096)
LEASE_BYTES_MAX = 8 * 4096
SEQUENCES = [
    *(chunks_of(f"short{number}", 6, 4096) for number in range(2)),
    *(chunks_of(f"long{number}", 4, 3 * 4096) for number in range(2)),
]
ITEMS = {item.chunk.key: item for items in SEQUENCES for item in items}
TURNS_MAX = 5000
"""By far more than it takes to move everything there is."""


@dataclass
class Held:
    """A ticket, and what each of its states must come to."""

    asked: Asked
    keys: Sequence[bytes]


class RegistryMachine(RuleBasedStateMachine):
    """Engines lease, commit, match and close; tiers evict, rot and fail."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loop.run_in_executor = self._in_turns  # type: ignore[assignment]
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(offload, "BACKOFF_S_MAX", 0.0)
        self.random = random.Random(1)
        self.faulty: list[Faulty] = []
        self.node = make_node(
            self._slow,
            self._slow,
            dram_bytes=ARENA_BYTES,
            lower_bytes=LOWER_BYTES,
            settings=LaneSettings(batch_chunks=4, queue_chunks=12, attempts=2),
            lease_bytes_max=LEASE_BYTES_MAX,
            onboard_bytes_max=6 * 4096,
        )
        self.manager, self.dram = self.node.manager, self.node.dram
        runs = (self.manager.offloader.run(), self.manager.onboarder.run())
        self.background = [self.loop.create_task(run) for run in runs]
        self.leased: list[Slot] = []
        self.tickets: list[Held] = []

    def _in_turns(self, executor: None, run: Callable[..., Any], *arguments: Any) -> Any:
        """What a thread would do, done a turn later."""
        ended = self.loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(run(*arguments))

        self.loop.call_soon(end)
        return ended

    def _slow(self, tier: MemoryTier) -> Tier:
        """Takes turns before and after the call, so that others act in between."""

        async def turns(seconds: float) -> None:
            for _ in range(self.random.randrange(8)):
                await asyncio.sleep(0)

        self.faulty.append(Faulty(tier, Faults(delay=1.0), seed=1, sleep=turns))
        return Throttled(self.faulty[-1], bytes_per_s=1.0, clock=lambda: 0.0, sleep=turns)

    def turn(self, count: int = 1) -> None:
        async def run() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.loop.run_until_complete(run())
        for task in self.background:
            if task.done():
                task.result()

    # -- engines -------------------------------------------------------------------------

    @rule(length=st.sampled_from([4096, 3 * 4096]), count=st.integers(1, 4))
    def lease(self, length: int, count: int) -> None:
        slots = self.manager.lease(length, count)
        assert len(slots) <= count
        assert sum(slot.length for slot in (*self.leased, *slots)) <= LEASE_BYTES_MAX
        self.leased += slots

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), count=st.integers(1, 4), turns=st.integers(0, 2))
    def commit(self, data: st.DataObject, count: int, turns: int) -> None:
        items = data.draw(st.sampled_from(SEQUENCES))
        start = data.draw(st.integers(0, len(items) - 1))
        length = items[0].chunk.length
        slots = [slot for slot in self.leased if slot.length == length][:count]
        chosen = items[start : start + len(slots)]
        slots = slots[: len(chosen)]
        self.manager.commit(self.node.fill(slots, chosen))
        self.leased = [slot for slot in self.leased if slot not in slots]
        assert all(self.dram.find(keys_of(chosen)))
        self.turn(turns)

    @rule(number=st.integers(0, 3), turns=st.integers(0, 20))
    def keep_a_sequence(self, number: int, turns: int) -> None:
        items = SEQUENCES[number]
        slots = self.manager.lease(items[0].chunk.length, len(items))
        self.manager.commit(self.node.fill(slots, items[: len(slots)]))
        self.turn(turns)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(self.leased), unique=True))
        self.manager.give_back(slots)
        self.leased = [slot for slot in self.leased if slot not in slots]

    @rule(data=st.data(), turns=st.integers(0, 20))
    def match(self, data: st.DataObject, turns: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(range(4)), min_size=1, max_size=2, unique=True))
        groups = [
            Wanted(
                data.draw(st.sampled_from([16, 32])),
                data.draw(st.sampled_from([0, 0, 1])),
                keys_of(SEQUENCES[number]),
            )
            for number in chosen
        ]
        self.ask(groups)
        self.turn(turns)

    @rule(number=st.integers(0, 3), turns=st.integers(0, 30))
    def match_after_host_memory_forgot(self, number: int, turns: int) -> None:
        self.turn(turns)
        self.loop.run_until_complete(self.dram.remove(self.dram.all_keys()))
        self.ask([Wanted(16, 0, keys_of(SEQUENCES[number]))])
        self.turn(turns)

    def ask(self, groups: list[Wanted]) -> None:
        there = self.node.residencies()
        asked = self.node.match(*groups)
        keys = [key for group in groups for key in group.keys]
        assert len(asked.states) == len(keys)
        for key, state in zip(keys, asked.states, strict=True):
            tiers = {tier for tier, other in there if other == key}
            assert (state == MISS) == (not tiers)
            assert state != HERE or TierName.DRAM in tiers
            assert state != COMING or (tiers and TierName.DRAM not in tiers)
        self.tickets.append(Held(asked, keys))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), twice=st.booleans())
    def close(self, data: st.DataObject, twice: bool) -> None:
        held = data.draw(st.sampled_from(self.tickets))
        self.tickets.remove(held)
        told = len(held.asked.arrivals)
        for _ in range(1 + twice):
            self.manager.close(held.asked.ticket)
        self.turn(2)
        assert len(held.asked.arrivals) == told, "told after it was closed"

    # -- misfortunes ---------------------------------------------------------------------

    @precondition(lambda self: len(self.dram) > 0)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.dram.all_keys()))
        self.dram.quarantine(key)
        assert self.dram.find([key]) == [None]

    @rule(data=st.data(), tier=st.integers(0, 1))
    def damage(self, data: st.DataObject, tier: int) -> None:
        contents = self.node.memories[tier].contents
        if contents:
            contents[data.draw(st.sampled_from(sorted(contents)))][0] ^= 1

    @rule(data=st.data(), tier=st.integers(0, 1))
    def lose(self, data: st.DataObject, tier: int) -> None:
        memory = self.node.memories[tier]
        if memory.contents:
            key = data.draw(st.sampled_from(sorted(memory.contents)))
            self.loop.run_until_complete(memory.remove([key]))

    @rule(tier=st.integers(0, 1), fail=st.sampled_from([0.0, 0.5]))
    def fail(self, tier: int, fail: float) -> None:
        self.faulty[tier].faults = Faults(delay=1.0, fail=fail)

    @rule(turns=st.integers(1, 30))
    def let_it_run(self, turns: int) -> None:
        self.turn(turns)

    @rule()
    def settle(self) -> None:
        for _ in range(TURNS_MAX):
            if self.node.is_idle:
                break
            self.turn()
        assert self.node.is_idle, "something waits for ever"
        for held in self.tickets:
            self._check_everything_was_told(held)

    # -- what always holds ---------------------------------------------------------------

    @invariant()
    def everything_holds(self) -> None:
        self.node.check()
        self.claims_are_those_of_tickets_and_of_moves_in_progress()
        self.claimed_bytes_are_the_chunks_own()
        self.no_lease_is_lost()
        self.what_was_announced_is_what_is_there()
        self.what_a_tier_has_can_be_loaded()

    def claims_are_those_of_tickets_and_of_moves_in_progress(self) -> None:
        of_tickets = sum(len(held.asked.ticket.claims) for held in self.tickets)
        if self.manager.offloader._busy:
            assert self.dram.claims >= of_tickets
        else:
            assert self.dram.claims == of_tickets
        held = Counter(record for each in self.tickets for record in each.asked.ticket.claims)
        for record, count in held.items():
            assert self.dram.claims_on(record) >= count

    def claimed_bytes_are_the_chunks_own(self) -> None:
        for held in self.tickets:
            ticket = held.asked.ticket
            places = {index: slot for index, _, slot in unpack_slots(ticket.here)}
            places |= {i: slot for told in held.asked.arrivals for i, _, slot in told.landed}
            for (index, slot), record in zip(places.items(), ticket.claims, strict=True):
                item = ITEMS[held.keys[index]]  # type: ignore[index]
                assert self.dram.chunk(record).key == item.chunk.key
                assert self.dram.view(slot) == item.data
                same = self.dram.arena.generation(slot.offset) == slot.generation
                assert same == self.dram.is_resident(record)

    def no_lease_is_lost(self) -> None:
        assert all(self.dram.is_leased(slot) for slot in self.leased)
        own = sum(slot.length for slot in self.leased)
        assert own <= self.dram.leased_bytes
        if not self.manager.onboarder._pending:
            assert own == self.dram.leased_bytes

    def what_was_announced_is_what_is_there(self) -> None:
        if not self.manager.offloader._busy:
            assert self.node.events.replay() == self.node.residencies()

    def what_a_tier_has_can_be_loaded(self) -> None:
        for memory in self.node.memories:
            for chunk in memory.find(list(memory.contents)):
                assert chunk == ITEMS[chunk.key].chunk  # type: ignore[union-attr]

    def _check_everything_was_told(self, held: Held) -> None:
        ticket = held.asked.ticket
        assert not ticket.coming
        told = Counter(
            [index for arrival in held.asked.arrivals for index, _, _ in arrival.landed]
            + [index for arrival in held.asked.arrivals for index in arrival.failed]
        )
        assert told == Counter(i for i, s in enumerate(held.asked.states) if s == COMING)
        assert set(held.asked.states) <= {MISS, HERE, COMING, PRESENT}

    def teardown(self) -> None:
        try:
            for held in self.tickets:
                self.manager.close(held.asked.ticket)
            self.tickets.clear()
            self.manager.give_back(self.leased)
            self.leased.clear()
            self.settle()
            assert self.dram.claims == self.dram.leased_bytes == 0
            assert self.dram.usage().used_bytes == sum(
                chunk.length for chunk in self.dram.find(self.dram.all_keys()) if chunk
            )
            assert not self.manager.onboarder._pending and not self.manager._waiting
            assert self.node.events.replay() == self.node.residencies()
            every = list(iter(lambda: self.dram.reserve(4096), None))
            assert len(every) == ARENA_BYTES // 4096, "memory did not come back"
        finally:
            for task in self.background:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(self.background))
            self.loop.close()
            self.patches.undo()
            self.node.arena.close()


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    # Add Phase.shrink to understand a failure: it takes minutes, more than a test may.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


def test_the_sequences_cannot_all_be_kept_anywhere() -> None:
    """Else nothing would be evicted and the machine would miss the point."""
    size = sum(item.chunk.length for item in ITEMS.values())
    assert size > max(ARENA_BYTES, *LOWER_BYTES)
    assert all(isinstance(item, StoreItem) for item in ITEMS.values())
