"""TCP alone: one connection for all streams, and whatever else may come over a socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.requests import RequestPlaneSettings, create_request_plane
from runtime.requests.errors import ConnectionLost, Outcome
from runtime.requests.tcp import split
from runtime.requests.wire import (
    VERSION,
    Bye,
    Cancel,
    End,
    Frame,
    FrameError,
    FrameReader,
    Grant,
    Hello,
    Item,
    Open,
    Ping,
    Pong,
    Stop,
    encode,
)
from tests.runtime.requests.conftest import LIMITS, Stage
from tests.runtime.requests.handlers import WAIT_S, Handlers, until

HELLO = encode(Hello(VERSION, 1 << 20, "raw"))
LIMIT = 1 << 20


def open_frame(stream: int, endpoint: str = "test.wait.forever") -> bytearray:
    return encode(Open(stream, endpoint, b"", {}, 10.0, 65536))


@pytest.fixture(name="settings")
def tcp_settings() -> RequestPlaneSettings:
    """Of the fixture `stage`, here for TCP alone."""
    return RequestPlaneSettings(**LIMITS)  # type: ignore[arg-type]


@asynccontextmanager
async def raw(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = split(address, "tcp://")
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def all_frames(reader: asyncio.StreamReader) -> list[Frame]:
    """What comes until the other side closes."""
    async with asyncio.timeout(WAIT_S):
        try:
            data = await reader.read(-1)
        except ConnectionResetError:
            data = b""
    return list(FrameReader(LIMIT).feed(data))


async def test_all_streams_share_one_connection_made_once(stage: Stage) -> None:
    streams = [stage.client.stream(stage.address, "test.wait.forever", b"") for _ in range(50)]
    assert await asyncio.gather(*(anext(stream) for stream in streams)) == [b"begun"] * 50
    assert stage.server.status().connections == stage.client.status().connections == 1
    assert stage.client.status().in_flight == 50


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes"),
        (b"\0\0\0\0", "a frame of 0 bytes"),
        (b"\1\0\0\0\xc1", "a frame that is none"),
        (encode(Ping()), "Ping before Hello"),
        (HELLO + HELLO, "a second Hello"),
        (encode(Hello(99, 1, "")), "version 99"),
        (HELLO + open_frame(1) + open_frame(1), "stream 1 opened after 1"),
        (HELLO + open_frame(2) + open_frame(1), "stream 1 opened after 2"),
        (HELLO + encode(Grant(1, 1)), "stream 1 was never opened"),
        (HELLO + encode(Cancel(7)), "stream 7 was never opened"),
        (HELLO + encode(Item(1, b"")), "Item from a client"),
        (HELLO + encode(End(1, Outcome.DONE, "")), "End from a client"),
    ],
)
async def test_what_breaks_the_rules_closes_that_connection_with_the_reason(
    stage: Stage, sent: bytes, reason: str
) -> None:
    async with stage.client.stream(stage.address, "test.wait.forever", b"") as other:
        assert await anext(other) == b"begun"
        async with raw(stage.address) as (reader, writer):
            writer.write(sent)
            last = (await all_frames(reader))[-1]
        assert isinstance(last, Bye) and reason in last.reason
        assert stage.server.status().violations_total == 1
        # The broken connection's handlers end; the other's does not.
        await until(lambda: stage.server.status().in_flight == 1)
        await until(lambda: stage.server.status().connections == 1)


numbers = st.integers(1, 4)
frames = st.one_of(
    st.just(Hello(VERSION, LIMIT, "fuzz")),
    st.builds(
        Open,
        numbers,
        st.sampled_from(["test.echo.once", "test.count.to", "test.raise.after", "none"]),
        st.sampled_from([b"", b"3", b"x"]),
        st.just({}),
        st.sampled_from([0.0, 0.01, 5.0]),
        st.integers(1, 70_000),
    ),
    st.builds(Grant, numbers, st.integers(1, 1 << 40)),
    st.builds(Stop, numbers),
    st.builds(Cancel, numbers),
    st.builds(Item, numbers, st.binary(max_size=10)),
    st.builds(End, numbers, st.sampled_from(Outcome), st.text(max_size=10)),
    st.just(Ping()),
    st.just(Pong()),
    st.builds(Bye, st.text(max_size=10)),
)
spoken = st.one_of(frames.map(lambda frame: bytes(encode(frame))), st.binary(max_size=30))


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(spoken, max_size=8), greets=st.booleans(), cut=st.integers(1, 50))
def test_nothing_that_is_sent_hurts_the_server(pieces: list[bytes], greets: bool, cut: int) -> None:
    """Random frames and random bytes, in pieces; then another client is served as ever."""

    async def run() -> None:
        plane = create_request_plane(RequestPlaneSettings(**LIMITS), "fuzz")  # type: ignore[arg-type]
        server, client = plane.server(), plane.client()
        Handlers().serve(server)
        address = await server.start()
        async with raw(address) as (_, writer):
            data = (HELLO if greets else b"") + b"".join(pieces)
            for at in range(0, len(data), cut):
                writer.write(data[at : at + cut])
            await asyncio.sleep(0)
            stream = client.stream(address, "test.count.to", b"5")
            async with asyncio.timeout(WAIT_S):
                assert len([item async for item in stream]) == 5
        await until(lambda: server.status().connections == 1)
        await until(lambda: server.status().in_flight == 0)
        await client.close()
        await server.close()

    asyncio.run(run())


@given(st.lists(frames, max_size=10), st.integers(1, 64))
def test_frames_come_out_as_they_went_in_whatever_the_pieces(sent: list[Frame], cut: int) -> None:
    data = b"".join(encode(frame) for frame in sent)
    reader = FrameReader(LIMIT)
    got = [frame for at in range(0, len(data), cut) for frame in reader.feed(data[at : at + cut])]
    assert got == sent


@given(st.binary(max_size=200))
def test_bytes_are_frames_or_a_frame_error(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert all(isinstance(frame, Frame) for frame in FrameReader(LIMIT).feed(data))


@asynccontextmanager
async def scripted(answer: bytes) -> AsyncIterator[str]:
    """The address of a server that greets one client and answers its first request with these."""
    served = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read(100)
            writer.write(HELLO)
            await reader.read(1000)
            writer.write(answer)
            await reader.read(-1)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        served.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await asyncio.wait_for(served.wait(), WAIT_S)
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\xff\xff\xff\xff", "a frame of"),
        (encode(Item(2, b"")), "stream 2 was never opened"),
        (open_frame(1), "Open from a server"),
        (encode(Item(1, b"x" * 70_000)) + encode(Item(1, b"")), "sent more than it was granted"),
        (encode(Bye("enough")), "enough"),
    ],
)
async def test_a_server_that_breaks_the_rules_is_left(answer: bytes, reason: str) -> None:
    client = create_request_plane(RequestPlaneSettings(**LIMITS), "test").client()  # type: ignore[arg-type]
    async with scripted(bytes(answer)) as address:
        stream = client.stream(address, "test.echo.once", b"", deadline_s=WAIT_S)
        with pytest.raises(ConnectionLost, match=reason):
            assert not [item async for item in stream]
        assert client.status().violations_total == (b"enough" not in answer)
        assert client.status().connections == 0
        await client.close()


async def test_a_client_that_reads_nothing_is_left_when_too_much_waits(stage: Stage) -> None:
    """A flood of questions whose answers are never read."""
    async with raw(stage.address) as (_, writer):
        writer.write(HELLO)
        flood = bytes(encode(Ping())) * 100_000
        async with asyncio.timeout(3 * WAIT_S):
            while not stage.server.status().violations_total:
                writer.write(flood)
                await asyncio.sleep(0)
                if writer.transport.is_closing():
                    break
        await until(lambda: stage.server.status().connections == 0)
    assert stage.server.status().violations_total == 1


async def test_a_client_that_falls_silent_loses_its_handlers() -> None:
    quick = RequestPlaneSettings(ping_interval=0.1, silence_max=0.3)
    server, handlers = create_request_plane(quick, "test").server(), Handlers()
    handlers.serve(server)
    address = await server.start()
    async with raw(address) as (_, writer):
        writer.write(HELLO + open_frame(1))
        await until(lambda: handlers.begun == 1)
        await until(lambda: handlers.ended == 1)
    assert server.status().connections == 0
    await server.close()


async def test_connections_are_bounded() -> None:
    plane = create_request_plane(RequestPlaneSettings(connections_max=1), "test")
    server, handlers = plane.server(), Handlers()
    handlers.serve(server)
    address = await server.start()
    first, second = plane.client(), plane.client()
    assert await anext(first.stream(address, "test.echo.once", b"x")) == b"x"
    with pytest.raises(ConnectionLost, match="the server has 1 connections already"):
        await anext(second.stream(address, "test.echo.once", b"x"))
    await first.close()
    await until(lambda: server.status().connections == 0)
    assert await anext(second.stream(address, "test.echo.once", b"x")) == b"x"
    await second.close()
    await server.close()
