"""Programs on ZMQ that find each other through discovery, some in processes of their own."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.discovery import Discovery, DiscoverySettings, create_discovery
from runtime.event_peers import EventChannel, EventPeers, joined, reachable
from runtime.events import EventPlaneSettings, Subscription
from runtime.events.memory import MemoryPlane
from runtime.events.zmq import ZmqPlane
from runtime.hosts import is_loopback, own_address, without_wildcard
from runtime.names import EVENT_CHANNELS
from runtime.server_process import free_ports
from tests.runtime.planes import WAIT_S, until, zmq_settings

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()
PREFIX = f"{EVENT_CHANNELS}default/"


@pytest.fixture
def discovery_settings(tmp_path: Path) -> DiscoverySettings:
    return DiscoverySettings(
        discovery="file", file_directory=tmp_path / "discovery", file_poll=0.05, ttl=1.0
    )


@pytest.fixture
async def discovery(discovery_settings: DiscoverySettings) -> AsyncIterator[Discovery]:
    discovery = create_discovery(discovery_settings, {})
    await discovery.start()
    yield discovery
    await discovery.close()


class Listener:
    def __init__(self, discovery: Discovery, **other: Any) -> None:
        settings = zmq_settings(**other)
        self.plane = ZmqPlane(settings, "listener")
        self.peers = EventPeers(discovery, self.plane, settings, publishes=True, listens=True)

    async def start(self) -> Subscription:
        await self.plane.start()
        await self.peers.start()
        return self.plane.subscribe("s")

    async def close(self) -> None:
        await self.peers.close()
        await self.plane.close()


@pytest.fixture
async def listener(discovery: Discovery) -> AsyncIterator[Listener]:
    listener = Listener(discovery)
    yield listener
    await listener.close()


class Publishers:
    def __init__(self, settings: DiscoverySettings) -> None:
        self._settings = settings
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, **events: Any) -> None:
        settings = EventPlaneSettings(plane="zmq", **events).model_dump_json()
        command = [sys.executable, "-m", "tests.runtime.event_publisher"]
        command += [self._settings.model_dump_json(), settings, name]
        self._processes[name] = subprocess.Popen(command, cwd=ROOT)

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        for name in list(self._processes):
            self.kill(name)


@pytest.fixture
def publishers(discovery_settings: DiscoverySettings) -> Iterator[Publishers]:
    publishers = Publishers(discovery_settings)
    yield publishers
    publishers.close()


async def hear(subscription: Subscription, *names: str) -> None:
    """Until each was heard, again."""
    subscription._messages.clear()
    wanted = {name.encode() for name in names}
    async with asyncio.timeout(WAIT_S):
        while wanted:
            wanted.discard((await anext(subscription)).payload)


def record(address: str, host: str = HOST) -> bytes:
    return msgspec.json.encode(EventChannel(address, host, 1))


async def test_publishers_are_heard_as_they_come_and_left_when_they_are_killed(
    listener: Listener, publishers: Publishers
) -> None:
    subscription = await listener.start()
    publishers.start("a")
    publishers.start("b", zmq_bind="tcp://0.0.0.0:0")
    await hear(subscription, "a", "b")
    await until(lambda: listener.peers.status().peers == 2)
    publishers.kill("a")
    # Its lease ends, and with it the connection: what is left is well connected again.
    await until(lambda: listener.peers.status().peers == 1)
    await until(lambda: listener.plane.status().connected)
    publishers.start("a again", zmq_bind=f"tcp://127.0.0.1:{free_ports(1)[0]}")
    await hear(subscription, "a again", "b")
    await until(lambda: listener.peers.status().peers == 2)


async def test_one_that_was_killed_is_heard_again_on_the_same_port(
    listener: Listener, publishers: Publishers
) -> None:
    """The old record ends while the new one is there; the connection they share must stay."""
    subscription = await listener.start()
    port = free_ports(1)[0]
    publishers.start("first", zmq_bind=f"tcp://127.0.0.1:{port}")
    await hear(subscription, "first")
    publishers.kill("first")
    publishers.start("second", zmq_bind=f"tcp://127.0.0.1:{port}")
    await hear(subscription, "second")
    await until(lambda: len(listener.peers._heard) == 1)
    await hear(subscription, "second")
    await until(lambda: listener.peers.status().peers == 1)


async def test_programs_that_do_both_hear_each_other_and_themselves_once(
    discovery: Discovery, listener: Listener
) -> None:
    second = Listener(discovery)
    mine, other = await listener.start(), await second.start()
    await until(lambda: listener.peers.status().peers == second.peers.status().peers == 1)
    await until(lambda: listener.plane.status().connected and second.plane.status().connected)
    async with asyncio.timeout(WAIT_S):
        while not other._messages:
            listener.plane.publish("s", b"x")
            await asyncio.sleep(0.02)
    sent = listener.plane.status().published_total
    assert len(mine._messages) == sent
    await second.close()
    await until(lambda: listener.peers.status().peers == 0)


async def test_a_publisher_that_closes_goes_at_once(
    discovery: Discovery, listener: Listener
) -> None:
    await listener.start()
    await until(lambda: listener.peers.status().announced is not None)
    await until_listed(discovery, 1)
    assert listener.peers.status().announced == listener.plane.address
    await listener.peers.close()
    await listener.peers.close()
    await until_listed(discovery, 0)


async def test_taking_part_ends_with_its_block_and_is_nothing_where_a_broker_is(
    discovery: Discovery,
) -> None:
    settings = zmq_settings()
    plane = ZmqPlane(settings, "test")
    await plane.start()
    async with joined(discovery, plane, settings, publishes=True) as peers:
        assert peers is not None
        await until_listed(discovery, 1)
    await until_listed(discovery, 0)
    await plane.close()
    async with joined(discovery, MemoryPlane(), settings, publishes=True) as none:
        assert none is None
    assert await discovery.list(PREFIX) == {}


async def until_listed(discovery: Discovery, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while len(await discovery.list(PREFIX)) != count:
            await asyncio.sleep(0.02)


async def test_records_that_are_none_or_lead_nowhere_are_counted_and_harm_nobody(
    discovery: Discovery, listener: Listener, publishers: Publishers
) -> None:
    wrong = {
        "1": b"{",
        "2": b"[]",
        "3": record("http://127.0.0.1:1"),
        "4": record("tcp://127.0.0.1:1", "another-host"),
        "5": record("ipc:///tmp/x", "another-host"),
        "6": record("tcp://[::1]:1", "another-host"),
    }
    for key, value in wrong.items():
        await discovery.put(PREFIX + key, value)
    subscription = await listener.start()
    publishers.start("good")
    await hear(subscription, "good")
    assert listener.peers.status().refused_total == len(wrong)
    await until(lambda: listener.peers.status().peers == 1)


async def test_a_record_that_changes_takes_its_old_address_along(
    discovery: Discovery, listener: Listener
) -> None:
    await listener.start()
    first, second = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    await discovery.put(PREFIX + "1", record(first))
    await until(lambda: list(listener.plane._peers) == [first])
    await discovery.put(PREFIX + "1", record(second))
    await until(lambda: list(listener.plane._peers) == [second])
    await discovery.put(PREFIX + "1", b"nonsense")
    await until(lambda: not listener.plane._peers)


async def test_addresses_in_the_settings_stay_whatever_discovery_says(discovery: Discovery) -> None:
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    listener = Listener(discovery, zmq_peers=[address])
    await listener.start()
    await discovery.put(PREFIX + "1", record(address))
    await until(lambda: listener.peers.status().peers == 1)
    await discovery.delete(PREFIX + "1")
    await until(lambda: listener.peers.status().peers == 0)
    assert list(listener.plane._peers) == [address]
    await listener.close()


async def test_an_address_that_is_taken_is_announced_when_it_is_had(discovery: Discovery) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listener = Listener(discovery, zmq_bind=f"tcp://127.0.0.1:{port}")
        await listener.start()
        await until(lambda: "in use" in str(listener.plane.status().error))
        assert listener.peers.status().announced is None
    await until(lambda: listener.peers.status().announced == f"tcp://127.0.0.1:{port}")
    await listener.close()


def test_a_wildcard_is_replaced_by_the_machines_address_or_the_one_that_is_set() -> None:
    assert reachable("tcp://10.0.0.7:5560") == "tcp://10.0.0.7:5560"
    assert reachable("tcp://0.0.0.0:5560") == f"tcp://{own_address()}:5560"
    assert reachable("tcp://[::]:5560") == f"tcp://[{own_address(6)}]:5560"
    assert reachable("tcp://0.0.0.0:5560", "node-1") == "tcp://node-1:5560"
    assert reachable("tcp://[::1]:5560", "fd00::7") == "tcp://[fd00::7]:5560"
    assert reachable("ipc:///tmp/events", "node-1") == "ipc:///tmp/events"
    assert without_wildcard("node-1") == "node-1"


@pytest.mark.parametrize(
    ("host", "is_one"),
    [("localhost", True), ("127.8.0.1", True), ("::1", True), ("10.0.0.1", False), ("h", False)],
)
def test_loopback_is_told_without_a_resolver(host: str, is_one: bool) -> None:
    assert is_loopback(host) is is_one
