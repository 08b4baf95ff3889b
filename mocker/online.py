"""A trace on mock engines in wall time: real processes, planes and discovery, the router for real.

Each node is a process of mock engines (`mocker serve`). Block events go over NATS and the feeds
into the router's index, requests over the request plane to the worker that the router chose; what
comes back tells the router of first tokens, output and ends, as a frontend would. Trace and engines
run `speedup` times as fast as they would, so what the machine itself takes shows that much larger.
Times are told on the engines' clock, beside what the offline replay has for the same requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import SecretStr

from kvbm.cli.temporary import TemporaryDaemon
from mocker.compare import BLIND, Scene
from mocker.results import EngineTotals, ReplayResult
from mocker.routing import AnswerLength, speed_of
from mocker.sequence import Record
from mocker.timing import PS_PER_MS, PS_PER_S
from mocker.tokens import decode_mock_generated
from mocker.trace import TRACE_BLOCK_TOKENS, TraceEntry
from router.feed import FeedStatus, NodeFeeds
from router.feed_settings import FeedSettings
from router.index import Index, WorkerId
from router.load import ActiveSequences
from router.router import Prompt, Query, Routed, Router
from router.selector import PolicyName, Selector
from router.speeds import Speeds
from router.workers import Capacity, Worker, Workers
from runtime.component import Runtime
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.embedded import EmbeddedNats
from runtime.engine_card import COMPONENT, ENDPOINT, EngineCard
from runtime.events import EventPlaneSettings, create_event_plane
from runtime.generation import Generate, GenerationRefused, Sampling, encode
from runtime.hashing import block_hashes, sequence_hashes
from runtime.instances import InstanceRecord, Instances
from runtime.names import EndpointName
from runtime.requests import RequestError, RequestPlaneSettings, create_request_plane
from runtime.tasks import end

NAMESPACE: Final = "replay"
START_S: Final = 60.0
STOP_S: Final = 20.0
REQUEST_S: Final = 600.0  # of the wall clock
CHUNK_BYTES: Final = 64 << 10
GB: Final = 10**9
ENDPOINT_NAME: Final = EndpointName(NAMESPACE, COMPONENT, ENDPOINT)


class OnlineError(Exception):
    """The fleet did not come up, or lost a request."""


@dataclass(frozen=True, slots=True)
class OnlineSettings:
    scene: Scene
    speedup: float = 4.0
    daemon: bool = False  # a real one on each node, in place of simulated tiers


@dataclass(slots=True)
class Online:
    """What a run found; `late_s` is how far behind the trace the driver ever was, on its clock."""

    result: ReplayResult
    feed: FeedStatus
    late_s: float
    believed: dict[int, int]  # request to tokens that the router took to be in its engine's G1


@dataclass(slots=True)
class Driver:
    """The router of the run, and what it knows of the engines."""

    runtime: Runtime
    router: Router
    transports: dict[int, str]
    engines: list[int]  # instances, by the numbers they have in records
    block_tokens: int
    speedup: float
    answers: AnswerLength = field(default_factory=AnswerLength)
    records: list[Record] = field(default_factory=list)
    believed: dict[int, int] = field(default_factory=dict)

    async def ask(self, number: int, entry: TraceEntry, arrival_ps: int) -> None:
        """One request from its arrival to its last token. Raises OnlineError."""
        tokens = tokens_of(entry)
        local = block_hashes(tokens, self.block_tokens)
        prompt = Prompt(entry.input_tokens, local, sequence_hashes(local))
        expected = self.answers.expected
        query = Query(str(number), prompt, expected_output_tokens=expected)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        routed = await self.router.route(query, deadline_s=REQUEST_S)
        if not isinstance(routed, Routed):
            raise OnlineError(f"request {number} was not routed: {routed.why}")
        instance = routed.worker.instance
        self.believed[number] = routed.chosen.covered_blocks()["g1"] * self.block_tokens
        sampling = Sampling(max_tokens=entry.output_tokens)
        payload = encode(Generate(token_ids=tokens.tolist(), sampling=sampling))
        times_s: list[float] = []
        cached = {}
        with routed:
            answer = self.runtime.client.stream(
                self.transports[instance], str(ENDPOINT_NAME), payload, deadline_s=REQUEST_S
            )
            try:
                async with answer:
                    async for item in answer:
                        came = decode_mock_generated(item)
                        if not times_s:
                            routed.first_token()
                        routed.output(len(came.token_ids))
                        times_s += [loop.time() - began_s] * len(came.token_ids)
                        cached = came.cached_by_tier
            except (RequestError, GenerationRefused) as error:
                raise OnlineError(f"request {number}: {error}") from error
        if len(times_s) != entry.output_tokens:
            raise OnlineError(f"request {number} has {len(times_s)} of its tokens")
        self.answers.ended(entry.output_tokens)
        times_ps = (np.array(times_s) * self.speedup * PS_PER_S).astype(np.int64)
        engine = self.engines.index(instance)
        self.records.append(
            Record(
                *(number, engine, arrival_ps, entry.input_tokens, entry.output_tokens),
                outcome="finished",
                finished_ps=arrival_ps + int(times_ps[-1]),
                cached_tokens=cached,
                token_times_ps=times_ps,
            )
        )


async def replay_online(
    settings: OnlineSettings, entries: Sequence[TraceEntry], policy: PolicyName
) -> Online:
    """One policy on a fleet of its own, whose caches are empty. Raises OnlineError, OSError."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbm-replay-")))
        nats = stack.enter_context(EmbeddedNats(folder / "nats"))
        await stack.enter_async_context(_nodes(settings, folder, nats))
        discovery = DiscoverySettings(file_directory=folder / "discovery")
        requests = create_request_plane(RequestPlaneSettings(), "replay")
        runtime = Runtime(create_discovery(discovery, os.environ), requests)
        await stack.enter_async_context(runtime)
        events = EventPlaneSettings(
            plane="nats",
            nats_url=nats.url,
            nats_user=nats.user,
            nats_password=SecretStr(nats.password),
        )
        plane = create_event_plane(events, "replay")
        await plane.start()
        stack.push_async_callback(plane.close)

        fleet, workers = settings.scene.fleet(), Workers()
        index = Index(fleet.engines * fleet.engine.num_blocks + 2 * (fleet.g2_blocks + 1))
        speeds = Speeds(workers)
        feeds = NodeFeeds(runtime, plane, index, NAMESPACE, FeedSettings(), speeds=speeds)
        load = ActiveSequences(workers)
        block_tokens = settings.scene.block_tokens
        selector = Selector(workers, policy)
        router = Router(workers, index, load, selector, block_tokens=block_tokens)
        if policy not in BLIND:
            stack.push_async_callback(end, asyncio.create_task(feeds.run(), name="feeds"))
        instances = Instances(runtime.discovery, ENDPOINT_NAME.instances_prefix)
        await instances.start()
        stack.push_async_callback(instances.close)
        sequence_hashes(block_hashes(range(16), 16))  # compiled before a request waits for it
        index.find(block_hashes(range(16), 16))
        found = await instances.wait_for(fleet.engines, START_S)
        assumed = speed_of(fleet.engine, fleet.tiers, settings.speedup)
        for record in found:
            worker = WorkerId(record.name.id)
            router.add_worker(Worker(worker, speeds.of(worker, assumed), _capacity(record)))
        if policy not in BLIND:
            await _live(feeds, -(-fleet.engines // fleet.engines_per_node))
        ids = sorted(record.name.id for record in found)
        transports = {record.name.id: record.transport for record in found}
        driver = Driver(runtime, router, transports, ids, block_tokens, settings.speedup)
        late_s = await _drive(driver, entries)
        return Online(_result(driver), feeds.status, late_s, driver.believed)


async def _drive(driver: Driver, entries: Sequence[TraceEntry]) -> float:
    """All requests at their times; how late the latest was sent, on the trace's clock."""
    loop = asyncio.get_running_loop()
    began_s, late_s = loop.time(), 0.0
    async with asyncio.TaskGroup() as tasks:
        for number, entry in enumerate(entries):
            at_s = entry.timestamp_ms / 1000 / driver.speedup
            await asyncio.sleep(began_s + at_s - loop.time())
            late_s = max(late_s, loop.time() - began_s - at_s)
            arrival_ps = round(entry.timestamp_ms * PS_PER_MS)
            tasks.create_task(driver.ask(number, entry, arrival_ps), name=f"request {number}")
    return late_s * driver.speedup


def _result(driver: Driver) -> ReplayResult:
    """What an engine was busy with is its own to know: only its tokens are told."""
    records = sorted(driver.records, key=lambda record: record.request_id)
    computed = [0] * len(driver.engines)
    for record in records:
        cached = sum(record.cached_tokens.values())
        computed[record.engine] += record.prompt_tokens - cached + record.output_tokens - 1
    return ReplayResult(records, [EngineTotals(0, tokens, 0, 0) for tokens in computed], 0)


@contextlib.asynccontextmanager
async def _nodes(settings: OnlineSettings, folder: Path, nats: EmbeddedNats) -> AsyncIterator[None]:
    """Processes of mock engines that answer; ended with the context."""
    scene = settings.scene
    processes: list[asyncio.subprocess.Process] = []
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(_stop, processes)
        for node, first in enumerate(range(0, scene.engines, scene.engines_per_node)):
            given: dict[str, object] = {
                "namespace": NAMESPACE,
                "node": f"node-{node}",
                "machine": scene.machine,
                "engines": min(scene.engines_per_node, scene.engines - first),
                "speedup": settings.speedup,
                "block_tokens": scene.block_tokens,
                "context_tokens": 1 << 20,
                "events.plane": "nats",
                "events.nats_url": nats.url,
                "events.nats_user": nats.user,
                "discovery.file_directory": folder / "discovery",
            }
            if settings.daemon:
                given["daemon"] = _daemon(stack, folder / f"node-{node}", scene)
                given["chunk_bytes"] = CHUNK_BYTES
            else:
                given |= {"g2_gb": scene.g2_gb, "g3_gb": scene.g3_gb}
            options = [part for name, to in given.items() for part in ("--set", f"{name}={to}")]
            with (folder / f"node-{node}.log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "mocker", "serve", *options),
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=_without_ours() | {"KVBM_MOCK_EVENTS__NATS_PASSWORD": nats.password},
                )
            processes.append(process)
        for node, process in enumerate(processes):
            assert process.stdout is not None
            async with asyncio.timeout(START_S):
                line = await process.stdout.readline()
            if not line:
                text = (folder / f"node-{node}.log").read_text(errors="replace")
                raise OnlineError(f"node {node} did not start; it says:\n{text[-2000:]}")
            json.loads(line)
        yield


def _daemon(stack: contextlib.AsyncExitStack, folder: Path, scene: Scene) -> Path:
    """A real one, whose chunks stand for blocks: as many as the scene's tiers would hold."""
    folder.mkdir()
    fleet = scene.fleet()
    given: dict[str, object] = {"node": folder.name}
    given["dram.capacity"] = f"{max(fleet.g2_blocks, 1024) * CHUNK_BYTES >> 20}MiB"
    if fleet.g3_blocks:
        given["ssd.path"] = folder / "ssd"
        given["ssd.capacity"] = f"{max(fleet.g3_blocks, 4096) * CHUNK_BYTES >> 20}MiB"
    daemon = TemporaryDaemon(folder, given)
    stack.enter_context(daemon)
    return daemon.socket


async def _stop(processes: Sequence[asyncio.subprocess.Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.terminate()
    for process in processes:
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _live(feeds: NodeFeeds, nodes: int) -> None:
    """Until the index is what the nodes hold."""
    async with asyncio.timeout(START_S):
        while len(feeds.status.nodes) < nodes or not feeds.status.is_exact:
            await asyncio.sleep(0.02)


def _without_ours() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("KVBM_")}


def _capacity(record: InstanceRecord) -> Capacity:
    card = EngineCard.of_labels(record.labels)
    return Capacity(card.kv_blocks or None, card.batch_tokens or None)


def tokens_of(entry: TraceEntry) -> array[int]:
    """Made-up tokens: equal ids at equal places are equal tokens, as the trace says."""
    tokens: array[int] = array("I")
    for identity in entry.hash_ids:
        dice = np.random.Generator(np.random.SFC64(identity))
        tokens.frombytes(dice.integers(0, 1 << 31, TRACE_BLOCK_TOKENS, np.uint32).tobytes())
    return tokens[: entry.input_tokens]
