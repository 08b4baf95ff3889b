"""An engine's events as vLLM's own publisher sends them: in order, over gaps, crashes and loss."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from runtime.events import engine_feed
from runtime.events.engine_feed import (
    EngineEvents,
    EngineFeed,
    EngineFeedOptions,
    FeedItem,
    Lost,
    Restarted,
    rank_endpoint,
)
from runtime.events.engine_wire import AllBlocksCleared, BlockRemoved, BlockStored
from runtime.server_process import free_ports
from tests.runtime.forked_engines import Engine, Engines
from tests.runtime.planes import until

WAIT_S = 60.0

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="tested with vLLM's own publisher"
)


@pytest.fixture(scope="module", autouse=True)
def engines() -> Iterator[Engines]:
    """Starts while tests that need no engine run."""
    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture
def engine(engines: Engines) -> Iterator[Engine]:
    """Begins with `start`, and may be killed and started again."""
    engine = Engine(engines)
    yield engine
    engine.do("kill")


@pytest.fixture
def ports() -> tuple[int, int]:
    first, second = free_ports(2)
    return first, second


@pytest.fixture
async def feeds() -> AsyncIterator[Callable[..., Any]]:
    opened: list[EngineFeed] = []

    async def make(ports: tuple[int, int | None], **other: Any) -> EngineFeed:
        replay = None if ports[1] is None else f"tcp://127.0.0.1:{ports[1]}"
        options = EngineFeedOptions(f"tcp://127.0.0.1:{ports[0]}", replay, **other)
        feed = EngineFeed(options)
        await feed.start()
        opened.append(feed)
        return feed

    yield make
    for feed in opened:
        await feed.close()


async def take(feed: EngineFeed, count: int) -> list[FeedItem]:
    async with asyncio.timeout(WAIT_S):
        return [await anext(feed) for _ in range(count)]


def numbers(items: list[FeedItem]) -> list[int]:
    """What `engine_publisher.stored` was given; checks that nothing but events came."""
    found = []
    for item in items:
        assert isinstance(item, EngineEvents)
        (event,) = item.batch.events
        assert isinstance(event, BlockStored)
        first = event.block_hashes[0]
        assert isinstance(first, int)
        found.append(first // 1000)
    return found


# -- a publisher that is none of vLLM's --------------------------------------------------------


@pytest.fixture
async def raw(ports: tuple[int, int]) -> AsyncIterator[RawEngine]:
    engine = RawEngine(ports)
    yield engine
    engine.close()


class RawEngine:
    """PUB and ROUTER sockets that send what they are told."""

    def __init__(self, ports: tuple[int, int]) -> None:
        self._context = zmq.asyncio.Context()
        self.publisher = self._context.socket(zmq.PUB)
        self.publisher.bind(f"tcp://127.0.0.1:{ports[0]}")
        self.router = self._context.socket(zmq.ROUTER)
        self.router.bind(f"tcp://127.0.0.1:{ports[1]}")
        self.ring: dict[int, bytes] = {}
        self.skip: set[int] = set()  # once, in an answer
        self._task = asyncio.create_task(self._serve())

    async def send(self, sequence: int, payload: bytes) -> None:
        self.ring[sequence] = payload
        await self.publisher.send_multipart([b"", sequence.to_bytes(8, "big"), payload])

    def close(self) -> None:
        self._task.cancel()
        self._context.destroy(linger=0)

    async def _serve(self) -> None:
        while True:
            client, _, start = await self.router.recv_multipart()
            for sequence, payload in sorted(self.ring.items()):
                if sequence in self.skip:
                    self.skip.discard(sequence)
                elif sequence >= int.from_bytes(start, "big"):
                    number = sequence.to_bytes(8, "big")
                    await self.router.send_multipart([client, b"", b"", number, payload])
            await self.router.send_multipart([client, b"", b"", b"\xff" * 8, b""])


def batch(number: int, *events: Any) -> bytes:
    return msgspec.msgpack.encode([float(number), list(events)])


async def test_what_is_no_batch_is_counted_and_its_number_lost(
    raw: RawEngine, ports: tuple[int, int], feeds: Any
) -> None:
    feed = await feeds(ports)
    await until(lambda: feed.status().connected)
    raw.ring[0] = batch(0)
    assert isinstance((await take(feed, 1))[0], EngineEvents)
    for parts in ([b""], [b"", b"1", b""], [b"", b"", b"", b""]):
        await raw.publisher.send_multipart(parts)
    await raw.send(1, b"\xc1")
    await raw.send(2, batch(2, {"type": "BlockStored", "block_hashes": 5}))
    await raw.send(3, b"\x91" * 100_000)
    await raw.send(4, batch(4, {"type": "BlockPraised"}, {"type": "AllBlocksCleared"}))
    items = await take(feed, 4)
    assert items[:3] == [Lost(range(1, 2)), Lost(range(2, 3)), Lost(range(3, 4))]
    assert isinstance(items[3], EngineEvents)
    assert items[3].batch.events == [AllBlocksCleared()]
    assert (feed.status().malformed_total, feed.status().unknown_total) == (6, 1)


async def test_an_answer_with_a_hole_is_asked_for_again(
    raw: RawEngine, ports: tuple[int, int], feeds: Any
) -> None:
    raw.ring = {number: batch(number) for number in range(20)}
    raw.skip = {7, 15}
    feed = await feeds(ports)
    items = await take(feed, 20)
    assert [i.sequence for i in items if isinstance(i, EngineEvents)] == list(range(20))
    assert feed.status().lost_total == 0


async def test_a_ring_that_does_not_answer_stops_nothing(
    raw: RawEngine, ports: tuple[int, int], feeds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_feed, "RECONNECT_S", 0.02)  # between questions to the ring
    feed = await feeds((ports[0], free_ports(1)[0]), replay_timeout_s=0.05)
    await until(lambda: feed.status().connected)
    await until(lambda: "ring" in str(feed.status().error))
    for sequence in (3, 4, 6):
        await raw.send(sequence, batch(sequence))
    items = await take(feed, 5)
    assert items[0] == Lost(range(3))
    assert items[3] == Lost(range(5, 6))
    assert [i.sequence for i in items if isinstance(i, EngineEvents)] == [3, 4, 6]


async def test_closing_ends_the_iteration_and_twice_is_once(
    ports: tuple[int, int], feeds: Any
) -> None:
    feed = await feeds(ports)
    waiting = asyncio.ensure_future(anext(feed))
    await asyncio.sleep(0.05)
    await feed.close()
    await feed.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(waiting, WAIT_S)


async def test_an_endpoint_that_is_none_ends_the_iteration_with_the_reason() -> None:
    feed = EngineFeed(EngineFeedOptions("tcp://nonsense"))
    await feed.start()
    async with asyncio.timeout(WAIT_S):
        assert [item async for item in feed] == []
    assert "nonsense" in str(feed.status().error)
    await feed.close()


def test_ranks_count_up_ports() -> None:
    assert rank_endpoint("tcp://*:5557", 2) == "tcp://127.0.0.1:5559"
    assert rank_endpoint("tcp://0.0.0.0:5557", 0, "10.0.0.7") == "tcp://10.0.0.7:5557"
    assert rank_endpoint("ipc:///tmp/kv", 0) == "ipc:///tmp/kv"
    with pytest.raises(ValueError, match="no port"):
        rank_endpoint("ipc:///tmp/kv", 1)


# -- vLLM's publisher -------------------------------------------------------------------------


async def test_events_come_in_order_with_all_their_fields(
    engine: Engine, ports: tuple[int, int], feeds: Any
) -> None:
    engine.start(ports)
    feed = await feeds(ports)
    await until(lambda: feed.status().connected)
    engine.do("kinds")
    (first,) = await take(feed, 1)
    assert isinstance(first, EngineEvents)
    assert (first.sequence, first.batch.dp_rank, first.batch.timestamp_s) == (0, 0, 1.5)
    stored = BlockStored([7000], 6999, list(range(7000, 7016)), 16, None, "GPU", None, None, 0)
    removed = BlockRemoved([b"\x01" * 32, 5], "CPU", 1)
    assert first.batch.events == [stored, removed, AllBlocksCleared()]
    engine.publish(1, 500)
    items = await take(feed, 499)
    assert numbers(items) == list(range(1, 500))
    status = feed.status()
    assert (status.batches_total, status.lost_total, status.restarts_total) == (500, 0, 0)
    assert status.malformed_total == status.unknown_total == 0


async def test_who_joins_late_gets_what_the_ring_holds(
    engine: Engine, ports: tuple[int, int], feeds: Any
) -> None:
    engine.start(ports)
    engine.publish(0, 3000)
    feed = await feeds(ports)
    assert numbers(await take(feed, 3000)) == list(range(3000))
    engine.publish(3000, 3010)
    assert numbers(await take(feed, 10)) == list(range(3000, 3010))
    assert feed.status().replayed_total >= 3000


async def test_who_joins_after_the_ring_has_turned_is_told_what_is_lost(
    engine: Engine, ports: tuple[int, int], feeds: Any
) -> None:
    engine.start(ports, buffer_steps=50)
    engine.publish(0, 200)
    feed = await feeds(ports)
    first, *rest = await take(feed, 51)
    assert first == Lost(range(150))
    assert numbers(rest) == list(range(150, 200))
    assert feed.status().lost_total == 150


async def test_without_a_ring_what_came_before_is_lost(
    engine: Engine, ports: tuple[int, int], feeds: Any
) -> None:
    engine.start(ports)
    engine.publish(0, 5)
    feed = await feeds((ports[0], None))
    heard, published = asyncio.ensure_future(take(feed, 2)), 5
    while not heard.done():  # the engine does not say when it has taken the subscription
        published += 1
        engine.publish(published - 1, published)
        await asyncio.wait({heard}, timeout=0.1)
    lost, first = await heard
    assert isinstance(lost, Lost) and lost.sequences.start == 0 and lost.sequences.stop >= 5
    assert numbers([first]) == [lost.sequences.stop]
    left = range(lost.sequences.stop + 1, published)
    assert numbers(await take(feed, len(left))) == list(left)


async def test_what_a_slow_consumer_made_zmq_drop_comes_from_the_ring(
    engine: Engine, ports: tuple[int, int], feeds: Any
) -> None:
    engine.start(ports, hwm=5)
    feed = await feeds(ports, queue_batches=3, high_water_messages=5)
    await until(lambda: feed.status().connected)
    engine.publish(0, 2)
    assert numbers(await take(feed, 2)) == [0, 1]
    engine.publish(2, 400, blocks=1000)
    await asyncio.sleep(0.3)
    assert feed.status().queued <= 3
    assert numbers(await take(feed, 398)) == list(range(2, 400))
    assert feed.status().replayed_total > 0


async def test_a_loss_at_the_end_is_found_though_nothing_follows(
    engine: Engine, ports: tuple[int, int], feeds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another topic than the feed hears stands for messages that were dropped."""
    monkeypatch.setattr(engine_feed, "FIRST_PROBE_S", 0.1)
    engine.start(ports, topic="kv")
    feed = await feeds(ports, topic="kv-of-another-engine")
    await until(lambda: feed.status().connected)
    engine.publish(0, 10)
    assert numbers(await take(feed, 10)) == list(range(10))
    engine.publish(10, 12)
    assert numbers(await take(feed, 2)) == [10, 11]
    assert feed.status().replayed_total == 12


async def test_each_rank_has_its_own_feed(
    engine: Engine, ports: tuple[int, int], feeds: Any
) -> None:
    base = (ports[0], ports[1])
    for rank in range(2):
        engine.start(base, rank=rank)
    for rank in range(2):
        own = tuple(int(rank_endpoint(f"tcp://*:{port}", rank).rpartition(":")[2]) for port in base)
        feed = await feeds(own)
        engine.publish(10 * rank, 10 * rank + 2, rank=rank)
        items = await take(feed, 2)
        assert numbers(items) == [10 * rank, 10 * rank + 1]
        assert {item.batch.dp_rank for item in items} == {rank}  # type: ignore[union-attr]


@pytest.mark.parametrize("again", [3, 8, 20])
async def test_an_engine_killed_and_started_again_is_another_run(
    again: int, engine: Engine, ports: tuple[int, int], feeds: Any
) -> None:
    """It published 8 batches before; with fewer, as many and more after it is told apart."""
    engine.start(ports)
    feed = await feeds(ports)
    engine.publish(0, 8)
    assert numbers(await take(feed, 8)) == list(range(8))
    engine.do("kill")
    await until(lambda: not feed.status().connected)
    engine.start(ports)
    engine.publish(100, 100 + again)
    first, *rest = await take(feed, 1 + again)
    assert first == Restarted()
    assert numbers(rest) == list(range(100, 100 + again))
    assert [item.sequence for item in rest if isinstance(item, EngineEvents)] == list(range(again))
    assert feed.status().restarts_total == 1
