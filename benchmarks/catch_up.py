"""How long a new router takes until it knows a node exactly, and how fast it follows one.

A node's own process serves a million blocks of one owner in host memory, which two workers read,
with the parts of the daemon that do it, over TCP; the router finds it in discovery. Against: what
cannot be saved, the snapshot's bytes over loopback without the request plane, and its rows into an
empty index without the network. Steady state: events of 16 blocks over NATS into the index, against
the same messages taken from NATS and thrown away.

    python -m benchmarks.catch_up [--blocks 1048576] [--rounds 5] [--events 20000]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from kvbm.announce.catch_up import CatchUpHandler
from kvbm.announce.engines import EngineFollowers
from kvbm.announce.stream import Stream
from kvbm.announce.tiers import TierAnnouncer
from kvbm.cli.figures import Row, bounded, compared, tell
from kvbm.note import Note
from router.feed import NodeFeeds
from router.feed_settings import FeedSettings
from router.index import Hashes, Index, Tier, WorkerId
from runtime.component import Runtime
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.embedded import EmbeddedNats
from runtime.events import EventPlane, EventPlaneSettings, create_event_plane
from runtime.events.node_stream import (
    COMPONENT,
    ENDPOINT,
    LABEL_NODE,
    LABEL_PUBLISHER,
    LABEL_READERS,
    Rows,
    blocks_subject,
    decode_rows,
    encode_catch_up,
    readers_label,
)
from runtime.events.router_event import StorageTier, Stored
from runtime.hashing import sequence_hashes
from runtime.requests import RequestPlaneSettings, create_request_plane
from runtime.telemetry import configure
from storage_tiers.base import Key, TierName

NAMESPACE = "benchmark"
CHUNK_BLOCKS = 16
CHAIN_CHUNKS = 128
EVENT_BLOCKS = 16
EXACT_S_MAX = 1.0
TURN_MS_MAX = 10.0
READERS = ((1, 0), (2, 0))
QUEUE_MESSAGES = 1 << 17
LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where both processes meet."""

    folder: str
    nats_url: str
    nats_user: str
    nats_password: str
    blocks: int

    async def plane(self, name: str) -> EventPlane:
        settings = EventPlaneSettings.model_validate(
            {
                "plane": "nats",
                "nats_url": self.nats_url,
                "nats_user": self.nats_user,
                "nats_password": self.nats_password,
                "queue_messages": QUEUE_MESSAGES,
                "queue_bytes": 1 << 30,
            }
        )
        plane = create_event_plane(settings, name)
        await plane.start()
        return plane

    def runtime(self) -> Runtime:
        settings = DiscoverySettings(
            discovery="file", file_directory=Path(self.folder), file_poll=0.02
        )
        plane = create_request_plane(RequestPlaneSettings(plane="tcp"), "benchmark")
        return Runtime(create_discovery(settings, {}), plane)


class Unheard:
    """Nobody else is told."""

    def stored(self, tier: TierName, keys: Sequence[Key]) -> None:
        pass

    def removed(self, tier: TierName, keys: Sequence[Key]) -> None:
        pass


# -- the node's process ------------------------------------------------------------------


def fill(tiers: TierAnnouncer, blocks: int) -> None:
    chain = CHAIN_CHUNKS * CHUNK_BLOCKS
    for first in range(0, blocks, chain):
        tokens = np.random.default_rng(first).integers(1, 1 << 63, chain, dtype=np.uint64)
        names = sequence_hashes(tokens)
        keys, notes = [], []
        for at in range(0, chain, CHUNK_BLOCKS):
            parent = int(names[at - 1]) if at else None
            keys.append(Key((first + at).to_bytes(16, "big")))
            notes.append(Note(0, parent, tokens[at : at + CHUNK_BLOCKS]).encode())
        tiers.learn(keys, notes)
        tiers.stored(TierName.DRAM, keys)
        tiers.flush()


async def serve(place: Place) -> None:
    """Answers questions; on each line of input sends so many events, on an empty one ends."""
    plane, quiet = await place.plane("node"), create_event_plane(EventPlaneSettings(), "quiet")
    stream = Stream(quiet, NAMESPACE, 4711, ring_bytes_max=1 << 20)
    tiers = TierAnnouncer(stream, "node", Unheard(), linger_s=0.0)
    fill(tiers, place.blocks)
    handler = CatchUpHandler(stream, tiers, EngineFollowers(stream))
    loop = asyncio.get_running_loop()
    async with place.runtime() as runtime:
        bare = await asyncio.start_server(bare_snapshot(tiers), "127.0.0.1", 0)
        labels = {
            LABEL_NODE: "node",
            LABEL_PUBLISHER: f"{stream.publisher:x}",
            LABEL_READERS: readers_label(dict.fromkeys(READERS, tiers.owner(0))),
        }
        endpoint = runtime.namespace(NAMESPACE).component(COMPONENT).endpoint(ENDPOINT)
        await endpoint.serve(handler.answer, labels=labels)
        print(bare.sockets[0].getsockname()[1], tiers.owner(0), flush=True)
        while count := int(await loop.run_in_executor(None, sys.stdin.readline) or 0):
            await send(plane, stream, tiers.owner(0), count)
    await plane.close()


async def send(plane: EventPlane, stream: Stream, owner: int, count: int) -> None:
    """All are made before the first leaves."""
    kept = create_event_plane(EventPlaneSettings(plane="memory"), "kept")
    heard = kept.subscribe(blocks_subject(NAMESPACE), count)
    stream._plane = kept
    tokens = np.random.default_rng(stream.next).integers(1, 1 << 63, (count, EVENT_BLOCKS))
    for words in tokens.astype(np.uint64):
        data = Stored(None, sequence_hashes(words), words)
        stream.publish(owner, 0, data, StorageTier.DISK, "cache_owner")
    messages = await heard.take(count)
    print(stream.next, flush=True)
    await asyncio.sleep(0.05)  # the other side takes its time
    for message in messages:
        assert plane.publish(message.subject, message.payload)
    while plane.status().queued:
        await asyncio.sleep(0.01)


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def bare_snapshot(tiers: TierAnnouncer) -> Answer:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The snapshot's items with a length before each, and no more."""
        for step in tiers.rows(1 << 16):
            for rows in step:
                data = encode_catch_up(rows)
                writer.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
                await writer.drain()
        writer.close()

    return answer


# -- the router's ------------------------------------------------------------------------


class Node:
    """The node's process, seen from here."""

    def __init__(self, place: Place) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.catch_up", "--serve", msgspec_json(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port, self.owner = map(int, self._line().split())

    def send(self, events: int) -> int:
        """The sequence that follows them."""
        assert self._process.stdin is not None
        print(events, file=self._process.stdin, flush=True)
        return int(self._line())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def msgspec_json(place: Place) -> str:
    return msgspec.json.encode(place).decode()


@asynccontextmanager
async def router(place: Place, runtime: Runtime) -> AsyncIterator[tuple[NodeFeeds, Index]]:
    plane, index = await place.plane("router"), Index(4 * place.blocks)
    settings = FeedSettings(messages=QUEUE_MESSAGES)
    feeds = NodeFeeds(runtime, plane, index, NAMESPACE, settings)
    task = asyncio.create_task(feeds.run())
    try:
        yield feeds, index
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await plane.close()


async def exact_s(place: Place) -> float:
    """From the start of a router to an index equal to the node's."""
    workers = [WorkerId(*reader) for reader in READERS]
    async with place.runtime() as runtime:
        began = time.perf_counter()
        async with router(place, runtime) as (feeds, index):
            while not feeds.status.nodes or not feeds.status.is_exact:
                await asyncio.sleep(0.001)
            took_s = time.perf_counter() - began
            for worker in workers:
                assert index.held_blocks(worker)[Tier.G2] == place.blocks
    return took_s


async def longest_turn_ms(place: Place) -> float:
    """What this thread's processor did in one turn of the event loop, at most, while it synced."""
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.thread_time() - before)

    async with place.runtime() as runtime, router(place, runtime) as (feeds, _):
        while not feeds.status.nodes:
            await asyncio.sleep(0.001)
        watching = asyncio.create_task(watch())
        while not feeds.status.is_exact:
            await asyncio.sleep(0.001)
        watching.cancel()
    return 1000 * longest_s


async def loopback(port: int) -> tuple[float, list[Rows]]:
    began, items = time.perf_counter(), []
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    with suppress(asyncio.IncompleteReadError):
        while True:
            length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
            items.append(await reader.readexactly(length))
    took_s = time.perf_counter() - began
    writer.close()
    return took_s, [decode_rows(item) for item in items]


def index_s(place: Place, rows: list[Rows], owner: int) -> float:
    workers = [WorkerId(owner, 1 << 40), *(WorkerId(*reader) for reader in READERS)]

    def words(data: bytes) -> Hashes:
        return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)

    index = Index(4 * place.blocks)
    began = time.perf_counter()
    for row in rows:
        index.stored_rows(workers, Tier.G2, words(row.parents), words(row.tokens))
    took_s = time.perf_counter() - began
    assert len(index) == place.blocks
    return took_s


async def followed_s(place: Place, node: Node, events: int) -> float:
    """Seconds of this process's processor for all of them: other programs do not count."""
    async with place.runtime() as runtime, router(place, runtime) as (feeds, _):
        while not feeds.status.nodes or not feeds.status.is_exact:
            await asyncio.sleep(0.01)
        stream = feeds._nodes["node"].place
        end = await asyncio.to_thread(node.send, events)
        began = time.process_time()
        while stream.next != end:
            await asyncio.sleep(0.01)
        took_s = time.process_time() - began
        assert feeds.status.nodes[0].gaps_total == 0
        return took_s


async def thrown_away_s(place: Place, node: Node, events: int) -> float:
    plane = await place.plane("bare")
    messages = plane.subscribe(blocks_subject(NAMESPACE), QUEUE_MESSAGES)
    await messages.active.wait()
    await asyncio.to_thread(node.send, events)
    began, taken = time.process_time(), 0
    while taken < events:
        taken += len(await messages.take(256))
        await asyncio.sleep(0)
    took_s = time.process_time() - began
    await plane.close()
    return took_s


async def measure(place: Place, rounds: int, events: int) -> list[Row]:
    node = Node(place)
    exact, turns, limit, wire, bulk, rate, bare = [], [], [], [], [], [], []
    try:
        for number in range(rounds + 1):
            ours = await exact_s(place)
            turn_ms = await longest_turn_ms(place)
            loopback_s, rows = await loopback(node.port)
            bulk_s = index_s(place, rows, node.owner)
            followed = events / await followed_s(place, node, events)
            thrown = events / await thrown_away_s(place, node, events)
            if number:  # the first compiles and warms up
                exact.append(ours)
                turns.append(turn_ms)
                wire.append(loopback_s)
                bulk.append(bulk_s)
                limit.append(loopback_s + bulk_s)
                rate.append(followed)
                bare.append(thrown)
    finally:
        node.close()
    held = f"{place.blocks / (1 << 20):g} Mi blocks, 2 readers"
    return [
        bounded(f"new router exact, {held}", "s", exact, EXACT_S_MAX),
        compared("the same", "s", exact, "loopback and index alone", limit),
        bounded("longest turn of its event loop meanwhile", "ms of a core", turns, TURN_MS_MAX),
        bounded("the snapshot's bytes over loopback", "s", wire, None),
        bounded("its rows into an empty index", "s", bulk, None),
        compared("events followed", "/s of a core", rate, "taken from NATS, thrown away", bare),
        bounded("blocks followed", "/s of a core", [EVENT_BLOCKS * one for one in rate], None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    configure("console", "error", sys.stderr, {})  # standard output is for figures
    if arguments.serve is not None:
        asyncio.run(serve(msgspec.json.decode(arguments.serve, type=Place)))
        return
    with (
        tempfile.TemporaryDirectory(prefix="kvbm-catch-up-", ignore_cleanup_errors=True) as folder,
        EmbeddedNats(Path(folder) / "nats") as nats,
    ):
        meeting = Path(folder) / "discovery"
        place = Place(str(meeting), nats.url, nats.user, nats.password, arguments.blocks)
        tell("catch_up", asyncio.run(measure(place, arguments.rounds, arguments.events)))


if __name__ == "__main__":
    main()
