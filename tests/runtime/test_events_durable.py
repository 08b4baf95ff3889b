"""Block events kept in JetStream: who was away reads what it missed; the rest is counted."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from pydantic import ValidationError

from runtime.embedded import EmbeddedNats
from runtime.events import EventPlaneSettings
from runtime.events import jetstream as jetstream_module
from runtime.events import nats as nats_module
from runtime.events.base import HistoryUnavailable
from runtime.events.blocks import blocks_subject
from runtime.events.nats import NatsPlane
from runtime.events.node_stream import blocks_subject as node_subject
from runtime.server_process import free_ports
from tests.runtime.planes import WAIT_S, nats_settings, take, until

NAMESPACE = "default"
SUBJECT = blocks_subject(NAMESPACE, "n1")
STREAM = f"kvbm-{NAMESPACE}-events"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(
        tmp_path_factory.mktemp("nats"), port=free_ports(1)[0], jetstream=True
    ) as server:
        yield server


@pytest.fixture
async def server(shared: EmbeddedNats) -> AsyncIterator[EmbeddedNats]:
    yield shared
    async with Api(shared) as api:
        for name in await api.streams_info():
            await api.delete_stream(name.config.name)


class Api:
    """JetStream as another program sees it."""

    def __init__(self, server: EmbeddedNats) -> None:
        self._server = server
        self._client: Any = None

    async def __aenter__(self) -> JetStreamContext:
        server = self._server
        self._client = await nats.connect(server.url, user=server.user, password=server.password)
        context: JetStreamContext = self._client.jetstream()
        return context

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()


@pytest.fixture
async def planes() -> AsyncIterator[Callable[..., Any]]:
    opened: list[NatsPlane] = []

    async def make(server: EmbeddedNats, **other: Any) -> NatsPlane:
        plane = NatsPlane(nats_settings(server, **{"nats_durable": True, **other}), "test")
        await plane.start()
        opened.append(plane)
        await until(lambda: plane.status().connected)
        return plane

    yield make
    for plane in opened:
        await plane.close()


async def kept(plane: NatsPlane, subject: str = SUBJECT, since_s: float = 0.0) -> list[bytes]:
    async with asyncio.timeout(WAIT_S):
        return [message.payload async for message in plane.history(subject, since_s)]


async def publish(plane: NatsPlane, numbers: range, subject: str = SUBJECT) -> list[bytes]:
    sent = [b"%d" % number for number in numbers]
    for payload in sent:
        assert plane.publish(subject, payload)
    await until(lambda: plane.status().queued == 0)
    return sent


async def test_who_comes_late_reads_all_that_was_published_in_its_order(
    server: EmbeddedNats, planes: Any
) -> None:
    publisher = await planes(server)
    sent = await publish(publisher, range(1000))
    other = await publish(publisher, range(3), node_subject(NAMESPACE))
    await publish(publisher, range(3), "not.of.blocks")
    late = await planes(server)
    assert await kept(late) == await kept(late, blocks_subject(NAMESPACE, "*")) == sent
    assert await kept(late, node_subject(NAMESPACE)) == other
    assert await kept(late, "not.of.blocks") == []
    status = publisher.status()
    assert (status.published_total, status.unconfirmed_total, status.error) == (1006, 0, None)


async def test_with_history_a_subscriber_misses_nothing_of_a_publisher_that_goes_on(
    server: EmbeddedNats, planes: Any
) -> None:
    publisher, late = await planes(server), await planes(server)
    begun_s = time.time() - 1
    await publish(publisher, range(500))
    going_on = asyncio.create_task(publish(publisher, range(500, 3000)))
    async with late.subscribe(SUBJECT) as live:
        await asyncio.wait_for(live.active.wait(), WAIT_S)
        past = [int(payload) for payload in await kept(late, since_s=begun_s)]
        await going_on
        assert past == list(range(len(past))) and len(past) >= 500
        seen = set(past)
        while len(seen) < 3000:
            (payload,) = await take(live, 1)
            seen.add(int(payload))
    # Only what was published before the subscription can have needed the stream.
    assert seen == set(range(3000))


async def test_only_what_is_as_young_as_asked_is_given(server: EmbeddedNats, planes: Any) -> None:
    publisher = await planes(server)
    await publish(publisher, range(10))
    await asyncio.sleep(0.3)
    between_s = time.time() - 0.15
    later = await publish(publisher, range(10, 20))
    assert await kept(publisher, since_s=between_s) == later


async def test_the_stream_is_bounded_by_bytes_and_age_and_gives_up_the_oldest(
    server: EmbeddedNats, planes: Any
) -> None:
    publisher = await planes(server, nats_durable_bytes=1 << 20, nats_durable_age=600.0)
    for number in range(40):
        assert publisher.publish(SUBJECT, b"%02d" % number + b"x" * 100_000)
    await until(lambda: publisher.status().queued == 0)
    numbers = [int(payload[:2]) for payload in await kept(publisher)]
    assert numbers == list(range(numbers[0], 40)) and 5 <= len(numbers) <= 10
    assert publisher.status().unconfirmed_total == 0
    async with Api(server) as api:
        config = (await api.stream_info(STREAM)).config
    assert (config.max_bytes, config.max_age) == (1 << 20, 600.0)


async def test_a_stream_with_other_limits_is_made_as_it_is_set_and_keeps_what_it_has(
    server: EmbeddedNats, planes: Any
) -> None:
    before = await planes(server, nats_durable_age=100.0)
    sent = await publish(before, range(10))
    after = await planes(server, nats_durable_age=200.0)
    async with Api(server) as api:
        assert (await api.stream_info(STREAM)).config.max_age == 200.0
    assert await kept(after) == sent


async def test_a_restart_of_the_server_keeps_what_was_and_doubles_nothing(
    server: EmbeddedNats, planes: Any
) -> None:
    publisher = await planes(server)
    sent = await publish(publisher, range(100))
    server.stop()
    await until(lambda: not publisher.status().connected)
    for number in range(100, 200):
        assert publisher.publish(SUBJECT, b"%d" % number)
    server.start()
    await until(lambda: publisher.status().queued == 0)
    assert await kept(publisher) == sent + [b"%d" % number for number in range(100, 200)]


async def test_a_burst_that_is_sent_again_is_kept_once(
    server: EmbeddedNats, planes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stands still with messages in its socket, and the publisher connects anew."""
    monkeypatch.setattr(nats_module, "CONFIRM_TIMEOUT_S", 0.5)
    publisher = await planes(server)
    await publish(publisher, range(10))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    for number in range(10, 300):
        assert publisher.publish(SUBJECT, b"%d" % number)
    await until(lambda: publisher.status().error is not None)  # it was not confirmed in time
    os.kill(server.pid, signal.SIGCONT)
    await until(lambda: publisher.status().queued == 0)
    assert await kept(publisher) == [b"%d" % number for number in range(300)]


async def test_without_jetstream_events_flow_and_the_error_says_what_to_do(
    tmp_path: Path, planes: Any
) -> None:
    with EmbeddedNats(tmp_path) as plain:
        plane = await planes(plain)
        await until(lambda: "JetStream is not enabled" in str(plane.status().error))
        assert "-js" in str(plane.status().error)
        async with plane.subscribe(SUBJECT) as live:
            await asyncio.wait_for(live.active.wait(), WAIT_S)
            sent = await publish(plane, range(100))
            assert await take(live, 100) == sent
        assert plane.status().connected
        assert plane.status().unconfirmed_total == 100
        assert "JetStream is not enabled" in str(plane.status().error)
        with pytest.raises(HistoryUnavailable, match="JetStream is not enabled"):
            await kept(plane)


async def test_a_stream_that_confirms_nothing_costs_the_live_events_nothing(
    server: EmbeddedNats, planes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream_module, "ACK_TIMEOUT_S", 0.2)
    plane = await planes(server)
    async with Api(server) as api:
        config = (await api.stream_info(STREAM)).config
        await api.update_stream(config.evolve(no_ack=True))
    async with plane.subscribe(SUBJECT) as live:
        await asyncio.wait_for(live.active.wait(), WAIT_S)
        sent = await publish(plane, range(1000))
        assert await take(live, 1000) == sent
    assert plane.status().unconfirmed_total > 0
    assert plane.status().dropped_total == 0
    assert "does not confirm" in str(plane.status().error)
    assert plane.status().connected


async def test_a_stream_that_is_deleted_is_made_again(
    server: EmbeddedNats, planes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream_module, "STREAM_RETRY_S", 0.3)
    plane = await planes(server)
    async with Api(server) as api:
        await api.delete_stream(STREAM)
    await publish(plane, range(10))
    assert plane.status().unconfirmed_total == 10
    assert "is gone" in str(plane.status().error)

    async def is_kept() -> bool:
        sent = await publish(plane, range(10, 11))
        return plane.status().error is None and (await kept(plane))[-1:] == sent

    async with asyncio.timeout(WAIT_S):
        while not await is_kept():
            await asyncio.sleep(0.1)


async def test_another_stream_on_these_subjects_is_told(server: EmbeddedNats, planes: Any) -> None:
    async with Api(server) as api:
        await api.add_stream(StreamConfig(name="foreign", subjects=["kvbm.>"]))
        plane = await planes(server)
        await until(lambda: "another stream" in str(plane.status().error))
        sent = await publish(plane, range(10))
        assert (await api.stream_info("foreign")).state.messages == len(sent)
    with pytest.raises(HistoryUnavailable, match="stream not found"):
        await kept(plane)


async def test_history_without_what_it_takes_says_so(server: EmbeddedNats, planes: Any) -> None:
    plain = await planes(server, nats_durable=False)
    with pytest.raises(HistoryUnavailable, match="nats_durable is not set"):
        plain.history(SUBJECT, 0.0)
    plane = NatsPlane(nats_settings(server, nats_durable=True), "never started")
    with pytest.raises(HistoryUnavailable, match="not connected"):
        plane.history(SUBJECT, 0.0)


def test_only_nats_is_durable() -> None:
    with pytest.raises(ValidationError, match="nats_durable needs plane nats"):
        EventPlaneSettings(plane="zmq", nats_durable=True)
