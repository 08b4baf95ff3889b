"""A router follows what the daemon makes its stream of: notebook, engines, ring, snapshot."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from kvbm.announce import catch_up, tiers
from router.holdings import OWNER
from router.index import WorkerId
from router.index_writer import TIER_OF
from runtime.events.node_stream import (
    COMPONENT,
    ENDPOINT,
    LABEL_NODE,
    LABEL_PUBLISHER,
    LABEL_READERS,
    readers_label,
)
from tests.kvbm.announce.test_stream_machine import CHUNKS, NODE, WEIGHTS
from tests.kvbm.announce.test_stream_machine import World as DaemonStream
from tests.router.feed.node import Held
from tests.router.feed.world import NAMESPACE, RouterUnderTest, World, held_by
from tests.runtime.planes import until

STEPS = 600
RING_ENOUGH = 1 << 20


class Daemon(DaemonStream):
    """With a record in discovery; its two workers read the two owners."""

    async def serve(self, world: World) -> None:
        runtime = await world.runtime()
        self.readers = {
            (one.routing.worker_id, one.routing.dp_rank): self.tiers.owner(domain)
            for domain, one in enumerate(self.followers)
        }
        labels = {
            LABEL_NODE: NODE,
            LABEL_PUBLISHER: f"{self.stream.publisher:x}",
            LABEL_READERS: readers_label(self.readers),
        }
        endpoint = runtime.namespace(NAMESPACE).component(COMPONENT).endpoint(ENDPOINT)
        await endpoint.serve(self.handler.answer, labels=labels)

    def held(self) -> Held:
        found: Held = {}
        for (who, rank, domain, tier), names in self.truth().items():
            holders = [WorkerId(who, rank)]
            if domain == "cache_owner":
                readers = [
                    WorkerId(*reader) for reader, read in self.readers.items() if read == who
                ]
                holders = [WorkerId(who, OWNER), *readers]
            for holder in holders:
                found.setdefault((holder, TIER_OF[tier]), set()).update(names)
        return found

    async def equals(self, router: RouterUnderTest) -> None:
        self.tiers.flush()
        await until(lambda: router.feeds.status.nodes[0].next == self.stream.next)
        await until(lambda: router.is_live() and not held_by(router.index, staged=True))
        assert held_by(router.index) == self.held()
        router.index.check_integrity()


@pytest.mark.parametrize(("seed", "ring_bytes"), [(1, 0), (2, 1000), (3, 1000), (4, RING_ENOUGH)])
async def test_whatever_happens_on_a_node_the_index_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, ring_bytes: int
) -> None:
    monkeypatch.setattr(catch_up, "BLOCKS_AT_ONCE", 3)
    monkeypatch.setattr(tiers, "CHUNKS_AT_ONCE", 3)
    dice, daemon = Random(seed), Daemon(ring_bytes)
    if ring_bytes == RING_ENOUGH:
        daemon.tiers._backlog_max = 1 << 16  # and nothing is left untold
    weights = {name: WEIGHTS[name] for name in ("learn", "stored", "removed", "cached", "evicted")}
    weights |= {"lost": 0.3, "turn": 6}
    plane = daemon.plane
    async with World("memory", tmp_path, plane) as world:
        await daemon.serve(world)
        async with world.router(messages=64) as router:
            await until(router.is_live)
            for number in range(STEPS):
                (what,) = dice.choices(list(weights), list(weights.values()))
                numbers = dice.sample(range(CHUNKS), dice.choice([1, 2, 3, 12]))
                await daemon.step(what, dice.randrange(6), sorted(numbers))
                if dice.random() < 0.02:
                    router.feeds._messages.deliver = lambda _: None  # type: ignore[union-attr,method-assign]
                elif dice.random() < 0.1:
                    vars(router.feeds._messages).pop("deliver", None)
                if number % 200 == 199:
                    vars(router.feeds._messages).pop("deliver", None)
                    await daemon.equals(router)
                await asyncio.sleep(0)
            status = router.feeds.status.nodes[0]
            assert status.gaps_total > 0
            assert (status.snapshots_total == 1) is (ring_bytes == RING_ENOUGH)
            assert status.replayed_total > 0 or ring_bytes < RING_ENOUGH
