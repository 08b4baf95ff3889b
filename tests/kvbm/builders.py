"""What the block manager's tests arrange: a node over memory tiers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvbm.manager import Arrivals, BlockManager, Catalogue, Ticket, Wanted
from kvbm.meter import CountingMeter
from kvbm.note_dict import NoteDict
from kvbm.offload import LaneSettings
from kvbm.protocol import unpack_slots
from storage_tiers.arena import Arena, Slot
from storage_tiers.base import Chunk, Key, StoreItem, Tier, TierName
from storage_tiers.dram import DramTier
from storage_tiers.memory import MemoryTier
from storage_tiers.testing import make_items

CHUNK_BYTES = 8192
WAIT_S = 60.0
"""Bound of every wait here; what is waited for takes milliseconds."""

Wrap = Callable[[MemoryTier], Tier]


class RecordingEvents:
    """Keeps what was announced, and replays it."""

    def __init__(self) -> None:
        self.announced: list[tuple[str, TierName, Key]] = []

    def stored(self, tier: TierName, keys: Sequence[Key]) -> None:
        self.announced.extend(("stored", tier, key) for key in keys)

    def removed(self, tier: TierName, keys: Sequence[Key]) -> None:
        self.announced.extend(("removed", tier, key) for key in keys)

    def replay(self) -> set[tuple[TierName, Key]]:
        """Which residencies someone who heard every announcement believes in."""
        residencies: set[tuple[TierName, Key]] = set()
        for change, tier, key in self.announced:
            if change == "stored":
                residencies.add((tier, key))
            else:
                residencies.discard((tier, key))
        return residencies


async def until(condition: Callable[[], object], *, within_s: float = WAIT_S) -> None:
    """Wait for a condition. Raises TimeoutError if it does not come true."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def background(*runs: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run these endless coroutines meanwhile; raises what one of them dies of."""
    tasks = [asyncio.ensure_future(run()) for run in runs]
    try:
        yield
    finally:
        died = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in died:
            task.result()


class Gate:
    """A `sleep` for slowed tiers that lasts until the gate is opened."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self.waiting = 0

    def open(self) -> None:
        self._opened.set()

    async def __call__(self, seconds: float) -> None:
        self.waiting += 1
        try:
            await self._opened.wait()
        finally:
            self.waiting -= 1


@dataclass
class Node:
    """A manager, what is below it and what it told."""

    arena: Arena
    dram: DramTier
    memories: list[MemoryTier]  # what lies in each lower tier, whatever it is wrapped in
    manager: BlockManager
    events: RecordingEvents
    notes: NoteDict
    meter: CountingMeter

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with background(self.manager.offloader.run, self.manager.onboarder.run):
            yield

    async def settle(self) -> None:
        """Wait until nothing is to be moved any more."""
        async with asyncio.timeout(WAIT_S):
            while not self.is_idle:
                await asyncio.sleep(0.002)

    @property
    def is_idle(self) -> bool:
        offloader, onboarder = self.manager.offloader, self.manager.onboarder
        return not (offloader._busy or any(offloader.depth.values()) or onboarder._pending)

    def residencies(self) -> set[tuple[TierName, Key]]:
        """Which chunk really is in which tier."""
        found = {(TierName.DRAM, key) for key in self.dram.all_keys()}
        for memory in self.memories:
            found |= {(memory.name, key) for key in memory.contents}
        return found

    def check(self) -> None:
        self.manager.check_integrity()
        for memory in self.memories:
            memory.check_integrity()
        there = {key for _, key in self.residencies()}
        assert all(key in there for key in self.notes)

    def fill(self, slots: Sequence[Slot], items: Sequence[StoreItem]) -> list[tuple[Slot, Chunk]]:
        """Write the chunks as an engine does; what to commit for them."""
        filled: list[tuple[Slot, Chunk]] = []
        for slot, item in zip(slots, items, strict=True):
            self.dram.view(slot)[:] = item.data
            chunk = item.chunk
            filled.append((slot, replace(chunk, checksum=0)))
        return filled

    def commit(self, items: Sequence[StoreItem]) -> None:
        """Have these chunks come from an engine."""
        slots = self.manager.lease(items[0].chunk.length, len(items))
        assert len(slots) == len(items), "the test's arena is too small"
        self.manager.commit(self.fill(slots, items))

    def match(self, *groups: Wanted) -> Asked:
        asked = Asked()
        asked.ticket = self.manager.match(groups, asked.arrivals.append)
        assert not asked.arrivals, "told from within the call"
        self.manager.note_use(asked.ticket, groups)
        return asked


@dataclass
class Asked:
    """A ticket and what was told to its owner later."""

    arrivals: list[Arrivals] = field(default_factory=list)
    ticket: Ticket = field(init=False)

    @property
    def states(self) -> list[int]:
        return list(self.ticket.states)

    @property
    def here(self) -> dict[int, int]:
        """Index -> source of what was there at once."""
        return {index: source for index, source, _ in unpack_slots(self.ticket.here)}

    @property
    def landed(self) -> dict[int, int]:
        """Index -> source of what came later."""
        return {i: source for told in self.arrivals for i, source, _ in told.landed}

    @property
    def failed(self) -> list[int]:
        return sorted(index for told in self.arrivals for index in told.failed)


def make_node(
    *wraps: Wrap,
    dram_bytes: int = 1 << 20,
    lower_bytes: Sequence[int] = (1 << 22, 1 << 22),
    settings: LaneSettings | None = None,
    lease_bytes_max: int = 1 << 20,
    onboard_bytes_max: int = 1 << 20,
) -> Node:
    """A node with G3 and G4 in memory, each in its wrap if one is given."""
    events, meter = RecordingEvents(), CountingMeter()
    notes = NoteDict(events)
    catalogue = Catalogue(notes, notes)
    arena = Arena.create(dram_bytes)
    dram = DramTier(arena, catalogue)
    memories = [
        MemoryTier(capacity, catalogue, name=name)
        for capacity, name in zip(lower_bytes, (TierName.SSD, TierName.S3), strict=True)
    ]
    tiers: list[Tier] = [
        wraps[place](memory) if place < len(wraps) else memory
        for place, memory in enumerate(memories)
    ]
    manager = BlockManager(
        dram,
        [(tier, settings or LaneSettings()) for tier in tiers],
        notes,
        meter,
        notes=notes,
        lease_bytes_max=lease_bytes_max,
        onboard_bytes_max=onboard_bytes_max,
        quarantine=catalogue.quarantine,
    )
    return Node(arena, dram, memories, manager, events, notes, meter)


def chunks_of(
    name: str, count: int, length: int = CHUNK_BYTES, *, chained: bool = True
) -> list[StoreItem]:
    """A sequence's chunks, root first, or unrelated ones."""
    return make_items(name, count, length, chained=chained)


def keys_of(items: Sequence[StoreItem]) -> list[Key]:
    return [item.chunk.key for item in items]


def wanted(items: Sequence[StoreItem], *, window: int = 0, tokens_per_chunk: int = 16) -> Wanted:
    return Wanted(tokens_per_chunk, window, keys_of(items))
