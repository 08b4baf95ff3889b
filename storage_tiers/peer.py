"""The peer tier: chunks in the host memory of other nodes, to be read and nothing else.

What lies there is the other node's to keep, evict and announce; this tier knows what the nodes
said they have and brings chunks over, verified. One that has it is asked after the other until
the load's deadline. Each node is a `PeerSource`; how it is reached is the source's affair.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from storage_tiers.base import (
    Chunk,
    Corrupt,
    Failed,
    Full,
    Key,
    Loaded,
    LoadItem,
    LoadOutcome,
    Missing,
    RecoveryReport,
    RemovalReason,
    StoreItem,
    StoreOutcome,
    TierListener,
    TierName,
    TierUsage,
)
from storage_tiers.settle import Gate, settled

_CLOSED: Final = Failed("the peer tier is closed")
_READ_ONLY: Final = Full("the memory of other nodes is theirs to fill")


class PeerSource(Protocol):
    """One other node. `lengths` and `forget` cost a lookup in a dictionary a key."""

    @property
    def lengths(self) -> dict[Key, int]:
        """Payload bytes of each chunk that the node said it has; empty while it is away."""
        ...

    @property
    def capacity_bytes(self) -> int:
        """Of its host memory; 0 while it is away."""
        ...

    @property
    def used_bytes(self) -> int:
        """The sum of `lengths`."""
        ...

    @property
    def bytes_in_flight(self) -> int: ...

    async def read(self, items: Sequence[LoadItem], deadline: float) -> list[LoadOutcome]:
        """Bring these chunks over before `deadline` (monotonic), and verify them.

        Not cancelled by the tier; when it returns, nothing writes to the buffers any more. A chunk
        that turned out missing or damaged is forgotten.
        """
        ...

    def forget(self, keys: Sequence[Key]) -> None:
        """These are not there, as far as this node is concerned, until the peer tells it anew."""
        ...


class PeerTier:
    """Read-only: `store` answers Full. Announces no residencies, only what came damaged."""

    name = TierName.PEER

    def __init__(
        self,
        sources: Callable[[], Sequence[PeerSource]],
        listener: TierListener,
        *,
        deadline_s: float,
        mover: Callable[[], str],
    ) -> None:
        """`deadline_s` bounds a whole `load`, whoever is asked."""
        self._sources = sources
        self._listener = listener
        self._deadline_s = deadline_s
        self._mover = mover
        self._gate = Gate()
        self._loaded_bytes = self._corrupt = 0
        self._errors: Counter[str] = Counter()

    async def open(self) -> RecoveryReport:
        self._gate.shut = False
        return RecoveryReport(self.name)

    async def close(self) -> None:
        await self._gate.close()

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        found: list[Chunk | None] = [None] * len(keys)
        known = [source.lengths for source in self._sources()]
        for index, key in enumerate(keys):
            for lengths in known:
                if (length := lengths.get(key)) is not None:
                    found[index] = Chunk(key, length, 0, None, 0)
                    break
        return found

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        return [_READ_ONLY] * len(items)

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        if self._gate.shut:
            return [_CLOSED] * len(items)
        with self._gate:
            return await settled(self._load(items))

    async def remove(self, keys: Sequence[Key]) -> None:
        """Here only: a node that has them says so again when they change."""
        for source in self._sources():
            source.forget(keys)

    def refusal(self, chunk: Chunk) -> str | None:
        return "read_only"

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        """Nothing: what another node keeps is ordered by its own use, and lacks nothing of ours."""
        return []

    def usage(self) -> TierUsage:
        sources = self._sources()
        used = sum(source.used_bytes for source in sources)
        return TierUsage(
            tier=self.name,
            mover=self._mover(),
            capacity_bytes=max(used, sum(source.capacity_bytes for source in sources)),
            used_bytes=used,
            chunks=sum(len(source.lengths) for source in sources),
            loaded_bytes_total=self._loaded_bytes,
            corrupt_total=self._corrupt,
            errors_total=dict(self._errors),
        )

    # -- below ---------------------------------------------------------------------------

    async def _load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        deadline = time.monotonic() + self._deadline_s
        outcomes: list[LoadOutcome] = [Missing()] * len(items)
        asked: dict[int, set[int]] = {index: set() for index in range(len(items))}
        while time.monotonic() < deadline:
            turns = self._assign(items, asked)
            if not turns:
                break
            reads = [
                source.read([items[index] for index in indexes], deadline)
                for source, indexes in turns.values()
            ]
            # All of them to their end, a fault of ours or not: they write to the buffers.
            answers = await asyncio.gather(*reads, return_exceptions=True)
            for (_, indexes), answer in zip(turns.values(), answers, strict=True):
                if isinstance(answer, BaseException):
                    raise answer
                for index, outcome in zip(indexes, answer, strict=True):
                    self._note(items[index], outcome)
                    outcomes[index] = outcome
                    if isinstance(outcome, Loaded):
                        del asked[index]
        return outcomes

    def _assign(
        self, items: Sequence[LoadItem], asked: dict[int, set[int]]
    ) -> dict[int, tuple[PeerSource, list[int]]]:
        """Whom to ask for what is not here yet: of those not asked, the least busy that has it."""
        turns: dict[int, tuple[PeerSource, list[int]]] = {}
        sources = sorted(self._sources(), key=lambda source: source.bytes_in_flight)
        for index, before in asked.items():
            for source in sources:
                if id(source) not in before and items[index].key in source.lengths:
                    before.add(id(source))
                    turns.setdefault(id(source), (source, []))[1].append(index)
                    break
        return turns

    def _note(self, item: LoadItem, outcome: LoadOutcome) -> None:
        match outcome:
            case Loaded():
                self._loaded_bytes += outcome.chunk.length
            case Corrupt():
                self._corrupt += 1
                self._listener.removed(self.name, [item.key], RemovalReason.CORRUPT)
            case Failed():
                self._errors["load"] += 1
            case Missing():
                self._errors["gone"] += 1  # evicted there meanwhile
