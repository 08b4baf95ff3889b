"""Keeps a router's index equal to what all nodes hold, from their streams.

    async with asyncio.TaskGroup() as tasks:
        feeds = NodeFeeds(runtime, plane, index, namespace, FeedSettings(), speeds=Speeds(workers))
        tasks.create_task(feeds.run())

Nodes are found in discovery, their events come over the event plane (`runtime.events.node_stream`),
and what was missed is asked of the node over the request plane; `node_feed.py` says how. Workers
that publish the reference's events themselves are heard too (`worker_feed.py`). Everything the
streams say is applied, whether the router has met the worker yet or not: the index has a bound of
its own, and the table of workers decides who can be sent to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from router.feed_settings import FeedSettings
from router.index import Index, WorkerId
from router.index_writer import IndexWriter
from router.node_feed import TURN_BLOCKS, TURN_EVENTS, NodeFeed, NodeState, NodeStatus
from router.speeds import Speeds
from router.worker_feed import WorkerFeeds, WorkerFeedStatus
from runtime.component import Runtime
from runtime.events.base import EventPlane, Message, Subscription
from runtime.events.envelope import WireError, decode_envelope, event_subject
from runtime.events.node_stream import (
    COMPONENT,
    ENDPOINT,
    LABEL_NODE,
    LABEL_PUBLISHER,
    LABEL_READERS,
    TOPIC,
    blocks_subject,
    parse_readers,
    speeds_subject,
)
from runtime.instances import InstanceRecord, Instances
from runtime.names import EndpointName, InstanceName

NODES_MAX: Final = 4096
WATCH_S: Final = 0.25

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class FeedStatus:
    is_synced: bool  # all nodes were listed by discovery
    nodes: tuple[NodeStatus, ...]
    workers: WorkerFeedStatus  # that publish by themselves
    events_total: int  # of nodes and workers
    blocks_total: int  # applied
    malformed_total: int  # messages that are no envelope
    unknown_total: int  # events of publishers that discovery has not named (yet)
    dropped_total: int  # waited to be applied, and there was no room
    refused_total: int  # records in discovery that cannot be followed

    @property
    def is_exact(self) -> bool:
        """Every node in discovery is live: nothing is known to be missing."""
        return self.is_synced and all(node.state is NodeState.LIVE for node in self.nodes)


class NodeFeeds:
    """All methods are called from one event loop; nobody else writes to the index."""

    def __init__(
        self,
        runtime: Runtime,
        plane: EventPlane,
        index: Index,
        namespace: str,
        settings: FeedSettings,
        *,
        speeds: Speeds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime = runtime
        self._plane = plane
        self._writer = IndexWriter(index)
        self._namespace = namespace
        self._settings = settings
        self._speeds = speeds
        self._clock = clock
        self._endpoint = EndpointName(namespace, COMPONENT, ENDPOINT)
        self._instances = Instances(
            runtime.discovery, self._endpoint.instances_prefix, self._changed
        )
        self._subject = blocks_subject(namespace)
        self._records: dict[str, dict[InstanceName, InstanceRecord]] = {}  # by node
        self._nodes: dict[str, NodeFeed] = {}
        self._by_publisher: dict[int, NodeFeed] = {}
        self._workers = WorkerFeeds(self._writer, self._is_of_a_node)
        self._turns = asyncio.Semaphore(settings.asks_at_once)
        self._tasks: asyncio.TaskGroup | None = None
        self._messages: Subscription | None = None
        self._events_total = 0
        self._blocks_total = 0
        self._malformed_total = 0
        self._unknown_total = 0
        self._refused_total = 0

    async def run(self) -> None:
        """Until cancelled."""
        # One subscription for all: `*` is nodes' component and those of other publishers.
        events = event_subject(TOPIC, self._namespace, "*").replace("%2A", "*")
        async with (
            self._plane.subscribe(events, self._settings.messages) as messages,
            self._plane.subscribe(speeds_subject(self._namespace)) as speeds,
            asyncio.TaskGroup() as tasks,
        ):
            self._tasks, self._messages = tasks, messages
            tasks.create_task(self._hear_events(messages), name="feed events")
            tasks.create_task(self._hear_speeds(speeds), name="feed speeds")
            tasks.create_task(self._watch(messages), name="feed watch")
            await self._instances.start()
            try:
                await asyncio.Event().wait()
            finally:
                await self._instances.close()

    def worker_added(self, worker: WorkerId) -> None:
        """The router has met a worker, perhaps again: what it removed from the index with it is
        fetched."""
        for node in self._nodes.values():
            if node.holdings.lacks(worker):
                node.refresh()

    @property
    def status(self) -> FeedStatus:
        return FeedStatus(
            is_synced=self._instances.synced.is_set(),
            nodes=tuple(node.status for node in self._nodes.values()),
            workers=self._workers.status,
            events_total=self._events_total,
            blocks_total=self._blocks_total,
            malformed_total=self._malformed_total,
            unknown_total=self._unknown_total,
            dropped_total=self._messages.dropped_total if self._messages is not None else 0,
            refused_total=self._refused_total,
        )

    # -- events --------------------------------------------------------------------------

    async def _hear_events(self, messages: Subscription) -> None:
        while batch := await messages.take(TURN_EVENTS):
            blocks = 0
            for message in batch:
                blocks += self._hear(message)
                if blocks >= TURN_BLOCKS:
                    self._writer.flush()
                    blocks = 0
                    await asyncio.sleep(0)
            self._writer.flush()
            await asyncio.sleep(0)

    def _hear(self, message: Message) -> int:
        """One message, gathered for the index; how many blocks it is about."""
        try:
            envelope = decode_envelope(message.payload)
        except WireError as error:
            if not self._malformed_total:
                _log.warning("event_malformed", subject=message.subject, reason=str(error))
            self._malformed_total += 1
            return 0
        self._events_total += 1
        if message.subject != self._subject:
            blocks = self._workers.hear(envelope)
        else:
            node = self._node_of(envelope.publisher_id)
            if node is None:
                # Its record will come; the question that follows brings what this says.
                self._unknown_total += 1
                return 0
            blocks = node.hear(envelope)
        self._blocks_total += blocks
        return blocks

    def _node_of(self, publisher: int) -> NodeFeed | None:
        node = self._by_publisher.get(publisher)
        if node is None or node.place.publisher != publisher:
            # A node's answer may tell of a new run before discovery does.
            self._by_publisher = {one.place.publisher: one for one in self._nodes.values()}
            node = self._by_publisher.get(publisher)
        return node

    def _is_of_a_node(self, worker: WorkerId) -> bool:
        return any(node.holdings.speaks_for(worker) for node in self._nodes.values())

    async def _hear_speeds(self, messages: Subscription) -> None:
        async for message in messages:
            if self._speeds is not None:
                self._speeds.hear(message.payload)
                await asyncio.sleep(0)

    async def _watch(self, messages: Subscription) -> None:
        """Whatever tells of a loss makes all nodes be asked; the rest their probes find.

        And what the index put off is done.
        """
        before = None
        while True:
            status = self._plane.status()
            now = (
                messages.active.is_set(),
                messages.dropped_total,
                status.connected,
                status.missed_total,
            )
            if before is not None and now != before:
                for node in self._nodes.values():
                    node.probe()
            before = now
            while self._writer.settled().upkeep():
                await asyncio.sleep(0)
            await asyncio.sleep(WATCH_S)

    # -- nodes ---------------------------------------------------------------------------

    def _changed(self, name: InstanceName, record: InstanceRecord | None) -> None:
        for node, records in list(self._records.items()):
            if records.pop(name, None) is not None and not (record and node == _node(record)):
                self._follow(node)
        if record is None:
            return
        node = _node(record)
        if node and (node in self._records or len(self._records) < NODES_MAX):
            self._records.setdefault(node, {})[name] = record
            self._follow(node)
        else:
            self._refuse(name, "no node is named" if not node else "too many nodes")

    def _follow(self, node: str) -> None:
        """By its newest record: that of a daemon that was killed stays a while beside it."""
        records = [one for one in self._records.get(node, {}).values() if one.is_serving]
        if not self._records.get(node):
            self._records.pop(node, None)
        if not records:
            if node in self._nodes:
                self._nodes[node].lost()
            return
        newest = max(records, key=lambda record: record.since_s)
        try:
            publisher = int(newest.labels.get(LABEL_PUBLISHER, ""), 16)
            readers = parse_readers(newest.labels.get(LABEL_READERS, "{}"))
        except (ValueError, WireError) as error:
            self._refuse(newest.name, str(error))
            return
        feed = self._nodes.get(node)
        if feed is None:
            feed = self._nodes[node] = NodeFeed(
                node,
                self._writer,
                self._runtime.client,
                str(self._endpoint),
                self._settings,
                self._turns,
                self._clock,
            )
            assert self._tasks is not None
            self._tasks.create_task(self._run(feed), name=f"feed {node}")
        feed.found(publisher, newest.transport, readers)

    async def _run(self, feed: NodeFeed) -> None:
        await feed.run()
        if self._nodes.get(feed.node) is feed:
            del self._nodes[feed.node]
            if self._speeds is not None:
                self._speeds.forget(feed.node)

    def _refuse(self, name: InstanceName, why: str) -> None:
        self._refused_total += 1
        _log.warning("node_record_refused", instance=str(name), why=why)


def _node(record: InstanceRecord) -> str:
    return record.labels.get(LABEL_NODE, "")
