"""Nodes that read from each other, within one test's process: host memory, listener, links."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from kvbm.meter import CountingMeter
from kvbm.note_dict import NoteDict
from kvbm.peers.contents import Contents
from kvbm.peers.network import PeerNetwork
from kvbm.peers.settings import PeerSettings
from kvbm.scrub import Scrubber
from runtime.events import EventPlane
from runtime.events.memory import NullPlane
from storage_tiers.arena import Arena
from storage_tiers.base import Key, LoadItem, LoadOutcome, RemovalReason, StoreItem, TierName
from storage_tiers.dram import DramTier
from tests.kvbm.builders import RecordingEvents, background

TOKEN = "known to all nodes"


class _Listener:
    """What the daemon's catalogue does: residencies lost are announced."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.corrupt: list[tuple[TierName, Key]] = []

    def appeared(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes] = ()) -> None:
        raise AssertionError("no tier here finds anything by itself")

    def noted(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        raise AssertionError("no tier here finds notes by itself")

    def removed(self, tier: TierName, keys: Sequence[Key], reason: RemovalReason) -> None:
        if tier is TierName.DRAM:
            self.contents.removed(tier, keys)
        if reason is RemovalReason.CORRUPT:
            self.corrupt.extend((tier, key) for key in keys)


class PeerNode:
    """One node. `running` is a context manager; its address is known within it."""

    def __init__(
        self,
        name: str = "a",
        *,
        nodes: Sequence[PeerNode] = (),
        nodes_at: Sequence[str] = (),
        dram_bytes: int = 8 << 20,
        plane: EventPlane | None = None,
        **settings: object,
    ) -> None:
        self.meter = CountingMeter()
        self.events = RecordingEvents()
        self.notes = NoteDict(self.events)
        self.contents = Contents(self.notes)
        self.listener = _Listener(self.contents)
        self.arena = Arena.create(dram_bytes)
        self.dram = DramTier(self.arena, self.listener)
        scrubber = Scrubber(self.dram, self.meter, 0)
        given = {
            "port": 0,
            "mover": "plain",
            "token": TOKEN,
            "nodes": [*nodes_at, *(f"127.0.0.1:{node.port}" for node in nodes)],
            **settings,
        }
        self.network = PeerNetwork(
            PeerSettings.model_validate(given),
            self.dram,
            self.contents,
            self.notes,
            self.meter,
            listener=self.listener,
            check=scrubber.check,
            plane=plane or NullPlane(),
            namespace="test",
            node=name,
        )

    @property
    def port(self) -> int:
        return self.network.owner.port

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[PeerNode]:
        await self.network.open()
        await self.network.tier.open()
        async with background(self.network.run):
            yield self
            await self.network.tier.close()
        self.dram.check_integrity()
        assert self.dram.claims == 0 and self.network.owner.office.lent_bytes == 0

    def commit(self, items: Sequence[StoreItem], *, sealed: bool = True) -> None:
        """Have these in host memory, and say so."""
        for item in items:
            slot = self.dram.reserve(item.chunk.length)
            assert slot is not None, "the test's arena is too small"
            self.dram.view(slot)[:] = item.data
            self.dram.commit(slot, item.chunk, sealed=sealed)
        keys = [item.chunk.key for item in items]
        self.notes.learn(keys, [item.chunk.note for item in items])
        self.dram.touch(keys[::-1])
        self.contents.stored(TierName.DRAM, keys)

    def knows(self, items: Sequence[StoreItem]) -> bool:
        """Whether every one of these is known to be at a peer."""
        return None not in self.network.tier.find([item.chunk.key for item in items])

    async def load(self, items: Sequence[StoreItem]) -> tuple[list[LoadOutcome], list[bytes]]:
        """Outcomes of loading into slots of this node's arena, and what they hold then."""
        slots = [self.dram.reserve(item.chunk.length) for item in items]
        views = [self.dram.view(slot) for slot in slots if slot is not None]
        assert len(views) == len(items), "the test's arena is too small"
        wanted = [LoadItem(i.chunk.key, view) for i, view in zip(items, views, strict=True)]
        outcomes = await self.network.tier.load(wanted)
        found = [bytes(view) for view in views]
        for slot in slots:
            if slot is not None:
                self.dram.release(slot)
        return outcomes, found
