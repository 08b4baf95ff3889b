"""Instances in discovery: what each says of itself, how it comes and goes, who sees them.

`Registration` keeps one instance's record true through its life. `Instances` is the live view of
a client: all that are under a prefix, as records. A record that cannot be read, or that lies about
its key, is counted and left out; it harms nobody else.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Final, Self, assert_never

import msgspec
import structlog

from runtime.discovery.base import Deleted, Discovery, Event, Outcome, Put, Synced, Watch
from runtime.lifecycle import SERVING, Lifecycle, State
from runtime.names import INSTANCE_ID_MAX, EndpointName, InstanceName, NameRefused
from runtime.tasks import end

LABELS_MAX: Final = 64

_log = structlog.get_logger()


class RecordRefused(ValueError):
    """A value in discovery that is no record of the instance that its key names."""


class InstanceRecord(msgspec.Struct, frozen=True):
    """JSON in discovery, so that people can read it with the store's own tools."""

    namespace: str
    component: str
    endpoint: str
    id: str  # hexadecimal: JSON's numbers end at 2^53
    transport: str  # where requests go, for example tcp://10.0.0.7:4711/chat
    state: State
    since_s: float
    host: str
    pid: int
    labels: dict[str, str] = {}

    @property
    def name(self) -> InstanceName:
        endpoint = EndpointName(self.namespace, self.component, self.endpoint)
        return InstanceName(endpoint, int(self.id, 16))

    @property
    def is_serving(self) -> bool:
        return self.state in SERVING

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, key: str, value: bytes) -> Self:
        """Raises RecordRefused, also if the record is another's."""
        try:
            named = InstanceName.of_key(key)
            record = msgspec.json.decode(value, type=cls)
            agrees = record.name == named
        except (NameRefused, msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise RecordRefused(f"{key}: {error}") from error
        if not agrees:
            raise RecordRefused(f"{key} holds the record of {record.name}")
        return record


def new_instance_id() -> int:
    return secrets.randbelow(INSTANCE_ID_MAX) + 1


class Registration:
    """One instance in discovery. Its steps are taken through `move`, so that others see them."""

    def __init__(
        self,
        discovery: Discovery,
        name: InstanceName,
        lifecycle: Lifecycle,
        transport: str,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        assert lifecycle.state is State.CREATED
        assert len(labels or {}) <= LABELS_MAX
        self.name = name
        self.lifecycle = lifecycle
        self._discovery = discovery
        self._transport = transport
        self._labels = dict(labels or {})

    @property
    def record(self) -> InstanceRecord:
        return InstanceRecord(
            namespace=self.name.endpoint.namespace,
            component=self.name.endpoint.component,
            endpoint=self.name.endpoint.endpoint,
            id=f"{self.name.id:x}",
            transport=self._transport,
            state=self.lifecycle.state,
            since_s=self.lifecycle.since_s,
            host=socket.gethostname(),
            pid=os.getpid(),
            labels=self._labels,
        )

    async def register(self) -> Outcome:
        return await self.move(State.REGISTERED)

    async def move(self, state: State, labels: Mapping[str, str] | None = None) -> Outcome:
        """Take a step and tell it; the lifecycle says which may be taken.

        `labels`, where given, replace the record's: what an instance learns while it starts.
        """
        assert state is not State.DEREGISTERED, "that is what `deregister` does"
        self.lifecycle.to(state)
        if labels is not None:
            assert len(labels) <= LABELS_MAX
            self._labels = dict(labels)
        return await self._discovery.put(self.name.key, self.record.encode())

    async def relabel(self, labels: Mapping[str, str]) -> Outcome:
        """Say this of it from now on instead; it is registered, and not on its way out."""
        assert len(labels) <= LABELS_MAX
        assert self.lifecycle.state in {State.REGISTERED, *SERVING}
        self._labels = dict(labels)
        return await self._discovery.put(self.name.key, self.record.encode())

    async def deregister(self) -> Outcome:
        """Gone for all clients; what it has in hand it may still finish before. Once only."""
        if self.lifecycle.state is not State.STOPPING:
            self.lifecycle.to(State.STOPPING)
        outcome = await self._discovery.delete(self.name.key)
        self.lifecycle.to(State.DEREGISTERED)
        return outcome


Change = Callable[[InstanceName, InstanceRecord | None], None]


class Instances:
    """All instances under a prefix, as they come and go. `synced` is set once it is complete."""

    def __init__(self, discovery: Discovery, prefix: str, on_change: Change | None = None) -> None:
        self.known: dict[InstanceName, InstanceRecord] = {}
        self.refused_total = 0
        self.synced = asyncio.Event()
        self._discovery = discovery
        self._prefix = prefix
        self._on_change = on_change
        self._changed = asyncio.Condition()
        self._watch: Watch | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def serving(self) -> list[InstanceRecord]:
        return [record for record in self.known.values() if record.is_serving]

    async def start(self) -> None:
        assert self._watch is None, "started already"
        self._watch = self._discovery.watch(self._prefix)
        self._task = asyncio.create_task(self._follow(self._watch), name="instances")

    async def close(self) -> None:
        """Idempotent; what is known stays as it was."""
        task, self._task = self._task, None
        if self._watch is not None and task is not None:
            self._watch.close()
            await end(task)

    async def wait_for(self, count: int, timeout_s: float) -> list[InstanceRecord]:
        """At least `count` that serve; raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: len(self.serving) >= count)
        return self.serving

    async def _follow(self, watch: Watch) -> None:
        async for event in watch:
            self._apply(event)
            async with self._changed:
                self._changed.notify_all()

    def _apply(self, event: Event) -> None:
        match event:
            case Synced():
                self.synced.set()
            case Deleted(key):
                self._set(key, None)
            case Put(key, value):
                try:
                    self._set(key, InstanceRecord.decode(key, value))
                except RecordRefused as error:
                    self.refused_total += 1
                    _log.warning("instance_record_refused", why=str(error))
                    self._set(key, None)  # what it said before is not true any more
            case _:
                assert_never(event)

    def _set(self, key: str, record: InstanceRecord | None) -> None:
        try:
            name = InstanceName.of_key(key)
        except NameRefused:
            return  # counted when it came
        if record is not None:
            self.known[name] = record
        elif self.known.pop(name, None) is None:
            return
        if self._on_change is not None:
            self._on_change(name, record)
