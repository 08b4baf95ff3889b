"""G2, G3 and G4 of a node, simulated: which blocks are there, and when a load of them ends.

Blocks are written through to every tier the moment they are computed, as the daemon does; writing
takes no time and no bandwidth here, which is an approximation. Each tier is bounded and evicts
what was used least recently, of one sequence the last block first. Loads on one link go one after
another; those on different links at the same time. What was loaded from G3 or G4 is in G2
afterwards. One node's tiers are shared by its engines, a G4 possibly by all nodes: give it to each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mocker.content import Chain
from mocker.events import BlocksRemoved, BlocksStored, Emit, Tier
from mocker.timing import LinkTiming, TierTiming


@dataclass(slots=True)
class Link:
    """One transfer at a time, in the order they are asked for."""

    timing: LinkTiming
    busy_until_ps: int = 0

    def load(self, now_ps: int, count_bytes: int) -> int:
        """When the bytes are there."""
        begin_ps = max(now_ps, self.busy_until_ps)
        self.busy_until_ps = begin_ps + self.timing.transfer_ps(count_bytes)
        return self.busy_until_ps + self.timing.latency_ps


class LruTier:
    """A bounded set of block hashes."""

    def __init__(self, name: Tier, capacity: int) -> None:
        assert capacity > 0
        self.name = name
        self.capacity = capacity
        self._kept: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._kept

    def touch(self, hashes: Sequence[int]) -> None:
        """They were used now: the first of the sequence stays longest."""
        for block_hash in reversed(hashes):
            if block_hash in self._kept:
                self._kept.move_to_end(block_hash)

    def store(self, hashes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Indices that are new, ascending, and hashes that had to go for them.

        Of a run longer than the tier the end is not kept.
        """
        kept = self._kept
        hashes = hashes[: self.capacity]
        new: list[int] = []
        for index in range(len(hashes) - 1, -1, -1):
            block_hash = hashes[index]
            if block_hash in kept:
                kept.move_to_end(block_hash)
            else:
                kept[block_hash] = None
                new.append(index)
        new.reverse()
        return new, [kept.popitem(last=False)[0] for _ in range(len(kept) - self.capacity)]

    def check_integrity(self) -> None:
        assert len(self._kept) <= self.capacity


@dataclass(frozen=True, slots=True)
class Found:
    """Consecutive blocks of a lookup that come from one tier."""

    tier: Tier
    blocks: int


class LowerTiers(Protocol):
    """What an engine asks of the tiers below it."""

    @property
    def node(self) -> int: ...

    @property
    def timing(self) -> TierTiming: ...

    def find(self, hashes: Sequence[int], first: int, end: int) -> list[Found]: ...

    def load(
        self, now_ps: int, bus: Link, runs: Sequence[Found], hashes: Sequence[int], block_bytes: int
    ) -> int: ...

    def promote(self, at_ps: int, engine: int, chain: Chain, first: int, end: int) -> None: ...

    def store(self, at_ps: int, engine: int, chain: Chain, first: int, end: int) -> None: ...

    def check_integrity(self) -> None: ...


@dataclass
class NodeTiers:
    """A tier that is None is not there. `emit` may be set later, before the first request."""

    node: int
    timing: TierTiming
    g2: LruTier | None = None
    g3: LruTier | None = None
    g4: LruTier | None = None
    emit: Emit | None = None
    links: dict[Tier, Link] = field(init=False)

    def __post_init__(self) -> None:
        # G2 is behind each engine's own bus: its link belongs to the engine.
        self.links = {"G3": Link(self.timing.g3), "G4": Link(self.timing.g4)}

    @property
    def kept(self) -> list[LruTier]:
        return [tier for tier in (self.g2, self.g3, self.g4) if tier is not None]

    def find(self, hashes: Sequence[int], first: int, end: int) -> list[Found]:
        """Where blocks from `first` on come from, up to the first that is nowhere; no change."""
        runs: list[Found] = []
        index = first
        while index < end:
            tier = self._first_with(hashes[index])
            if tier is None:
                break
            begin = index
            while index < end and self._first_with(hashes[index]) is tier:
                index += 1
            runs.append(Found(tier.name, index - begin))
        return runs

    def load(
        self, now_ps: int, bus: Link, runs: Sequence[Found], hashes: Sequence[int], block_bytes: int
    ) -> int:
        """Begin to load what `find` found; the time when all of it is in the engine."""
        end_ps = now_ps
        index = 0
        for run in runs:
            link = bus if run.tier == "G2" else self.links[run.tier]
            end_ps = max(end_ps, link.load(now_ps, run.blocks * block_bytes))
            used = hashes[index : index + run.blocks]
            for tier in self.kept:
                tier.touch(used)
            index += run.blocks
        return end_ps

    def promote(self, at_ps: int, engine: int, chain: Chain, first: int, end: int) -> None:
        """Blocks that were loaded are in G2 now."""
        if self.g2 is not None:
            self._store(self.g2, at_ps, engine, chain, first, end)

    def store(self, at_ps: int, engine: int, chain: Chain, first: int, end: int) -> None:
        """Blocks that were computed go to every tier."""
        for tier in self.kept:
            self._store(tier, at_ps, engine, chain, first, end)

    def check_integrity(self) -> None:
        for tier in self.kept:
            tier.check_integrity()

    def _first_with(self, block_hash: int) -> LruTier | None:
        for tier in (self.g2, self.g3, self.g4):
            if tier is not None and block_hash in tier:
                return tier
        return None

    def _store(
        self, tier: LruTier, at_ps: int, engine: int, chain: Chain, first: int, end: int
    ) -> None:
        new, evicted = tier.store(chain.hashes[first:end])
        if self.emit is None:
            return
        if evicted:  # none of the newcomers: those were used last
            self.emit(BlocksRemoved(at_ps, engine, self.node, tier.name, evicted))
        emit_runs(self.emit, (at_ps, engine, self.node, tier.name), chain, [first + i for i in new])


def emit_runs(
    emit: Emit, what: tuple[int, int, int, Tier], chain: Chain, indices: Sequence[int]
) -> None:
    """One stored event for each run of consecutive blocks."""
    at_ps, engine, node, tier = what
    begin = 0
    for position in range(1, len(indices) + 1):
        if position < len(indices) and indices[position] == indices[position - 1] + 1:
            continue
        first, end = indices[begin], indices[position - 1] + 1
        parent = chain.hashes[first - 1] if first else None
        emit(
            BlocksStored(
                *(at_ps, engine, node, tier, parent),
                chain.hashes[first:end],
                chain.locals[first:end],
            )
        )
        begin = position
