"""The announcer where discovery, or a port for its endpoint, is not to be had."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvbm.announce import announcer as announcer_module
from kvbm.announce.announcer import Announcer
from kvbm.protocol import Pace, Routing
from kvbm.session import Connected
from runtime.component import Runtime
from runtime.discovery import DiscoverySettings, create_discovery, leased
from runtime.events import EventPlaneSettings
from runtime.events.memory import MemoryPlane
from runtime.events.node_stream import NodeSpeeds, blocks_subject, decode_speeds, speeds_subject
from runtime.requests import RequestPlaneSettings, create_request_plane
from storage_tiers.base import TierName
from tests.kvbm.announce.consumer import Consumer
from tests.kvbm.announce.test_stream_machine import key_of, note_of
from tests.kvbm.builders import RecordingEvents, until

ENGINE = Connected(Routing(5, 0, b"model", 16, 0), 1, Pace(1e-4), 0.0)


class Bay:
    def __init__(self) -> None:
        self.plane = MemoryPlane()
        self.heard = self.plane.subscribe(blocks_subject("default"))
        self.speeds = self.plane.subscribe(speeds_subject("default"))
        settings = EventPlaneSettings(plane="memory", linger=0.0)
        self.announcer = Announcer(self.plane, settings, "node", RecordingEvents())
        self.engines: list[Connected] = []

    @asynccontextmanager
    async def running(self, make_runtime: Callable[[], Runtime]) -> AsyncIterator[None]:
        task = asyncio.create_task(self.announcer.run(make_runtime, lambda: self.engines, dict))
        yield
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def tell(self) -> Consumer:
        """What somebody hears of three chunks, who need not ask."""
        keys = [key_of(number) for number in range(3)]
        self.announcer.tiers.learn(keys, [note_of(number).encode() for number in range(3)])
        self.announcer.tiers.stored(TierName.DRAM, keys)
        await until(lambda: self.heard._messages)
        consumer = Consumer()
        consumer.hear((await anext(self.heard)).payload)
        return consumer


def runtime_of(discovery: DiscoverySettings, **requests: object) -> Callable[[], Runtime]:
    def make() -> Runtime:
        plane = create_request_plane(RequestPlaneSettings.model_validate(requests), "node")
        return Runtime(create_discovery(discovery, {}), plane, drain_timeout_s=0.1)

    return make


async def test_discovery_that_is_away_stalls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leased, "WRITE_WAIT_S", 0.2)
    bay = Bay()
    away = DiscoverySettings(discovery="etcd", etcd_url="http://127.0.0.1:1")
    async with bay.running(runtime_of(away)):
        bay.engines = [ENGINE]
        bay.announcer.engines_changed()
        consumer = await bay.tell()
        assert consumer.is_behind, "it has to ask for the beginning"
        await until(lambda: bay.speeds._messages)
        told = decode_speeds((await anext(bay.speeds)).payload)
        assert isinstance(told, NodeSpeeds)
        assert [(s.worker_id, s.prefill_s_per_token) for s in told.workers] == [(5, 1e-4)]
        assert bay.announcer.status().tiers.blocks["G2"] == 3
        # Served, for whoever is told of it once discovery is back.
        await until(lambda: bay.announcer.status().endpoint is not None)


async def test_an_endpoint_without_a_port_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer_module, "RETRY_S", 0.05)
    bay = Bay()
    here = DiscoverySettings(discovery="file", file_directory=tmp_path, file_poll=0.02)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with bay.running(runtime_of(here, port=port)):
            await until(lambda: "in use" in (bay.announcer.status().error or ""))
            assert bay.announcer.status().endpoint is None
            await bay.tell()
            taken.close()
            await until(lambda: bay.announcer.status().endpoint is not None)
            assert bay.announcer.status().error is None
