"""The stream of a daemon as its operator runs it: real NATS, SSD and S3, vLLM's own publisher."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from kvbm.note import Note, domain_of, owner_of
from kvbm.protocol import Pace, Routing
from kvbm.stand_in import StandIn
from runtime.component import EndpointClient, Runtime
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.embedded import EmbeddedNats, EmbeddedS3
from runtime.events import EventPlane, EventPlaneSettings, create_event_plane
from runtime.events import blocks as key_stream
from runtime.events.node_stream import (
    COMPONENT,
    ENDPOINT,
    blocks_subject,
    decode_speeds,
    parse_readers,
    speeds_subject,
)
from runtime.events.router_event import StorageTier
from runtime.hashing import block_hashes, sequence_hashes
from runtime.instances import InstanceRecord
from runtime.requests import RequestPlaneSettings, create_request_plane
from runtime.server_process import free_ports
from storage_tiers.base import Key, StoreItem
from storage_tiers.testing import make_items
from tests.kvbm.announce.consumer import Consumer, Held
from tests.runtime.forked_engines import Engine, Engines

CHUNK = 256 << 10
NODE = "node-1"
BLOCKS = 2  # of a chunk
WAIT_S = 60.0
BUCKET = "stream"
TIER_OF = {"G2": StorageTier.HOST_PINNED, "G3": StorageTier.DISK, "G4": StorageTier.EXTERNAL}
OWNER = owner_of(NODE, domain_of(b"model", b"", 0))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="tested with vLLM's own publisher"
)


@pytest.fixture(scope="module", autouse=True)
def engines() -> Iterator[Engines]:
    """Importing vLLM goes on during the test that needs no engine."""
    found = Engines()
    yield found
    found.close()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(tmp_path / "nats") as server:
        yield server


def noted(items: Sequence[StoreItem], first_token: int) -> list[StoreItem]:
    """The items as one sequence of blocks, each chunk with its note."""
    local = block_hashes(range(first_token, first_token + 16 * BLOCKS * len(items)), 16)
    chain = sequence_hashes(local).tolist()
    found = []
    for place, item in enumerate(items):
        at = place * BLOCKS
        parent = chain[at - 1] if at else None
        note = Note(domain_of(b"model", b"", 0), parent, local[at : at + BLOCKS])
        found.append(replace(item, chunk=replace(item.chunk, note=note.encode())))
    return found


class Router:
    """Listens to one node: its stream, its keys' stream and its speeds."""

    def __init__(self, plane: EventPlane, client: EndpointClient) -> None:
        self.consumer = Consumer()
        self.keys: defaultdict[str, set[bytes]] = defaultdict(set)
        self.speeds: list[Any] = []
        self._plane = plane
        self._client = client
        self._notes: dict[bytes, list[int]] = {}
        self._catching_up = asyncio.Lock()

    def know(self, items: Sequence[StoreItem]) -> None:
        for item in items:
            self._notes[item.chunk.key] = Note.decode(item.chunk.note).chain.tolist()

    @property
    def record(self) -> InstanceRecord | None:
        serving = self._client._instances.serving
        return serving[0] if len(serving) == 1 else None

    async def follow_keys(self) -> None:
        follower = key_stream.Follower()
        subject = key_stream.blocks_subject("default", NODE)
        async for message in self._plane.subscribe(subject):
            followed = follower.follow(key_stream.decode_batch(message.payload))
            if followed.restarted:
                self.keys.clear()
            for event in followed.events:
                if isinstance(event, key_stream.Stored):
                    self.keys[event.tier].update(event.keys)
                else:
                    self.keys[event.tier].difference_update(event.keys)

    async def follow(self) -> None:
        async for message in self._plane.subscribe(blocks_subject("default"), 1 << 16):
            self.consumer.hear(message.payload)
            if self.consumer.is_behind:
                await self.catch_up()

    async def follow_speeds(self) -> None:
        async for message in self._plane.subscribe(speeds_subject("default")):
            self.speeds.append(decode_speeds(message.payload))

    async def catch_up(self) -> None:
        async with self._catching_up:
            await self.consumer.catch_up(self.ask)

    async def ask(self, question: bytes) -> AsyncIterator[bytes]:
        await self._client.wait_for_instances(1, WAIT_S)
        async for item in self._client.generate(question):
            yield item

    def truth(self) -> Held:
        """Of the tiers, by the keys' stream, which other tests compare with them."""
        held = {
            (OWNER, 0, "cache_owner", TIER_OF[tier]): {n for k in keys for n in self._notes[k]}
            for tier, keys in self.keys.items()
        }
        return {holder: names for holder, names in held.items() if names}

    def kept(self) -> Held:
        return {
            holder: names for holder, names in self.consumer.blocks.items() if holder[2] != "worker"
        }

    def cached(self) -> set[int]:
        found = [n for holder, n in self.consumer.blocks.items() if holder[2] == "worker"]
        return set().union(*found)


async def until(true: Callable[[], object], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not true():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S:g} s: {what}") from None


@pytest.fixture
async def world(
    tmp_path: Path, nats: EmbeddedNats
) -> AsyncIterator[tuple[Router, Callable[..., Daemon]]]:
    events = {
        "plane": "nats",
        "nats_url": nats.url,
        "nats_user": nats.user,
        "nats_password": nats.password,
    }
    discovery = {"file_directory": str(tmp_path / "discovery"), "file_poll": 0.02, "ttl": 30.0}
    runtime_folder = Path(tempfile.mkdtemp(prefix="kvbm-test-"))
    with ExitStack() as started:
        started.callback(shutil.rmtree, runtime_folder, ignore_errors=True)

        def make(**config: Any) -> Daemon:
            folder = tmp_path / NODE
            settings = {"dram": "16MiB", "ssd": "64MiB", **config}
            daemon = Daemon(
                DaemonConfig(
                    folder=folder,
                    socket=runtime_folder / "s",
                    logs=folder,
                    records=folder,
                    node=NODE,
                    events=events,
                    discovery=discovery,
                    **settings,
                )
            )
            started.callback(daemon.process.stop)
            return daemon

        plane = create_event_plane(EventPlaneSettings.model_validate(events), "router")
        async with AsyncExitStack() as running:
            await plane.start()
            running.push_async_callback(plane.close)
            runtime = await running.enter_async_context(
                Runtime(
                    create_discovery(DiscoverySettings.model_validate(discovery), {}),
                    create_request_plane(RequestPlaneSettings(), "router"),
                )
            )
            client = runtime.namespace("default").component(COMPONENT).endpoint(ENDPOINT).client()
            await client._start()
            router = Router(plane, client)
            tasks = [
                asyncio.create_task(work)
                for work in (router.follow_keys(), router.follow(), router.follow_speeds())
            ]
            await until(lambda: plane.status().connected, "NATS is connected")
            yield router, make
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended


async def test_events_and_snapshots_are_what_the_tiers_hold_over_a_restart(
    world: tuple[Router, Callable[..., Daemon]], tmp_path: Path
) -> None:
    router, make = world
    with EmbeddedS3(tmp_path / "s3", buckets=[BUCKET]) as s3:
        section = {**s3.settings(BUCKET), "linger": "50ms", "object_bytes": "1MiB"}
        daemon = make(s3=section)
        await asyncio.to_thread(daemon.start)
        items = [
            item
            for sequence in range(16)
            for item in noted(make_items(f"stream {sequence}", 20, CHUNK), 100_000 * sequence)
        ]
        router.know(items)
        await asyncio.to_thread(_store_and_fetch, daemon, items)
        await _agrees(router, daemon)
        assert all(router.keys[tier] for tier in ("G2", "G3", "G4"))
        record = router.record
        assert record is not None

        await asyncio.to_thread(daemon.stop)
        await until(lambda: router.record is None, "the record is gone with the daemon")
        await asyncio.to_thread(daemon.start)
        await until(lambda: router.record is not None, "the new daemon is registered")
        again = router.record
        assert again is not None and again.labels["publisher"] != record.labels["publisher"]
        async with router._catching_up:
            router.consumer = Consumer()  # as a router that sees a new publisher
        await router.catch_up()
        await _agrees(router, daemon)
        assert router.keys["G3"] and router.keys["G4"]


def _store_and_fetch(daemon: Daemon, items: list[StoreItem]) -> None:
    routing = Routing(5, 0, b"model", 16, 0)
    with StandIn(daemon.socket, CHUNK, routing=routing) as engine:
        engine.store(items)
        keys: list[Key] = [item.chunk.key for item in items]
        engine.fetch(keys[:100])


async def _agrees(router: Router, daemon: Daemon) -> None:
    """Once nothing moves any more, a router that listened and a new one say what the tiers hold."""
    end = asyncio.get_running_loop().time() + WAIT_S
    last: dict[str, int] = {}
    while True:
        kept = await asyncio.to_thread(daemon.kept_chunks)
        keys = {tier: len(router.keys[tier]) for tier in kept}
        if kept == last == keys and router.kept() == router.truth():
            break
        if asyncio.get_running_loop().time() > end:
            sizes = [{h[3]: len(n) for h, n in x.items()} for x in (router.kept(), router.truth())]
            raise AssertionError(f"tiers {kept}, keys {keys}, told and wanted {sizes}")
        last = kept
        await asyncio.sleep(0.3)
    fresh = Consumer()
    await fresh.catch_up(router.ask)
    assert fresh.blocks == router.consumer.blocks


async def test_engines_are_heard_labelled_and_timed_while_they_are_connected(
    world: tuple[Router, Callable[..., Daemon]], engines: Engines
) -> None:
    router, make = world
    ports = free_ports(2)
    vllm = Engine(engines)
    vllm.start((ports[0], ports[1]))
    vllm.do("events", events=[["stored", [7, 8], None, list(range(32))]])
    daemon = make(s3=None)
    await asyncio.to_thread(daemon.start)
    worker = 0xFEED_0000_0000_0001
    routing = Routing(
        worker, 3, b"model", 16, 0, f"tcp://127.0.0.1:{ports[0]}", f"tcp://127.0.0.1:{ports[1]}"
    )
    names = sequence_hashes(block_hashes(range(64), 16)).tolist()
    items = noted(make_items("timed", 4, CHUNK), 0)
    router.know(items)
    with StandIn(daemon.socket, CHUNK, routing=routing) as engine:
        await until(lambda: router.cached() == set(names[:2]), "what was said before is known")
        vllm.do("events", events=[["stored", [9, 10], 8, list(range(32, 64))], ["removed", [7]]])
        await until(lambda: router.cached() == set(names[1:]), "blocks came and went")
        holders = {holder for holder in router.consumer.blocks if holder[2] == "worker"}
        assert holders == {(worker, 3, "worker", StorageTier.DEVICE)}
        await asyncio.to_thread(engine.store, items)
        pace = Pace(1e-4, 1e-9, 1e-3, 1e-9)
        keys = [item.chunk.key for item in items]
        await asyncio.to_thread(engine.fetch, keys, "", pace)
        await until(
            lambda: (
                router.record is not None
                and parse_readers(router.record.labels["readers"]) == {(worker, 3): OWNER}
            ),
            "the record says who reads what",
        )
        assert router.record is not None and router.record.labels["node"] == NODE
        await until(lambda: any(s.workers for s in router.speeds), "speeds are told")
        speed = next(s.workers for s in reversed(router.speeds) if s.workers)[0]
        assert (speed.worker_id, speed.dp_rank, speed.prefill_s_per_token) == (worker, 3, 1e-4)
        assert speed.load_s_per_block[0] == pytest.approx(1e-9 * CHUNK / 2, rel=0.01)
        await until(
            lambda: (
                router.kept().get((OWNER, 0, "cache_owner", StorageTier.HOST_PINNED))
                == set(np.concatenate([Note.decode(i.chunk.note).chain for i in items]).tolist())
            ),
            "its chunks are announced",
        )
    await until(lambda: not router.cached(), "an engine that left holds nothing")
    await until(
        lambda: router.record is not None and parse_readers(router.record.labels["readers"]) == {},
        "nobody reads",
    )
    vllm.do("kill")
