"""The stream of a daemon without a broker: a listener that knows discovery only hears it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from kvbm.note import Note, domain_of
from kvbm.protocol import Routing
from kvbm.stand_in import StandIn
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.event_peers import joined
from runtime.events import EventPlaneSettings, Subscription
from runtime.events.envelope import decode_envelope
from runtime.events.node_stream import blocks_subject
from runtime.events.zmq import ZmqPlane
from runtime.hashing import block_hashes
from storage_tiers.testing import make_items

CHUNK = 256 << 10
WAIT_S = 60.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    sockets = Path(tempfile.mkdtemp(prefix="kvbm-test-"))
    daemon = Daemon(
        DaemonConfig(
            folder=tmp_path / "node",
            socket=sockets / "s",
            logs=tmp_path / "node",
            records=tmp_path / "node",
            node="node-1",
            events={"plane": "zmq", "zmq_bind": "tcp://0.0.0.0:0"},
            discovery={"file_directory": str(tmp_path / "discovery"), "file_poll": 0.02},
            dram="16MiB",
            ssd="64MiB",
        )
    )
    yield daemon
    daemon.process.stop()
    shutil.rmtree(sockets, ignore_errors=True)


async def test_a_daemons_stream_is_found_through_discovery_and_gone_with_it(
    daemon: Daemon, tmp_path: Path
) -> None:
    settings = EventPlaneSettings(plane="zmq")
    plane = ZmqPlane(settings, "router")
    await plane.start()
    discovery = create_discovery(
        DiscoverySettings(file_directory=tmp_path / "discovery", file_poll=0.02), {}
    )
    await discovery.start()
    async with joined(discovery, plane, settings, listens=True) as peers:
        assert peers is not None
        events = plane.subscribe(blocks_subject(settings.namespace))
        await asyncio.to_thread(daemon.start)
        async with asyncio.timeout(WAIT_S):
            while not (peers.status().peers and plane.status().connected):
                await asyncio.sleep(0.02)
        await _hear(events, daemon)
        await asyncio.to_thread(daemon.stop)
        async with asyncio.timeout(WAIT_S):
            while peers.status().peers:
                await asyncio.sleep(0.02)
    await discovery.close()
    await plane.close()


async def _hear(events: Subscription, daemon: Daemon) -> None:
    """Store chunks until an event comes: a connection's subscription takes a moment."""
    heard = asyncio.ensure_future(anext(events))
    async with asyncio.timeout(WAIT_S):
        for number in range(100):
            await asyncio.to_thread(_store, daemon, number)
            await asyncio.wait({heard}, timeout=0.2)
            if heard.done():
                break
        assert decode_envelope((await heard).payload).publisher_id


def _store(daemon: Daemon, number: int) -> None:
    local = block_hashes(range(1000 * number, 1000 * number + 32), 16)
    note = Note(domain_of(b"model", b"", 0), None, local).encode()
    items = make_items(f"zmq {number}", 1, CHUNK)
    items = [replace(item, chunk=replace(item.chunk, note=note)) for item in items]
    with StandIn(daemon.socket, CHUNK, routing=Routing(5, 0, b"model", 16, 0)) as engine:
        engine.store(items)
