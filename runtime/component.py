"""Components: functions that other programs find by name and call.

    async with Runtime(discovery, requests) as runtime:
        chat = runtime.namespace("production").component("Processor").endpoint("chat/completions")
        await chat.serve(handler)                       # in one program
        async for item in chat.client().generate(...)   # in another

A `Runtime` owns a program's place in discovery and on the request plane. Leaving it takes back what
it serves: first clients find it no more, then what is in flight may end, then connections close.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self, assert_never

from runtime.discovery import Discovery
from runtime.instances import InstanceRecord, Instances, Registration, new_instance_id
from runtime.lifecycle import SERVING, Lifecycle, State
from runtime.names import EndpointName, InstanceName
from runtime.requests import (
    Canary,
    RequestClient,
    RequestError,
    RequestPlane,
    RequestServer,
    ResponseStream,
)
from runtime.requests.base import Handler

DRAIN_TIMEOUT_S: Final = 30.0
HEALTH_POLL_S: Final = 0.5
ATTEMPTS_MAX: Final = 5
SYNC_TIMEOUT_S: Final = 5.0

Mode = Literal["round-robin", "random"]


class NoInstance(Exception):
    """Nobody serves the endpoint, or not the instance that was asked for."""

    def __init__(self, endpoint: EndpointName, wanted: int | None, known: int) -> None:
        self.endpoint = endpoint
        self.wanted = wanted
        which = "no instance" if wanted is None else f"no instance {wanted:x}"
        super().__init__(f"{endpoint} has {which} that serves; {known} are registered")


class Runtime:
    """All methods are called from one event loop. It owns both planes and closes discovery."""

    def __init__(
        self,
        discovery: Discovery,
        requests: RequestPlane,
        *,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        self.discovery = discovery
        self.requests = requests
        self.serving: list[Serving] = []
        self._drain_timeout_s = drain_timeout_s
        self._client: RequestClient | None = None
        self._clients: list[EndpointClient] = []

    def namespace(self, name: str) -> Namespace:
        return Namespace(self, name)

    def endpoint(self, reference: str) -> Endpoint:
        """Of `namespace.component.endpoint`; raises NameRefused."""
        return Endpoint(self, EndpointName.parse(reference))

    @property
    def client(self) -> RequestClient:
        """One for all endpoints, so that calls to one program share a connection."""
        if self._client is None:
            self._client = self.requests.client()
        return self._client

    def outcomes_total(self) -> Counter[str]:
        """How requests to what it serves ended."""
        found: Counter[str] = Counter()
        for one in self.serving:
            found.update(one.server.status().outcomes_total)
        return found

    def keep(self, client: EndpointClient) -> None:
        """Close it with the runtime."""
        self._clients.append(client)

    async def close(self) -> None:
        """Idempotent."""
        serving, self.serving = self.serving, []
        await asyncio.gather(*(one.stop(self._drain_timeout_s) for one in serving))
        for client in self._clients:
            await client.close()
        self._clients.clear()
        if self._client is not None:
            await self._client.close()
        await self.discovery.close()

    async def __aenter__(self) -> Self:
        await self.discovery.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@dataclass(frozen=True, slots=True)
class Namespace:
    """What is in one namespace does not see what is in another."""

    runtime: Runtime
    name: str

    def component(self, name: str) -> Component:
        return Component(self.runtime, self.name, name)


@dataclass(frozen=True, slots=True)
class Component:
    runtime: Runtime
    namespace: str
    name: str

    def endpoint(self, name: str) -> Endpoint:
        """Raises NameRefused if any of the three names is none."""
        return Endpoint(self.runtime, EndpointName(self.namespace, self.name, name))


@dataclass(frozen=True, slots=True)
class Endpoint:
    runtime: Runtime
    name: EndpointName

    async def serve(
        self,
        handler: Handler,
        *,
        canary: Canary | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Serving:
        """One more instance of it, with an address of its own; raises OSError if it has none.

        Discovery that cannot be reached is no error: the instance is registered when it can.
        """
        server = self.runtime.requests.server()
        server.serve(str(self.name), handler, canary=canary)
        address = await server.start()
        name = InstanceName(self.name, new_instance_id())
        registration = Registration(self.runtime.discovery, name, Lifecycle(), address, labels)
        serving = Serving(server, registration, watched=canary is not None)
        self.runtime.serving.append(serving)
        await serving.start()
        return serving

    def client(self, *, seed: int | None = None) -> EndpointClient:
        client = EndpointClient(self.runtime, self.name, random.Random(seed))
        self.runtime.keep(client)
        return client


class Serving:
    """One instance. With a canary it is `healthy` while that is answered, else `running`."""

    def __init__(self, server: RequestServer, registration: Registration, *, watched: bool) -> None:
        self.server = server
        self._registration = registration
        self._watched = watched
        self._watching: asyncio.Task[None] | None = None

    @property
    def name(self) -> InstanceName:
        return self._registration.name

    @property
    def state(self) -> State:
        return self._registration.lifecycle.state

    async def start(self) -> None:
        await self._registration.register()
        await self._registration.move(State.RUNNING)
        if self._watched:
            self._watching = asyncio.create_task(self._watch(), name=f"health {self.name}")

    async def relabel(self, labels: Mapping[str, str]) -> None:
        """Say this of it from now on; nothing happens once it is being stopped."""
        if self.state in SERVING:
            await self._registration.relabel(labels)

    async def leave(self) -> None:
        """Say that it is stopping: clients send nothing more; what comes yet is answered."""
        if self.state in SERVING:
            await self._registration.move(State.STOPPING)

    async def stop(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Deregister, let what is in flight end within the time, close. Idempotent."""
        if self.state is State.DEREGISTERED:
            return
        if self._watching is not None:
            self._watching.cancel()
        await self._registration.deregister()
        await self.server.drain(timeout_s)
        await self.server.close()

    async def _watch(self) -> None:
        """Canaries' results become the instance's state, for all to see."""
        while True:
            await asyncio.sleep(HEALTH_POLL_S)
            endpoints = self.server.status().endpoints.values()
            well = all(one.probed and one.unhealthy is None for one in endpoints)
            wanted = State.HEALTHY if well else State.RUNNING
            if wanted is not self.state and self._registration.lifecycle.may(wanted):
                await self._registration.move(wanted)


class EndpointClient:
    """Calls instances of one endpoint, as discovery knows them."""

    def __init__(self, runtime: Runtime, name: EndpointName, dice: random.Random) -> None:
        self.name = name
        self._runtime = runtime
        self._dice = dice
        self._instances = Instances(runtime.discovery, name.instances_prefix)
        self._started = False
        self._turn = 0

    @property
    def instance_ids(self) -> list[int]:
        return sorted(record.name.id for record in self._instances.serving)

    async def wait_for_instances(self, count: int = 1, timeout_s: float = 30.0) -> list[int]:
        """Until so many serve; raises TimeoutError."""
        await self._start()
        records = await self._instances.wait_for(count, timeout_s)
        return sorted(record.name.id for record in records)

    def round_robin(
        self,
        payload: bytes,
        *,
        deadline_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        return self.generate(payload, "round-robin", deadline_s=deadline_s, headers=headers)

    def random(
        self,
        payload: bytes,
        *,
        deadline_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        return self.generate(payload, "random", deadline_s=deadline_s, headers=headers)

    async def generate(
        self,
        payload: bytes,
        mode: Mode = "round-robin",
        *,
        deadline_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """The answer of one instance; closing the generator cancels the handler.

        An instance that cannot have begun on the request is passed over for another one. Raises
        NoInstance, or the RequestError of the last that was tried.
        """
        tried: set[int] = set()
        last: RequestError | None = None
        while True:
            record = await self._choose(mode, tried)
            if record is None:
                raise last or NoInstance(self.name, None, len(self._instances.known))
            tried.add(record.name.id)
            try:
                async with self._sent_to(record, payload, deadline_s, headers) as answer:
                    async for item in answer:
                        yield item
                return
            except RequestError as error:
                if not error.may_retry or len(tried) == ATTEMPTS_MAX:
                    raise
                last = error

    async def direct(
        self,
        payload: bytes,
        instance: int,
        *,
        deadline_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """The answer of that instance and no other. Raises NoInstance or RequestError."""
        await self._start()
        found = [one for one in self._instances.serving if one.name.id == instance]
        if not found:
            raise NoInstance(self.name, instance, len(self._instances.known))
        async with self._sent_to(found[0], payload, deadline_s, headers) as answer:
            async for item in answer:
                yield item

    async def close(self) -> None:
        """Idempotent."""
        await self._instances.close()

    async def _start(self) -> None:
        if not self._started:
            self._started = True
            await self._instances.start()
        # Discovery may be out of reach: then what is known has to do.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SYNC_TIMEOUT_S):
                await self._instances.synced.wait()

    async def _choose(self, mode: Mode, without: set[int]) -> InstanceRecord | None:
        await self._start()
        serving: Sequence[InstanceRecord] = sorted(
            (one for one in self._instances.serving if one.name.id not in without),
            key=lambda one: one.name.id,
        )
        if not serving:
            return None
        match mode:
            case "random":
                return serving[self._dice.randrange(len(serving))]
            case "round-robin":
                self._turn += 1
                return serving[self._turn % len(serving)]
            case _:
                assert_never(mode)

    def _sent_to(
        self,
        record: InstanceRecord,
        payload: bytes,
        deadline_s: float | None,
        headers: Mapping[str, str] | None,
    ) -> ResponseStream:
        return self._runtime.client.stream(
            record.transport, str(self.name), payload, deadline_s=deadline_s, headers=headers
        )
