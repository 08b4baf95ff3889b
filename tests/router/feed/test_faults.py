"""What goes wrong between nodes and a router, and the index after it: equal to the truth.

The outage of NATS takes 2 s, or what KVBM_TEST_OUTAGE_S says (30 was tried).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router import holdings
from router.index import Tier, WorkerId
from router.node_feed import NodeState
from runtime.events.node_stream import Rows, encode_catch_up
from runtime.events.router_event import StorageTier
from runtime.requests import RequestContext
from tests.router.feed.node import FakeNode, Life
from tests.router.feed.world import NAMESPACE, RouterUnderTest, World, held_by, truth_of
from tests.runtime.planes import until

OUTAGE_S = float(os.environ.get("KVBM_TEST_OUTAGE_S", "2"))
READERS = {(0x11, 0): 7, (0x11, 1): 7, (0x12, 0): 8}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World("memory", tmp_path) as world:
        yield world


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[World]:
    async with World("nats", tmp_path) as world:
        yield world


async def lived(world: World, events: int = 100, *, ring: int = 1024) -> tuple[FakeNode, Life]:
    node = await world.node(ring=ring)
    life = Life(node, random.Random(events), READERS, [7, 8])
    life.live(events)
    await node.relabel()
    return node, life


# -- the way -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_loss_duplicates_and_reordering_come_to_nothing(world: World, seed: int) -> None:
    node, life = await lived(world)
    dice = random.Random(seed)
    late: list[bytes] = []

    def send(data: bytes) -> None:
        if dice.random() < 0.1:
            return
        late.append(data)
        if dice.random() < 0.1:
            late.append(data)
        while len(late) > 4 or (late and dice.random() < 0.7):
            node._publish(late.pop(dice.randrange(len(late))))

    async with world.router() as router:
        await until(router.is_live)
        node.send = send
        for _ in range(30):
            life.live(10)
            await asyncio.sleep(0.005)
        await router.equals(node)
        status = router.feeds.status.nodes[0]
        assert status.gaps_total > 0 and status.duplicates_total > 0
        assert status.replayed_total > 0 and status.snapshots_total == 1


async def test_a_late_event_is_waited_for_and_not_asked_for(world: World) -> None:
    node, life = await lived(world)
    async with world.router(reorder=5.0, probe_interval=60.0) as router:
        await until(router.is_live)
        questions = node.questions
        late: list[bytes] = []
        node.send = late.append
        life.live(20)
        for data in [*late[1:], late[0]]:
            node._publish(data)
        await router.equals(node)
        assert node.questions == questions


async def test_the_last_events_lost_are_found_by_a_probe(world: World) -> None:
    node, life = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        node.send = lambda _: None
        life.live(5)
        await router.equals(node)
        assert router.feeds.status.nodes[0].replayed_total == 5


async def test_past_the_ring_a_snapshot_takes_the_place_of_what_was_known(world: World) -> None:
    node, life = await lived(world, ring=8)
    async with world.router() as router:
        await until(router.is_live)
        node.send = lambda _: None
        node.cleared("worker", 0x11, 0)
        node.cleared("cache_owner", 8)
        life.live(50)
        node.send = node._publish
        life.live(1)
        await router.equals(node)
        assert router.feeds.status.nodes[0].snapshots_total == 2


async def test_a_slow_router_loses_events_and_fetches_them(nats: World) -> None:
    node, life = await lived(nats, ring=100_000)
    async with nats.router(messages=16) as router:
        await until(router.is_live)
        life.live(3000)
        await router.equals(node)
        assert router.feeds.status.dropped_total > 0
        assert router.feeds.status.nodes[0].replayed_total > 0


async def test_an_outage_of_nats_is_made_good(nats: World) -> None:
    node, life = await lived(nats)
    async with nats.router() as router:
        await until(router.is_live)
        assert nats.nats is not None
        nats.nats.stop()
        end = asyncio.get_running_loop().time() + OUTAGE_S
        while asyncio.get_running_loop().time() < end:
            life.live(5)
            await asyncio.sleep(0.05)
        # Questions go over the request plane: the router is not blind meanwhile.
        await until(lambda: router.feeds.status.nodes[0].next == node.sequence)
        nats.nats.start()
        life.live(50)
        await router.equals(node)
        life.live(50)
        await router.equals(node)


async def test_events_that_make_no_sense_harm_nobody(world: World) -> None:
    node, life = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        node.send(b"")
        node.send(b"\x93\x01\x02\x03")
        node.send(node.envelope(b"no event"))
        node.send(node.envelope(b""))
        life.live(20)
        await router.equals(node)
        status = router.feeds.status
        assert status.malformed_total == 2
        assert status.nodes[0].malformed_total == 2


# -- nodes -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
async def test_a_daemon_that_was_restarted_is_another_run(world: World, keep: bool) -> None:
    node, life = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        await node.stop()
        node.begin(keep=keep)
        life.live(30)
        await node.serve()
        life.live(30)
        await router.equals(node)


async def test_a_daemon_that_lost_everything_leaves_nothing(world: World) -> None:
    node, _ = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        node.begin(keep=False)
        node.readers = {}
        await node.relabel()
        await router.equals(node)
        assert len(router.index) == 0 and set(router.index.workers) == {None}


async def test_a_replay_with_a_hole_is_not_believed(world: World) -> None:
    node, life = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        node.send = lambda _: None
        life.live(9)
        del node._ring[-4]
        node.send = node._publish
        life.live(1)
        await router.equals(node)
        status = router.feeds.status.nodes[0]
        assert (status.failures_total, status.snapshots_total) == (1, 2)


async def test_a_daemon_that_was_killed_and_came_back_is_followed_beside_its_old_record(
    world: World,
) -> None:
    node, life = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        killed = node._serving
        assert killed is not None
        await killed.server.close()  # its record stays, as long as its lease
        node.begin(keep=False)
        life.live(30)
        await node.serve()
        life.live(30)
        await router.equals(node)
        await killed._registration.deregister()
        life.live(30)
        await router.equals(node)
        assert router.feeds.status.nodes[0].snapshots_total == 2


async def test_a_new_run_that_discovery_has_not_told_of_is_learned_from_its_answer(
    world: World,
) -> None:
    node, life = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        node.begin()
        life.live(30)
        await router.equals(node)
        life.live(30)  # heard: its publisher is known
        await until(lambda: router.feeds.status.nodes[0].next == node.sequence)
        await node.relabel()
        await router.equals(node)


async def test_a_node_killed_amid_its_snapshot_leaves_what_was_known_and_no_trace(
    world: World,
) -> None:
    node, life = await lived(world, ring=8)
    async with world.router() as router:
        await until(router.is_live)
        before = held_by(router.index)
        amid, forever = asyncio.Event(), asyncio.Event()
        rows = 0

        async def pause() -> None:
            nonlocal rows
            rows += 1
            if rows == 4:
                amid.set()
                await forever.wait()

        node.pause = pause
        node.begin()
        life.live(30)
        await node.relabel()
        await asyncio.wait_for(amid.wait(), 60)
        await until(lambda: len(held_by(router.index, staged=True)) >= 3)
        assert held_by(router.index) == before  # half a snapshot lies beside it
        assert node._serving is not None
        await node._serving.server.close()
        await until(lambda: router.feeds.status.nodes[0].failures_total > 0)
        await until(lambda: not held_by(router.index, staged=True))
        assert held_by(router.index) == before
        node.pause = None
        await node.stop()
        await node.serve()
        await router.equals(node)


async def test_a_node_that_left_is_forgotten_and_one_that_comes_back_soon_is_not(
    world: World,
) -> None:
    node, life = await lived(world)
    async with world.router(gone_for=0.5) as router:
        await until(router.is_live)
        await node.stop()
        await until(lambda: router.state("a") is NodeState.GONE)
        assert held_by(router.index) == truth_of(node)
        await node.serve()
        await router.equals(node)
        assert router.feeds.status.nodes[0].snapshots_total == 1
        await node.stop()
        await until(lambda: not router.feeds.status.nodes)
        assert held_by(router.index) == {} and len(router.index) == 0
        life.live(30)
        await node.serve()
        await router.equals(node)


async def test_a_node_that_does_not_answer_is_stale_then_forgotten_and_asked_again(
    world: World,
) -> None:
    node, life = await lived(world)
    async with world.router(stale_for=0.5) as router:
        await until(router.is_live)
        assert node._serving is not None
        await node._serving.server.close()
        await until(lambda: router.state("a") is NodeState.STALE)
        assert held_by(router.index) == truth_of(node)
        assert router.feeds.status.nodes[0].error
        await until(lambda: held_by(router.index) == {})
        assert router.state("a") is NodeState.STALE
        life.live(30)
        await node.stop()
        await node.serve()
        await router.equals(node)


async def test_a_stale_node_that_still_speaks_is_still_heard(world: World) -> None:
    node, life = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        assert node._serving is not None
        await node._serving.server.close()
        await until(lambda: router.state("a") is NodeState.STALE)
        life.live(30)
        await until(lambda: held_by(router.index) == truth_of(node))


async def test_a_snapshot_of_nonsense_is_refused_and_asked_for_again(world: World) -> None:
    node, life = await lived(world)
    async with world.router(stale_for=0.0) as router:
        await until(router.is_live)
        before = held_by(router.index)
        nonsense = encode_catch_up(Rows(1, -1, "worker", StorageTier.DEVICE, b"", b""))
        honest = node._rows
        node._rows = lambda: [nonsense]  # type: ignore[method-assign]
        router.feeds._nodes["a"].refresh()
        await until(lambda: router.feeds.status.nodes[0].failures_total > 0)
        assert held_by(router.index) == before
        await until(lambda: router.state("a") is NodeState.STALE)
        node._rows = honest  # type: ignore[method-assign]
        life.live(10)
        await router.equals(node)


@pytest.mark.parametrize("answer", [[], [b"?"], [b"", b""]])
async def test_an_answer_that_is_none_is_a_failure(world: World, answer: list[bytes]) -> None:
    node = await world.node(serve=False)

    async def answers(payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        for item in answer:
            yield item

    node._answer = answers  # type: ignore[assignment,method-assign]
    await node.serve()
    async with world.router() as router:
        await until(lambda: router.state("a") is NodeState.STALE)
        assert router.feeds.status.nodes[0].error


# -- discovery and routers ---------------------------------------------------------------


async def test_while_discovery_is_away_nodes_are_followed_and_asked(world: World) -> None:
    node, life = await lived(world, ring=8)
    async with world.router() as router:
        await until(router.is_live)
        with world.discovery_away():
            node.send = lambda _: None
            life.live(30)
            node.send = node._publish
            life.live(5)
            await router.equals(node)
            node.begin()  # a new run, at the old address, that nobody was told of
            life.live(30)
            await router.equals(node)
        await node.relabel()
        await router.equals(node)


async def test_a_record_that_was_lost_and_put_again_costs_nothing(world: World) -> None:
    node, life = await lived(world)
    async with world.router(gone_for=5.0) as router:
        await until(router.is_live)
        for lease in list(world.store._leases):
            world.store.expire(lease)
        await until(lambda: router.state("a") is NodeState.GONE)
        life.live(30)
        await router.equals(node)
        assert router.feeds.status.nodes[0].snapshots_total == 1


@pytest.mark.parametrize(
    "labels", [{"publisher": "zz"}, {"publisher": "1", "readers": "["}, {"node": ""}]
)
async def test_a_record_that_cannot_be_followed_is_counted(
    world: World, labels: dict[str, str]
) -> None:
    node, _ = await lived(world)
    async with world.router() as router:
        await until(router.is_live)
        bad = await world.node("b", serve=False)
        endpoint = bad._runtime.namespace(NAMESPACE).component("kvbm").endpoint("kv-events")
        await endpoint.serve(bad._answer, labels={"node": "b"} | labels)
        await until(lambda: router.feeds.status.refused_total > 0)
        await router.equals(node)


async def test_a_router_that_starts_anew_is_exact_while_the_node_goes_on(nats: World) -> None:
    node, life = await lived(nats, 400)

    async def go_on() -> None:
        while True:
            life.live(5)
            await asyncio.sleep(0.002)

    task = asyncio.create_task(go_on())
    for _ in range(3):
        async with nats.router() as router:
            await until(lambda: router.feeds.status.nodes[:1] != ())
            await until(router.is_live)
            await asyncio.sleep(0.1)
    task.cancel()
    async with nats.router() as first, nats.router() as second:
        await first.equals(node)
        await second.equals(node)


# -- readers -----------------------------------------------------------------------------


def lower(router: RouterUnderTest, worker: WorkerId) -> tuple[int, ...]:
    return router.index.held_blocks(worker)[Tier.G2 :]


async def test_a_worker_that_joins_an_owner_gets_its_blocks_and_loses_them_when_it_leaves(
    world: World,
) -> None:
    node, life = await lived(world, 300)
    joins = WorkerId(0x99, 0)
    async with world.router() as router:
        await until(router.is_live)
        for owner in (7, 8, None):
            node.readers = dict(READERS) | ({(0x99, 0): owner} if owner else {})
            life.live(20)
            await node.relabel()
            life.live(20)
            expected = router.index.held_blocks
            await until(lambda: held_by(router.index) == truth_of(node))
            assert sum(lower(router, joins)) == (
                0 if owner is None else sum(node_lower(node, owner))
            )
            assert expected(WorkerId(0x11, 0))
        await router.equals(node)
        assert node.snapshots == 1


async def test_workers_join_and_leave_while_blocks_come_and_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "SLICE_BLOCKS", 2)
    node, life = await lived(world, 300)
    async with world.router() as router:
        await until(router.is_live)
        for owner in (7, 8, None, 7):
            node.readers = dict(READERS) | ({(0x99, 0): owner} if owner else {})
            await node.relabel()
            for _ in range(300):  # turns of the event loop, of which each slice takes one
                life.live(1)
                await asyncio.sleep(0)
            await router.equals(node)


def node_lower(node: FakeNode, owner: int) -> list[int]:
    return [len(held) for place, held in node.held.items() if place[:2] == ("cache_owner", owner)]


async def test_all_of_an_engines_own_blocks_go_and_those_it_reads_stay(world: World) -> None:
    node, _ = await lived(world, 300)
    async with world.router() as router:
        await until(router.is_live)
        node.cleared("worker", 0x11, 0)
        await router.equals(node)
        held = router.index.held_blocks(WorkerId(0x11, 0))
        assert held[Tier.G1] == 0 and sum(held) > 0


async def test_a_worker_that_the_router_forgot_is_fetched_again_when_it_comes_back(
    world: World,
) -> None:
    node, _ = await lived(world, 300)
    async with world.router(probe_interval=60.0) as router:
        await until(router.is_live)
        router.index.remove_worker(WorkerId(0x11, 0))
        router.feeds.worker_added(WorkerId(0x11, 0))
        await until(lambda: held_by(router.index) == truth_of(node))
