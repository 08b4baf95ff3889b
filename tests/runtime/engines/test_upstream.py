"""Connections to engines: what they make of every kind of answer, and when they are used again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from runtime.engines.connection import UNREAD_BYTES_MAX
from runtime.engines.upstream import EngineFault, Upstream, target_of

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Engine:
    """Answers every request with the same bytes, and notes what it was asked."""

    def __init__(self, answer: bytes, *, closes: bool = False) -> None:
        self.answer = answer
        self.closes = closes
        self.asked: list[bytes] = []
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.asked.append(head + await reader.readexactly(length))
                writer.write(self.answer)
                await writer.drain()
                if self.closes:
                    break
        writer.close()


@contextlib.asynccontextmanager
async def asking(
    engine: Engine, silence_s: float = 30.0, key: str | None = None
) -> AsyncIterator[tuple[Upstream, str]]:
    server = await asyncio.start_server(engine.talk, "127.0.0.1", 0)
    upstream = Upstream(silence_s, key)
    await upstream.open()
    try:
        yield upstream, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base"
    finally:
        await upstream.close()
        server.close()
        for writer in engine.writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def body_of(
    upstream: Upstream, url: str, body: bytes = b"{}", method: bytes = b"POST"
) -> tuple[int, bytes]:
    with await upstream.send(method, url, b"/path?a=b", [(b"x-own", b"1")], body) as answer:
        return answer.status, await answer.read()


async def test_a_connection_is_used_again_once_its_answer_is_read() -> None:
    engine = Engine(WHOLE)
    async with asking(engine) as (upstream, url):
        for _ in range(3):
            assert await body_of(upstream, url, b"x" * 10) == (200, b"ok")
        assert engine.connections == 1
        head, _, body = engine.asked[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /base/path?a=b HTTP/1.1\r\nhost: 127.0.0.1:")
        assert b"x-own: 1" in head and body == b"x" * 10


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, (200, b"ok")),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + WHOLE, (200, b"ok")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n",
            (200, b"abcd"),
        ),
    ],
)
async def test_answers_of_every_form(answer: bytes, found: tuple[int, bytes]) -> None:
    engine = Engine(answer)
    async with asking(engine) as (upstream, url):
        assert await body_of(upstream, url) == found
        assert await body_of(upstream, url) == found
        assert engine.connections == 1


async def test_an_answer_that_ends_with_its_connection() -> None:
    engine = Engine(b"HTTP/1.1 200 OK\r\n\r\nall of it", closes=True)
    async with asking(engine) as (upstream, url):
        assert await body_of(upstream, url) == (200, b"all of it")
        assert await body_of(upstream, url) == (200, b"all of it")
        assert engine.connections == 2


@pytest.mark.parametrize(
    "told", [b"HTTP/1.1 200 OK\r\nconnection: close\r\n", b"HTTP/1.0 200 X\r\n"]
)
async def test_an_engine_that_does_not_keep_connections(told: bytes) -> None:
    engine = Engine(told + b"content-length: 2\r\n\r\nok")
    async with asking(engine) as (upstream, url):
        assert await body_of(upstream, url) == (200, b"ok")
        assert await body_of(upstream, url) == (200, b"ok")
        assert engine.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_no_answer_is_the_engines_fault(answer: bytes) -> None:
    async with asking(Engine(answer)) as (upstream, url):
        with pytest.raises(EngineFault) as caught:
            await body_of(upstream, url)
        assert caught.value.begun


async def test_an_answer_to_nothing_ends_the_connection_and_not_the_answer_before() -> None:
    engine = Engine(WHOLE + WHOLE)
    async with asking(engine) as (upstream, url):
        assert await body_of(upstream, url) == (200, b"ok")
        assert await body_of(upstream, url) == (200, b"ok")
        assert engine.connections == 2


async def test_an_engine_that_cannot_be_reached_has_not_begun() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    upstream = Upstream(30.0)
    with pytest.raises(EngineFault) as caught:
        await body_of(upstream, f"http://127.0.0.1:{port}")
    assert not caught.value.begun


async def test_an_engine_waits_for_a_reader_that_does_not_come() -> None:
    size = 64 * UNREAD_BYTES_MAX
    engine = Engine(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
    async with asking(engine, silence_s=0.2) as (upstream, url):
        with await upstream.send(b"POST", url, b"/", [], b"") as answer:
            await asyncio.sleep(0.5)  # silence is the reader's here, and no fault
            first = await answer.part()
            assert UNREAD_BYTES_MAX <= len(first) < size // 2
            assert len(first) + len(await answer.read()) == size


async def test_an_answer_that_is_left_takes_its_connection_with_it() -> None:
    engine = Engine(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok")
    async with asking(engine) as (upstream, url):
        with await upstream.send(b"POST", url, b"/", [], b"") as answer:
            assert await answer.part() == b"ok"
        engine.answer = WHOLE
        assert await body_of(upstream, url) == (200, b"ok")
        assert engine.connections == 2


async def test_connections_that_nobody_uses_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engines.upstream.IDLE_CONNECTION_S", 0.0)
    engine = Engine(WHOLE)
    async with asking(engine, silence_s=0.2) as (upstream, url):
        await body_of(upstream, url)
        async with asyncio.timeout(60):
            while upstream._pools:
                await asyncio.sleep(0.01)
        await body_of(upstream, url)
        assert engine.connections == 2


async def test_a_connection_that_an_unread_answer_has_stopped_is_not_used_again() -> None:
    size = 2 * UNREAD_BYTES_MAX
    engine = Engine(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
    async with asking(engine) as (upstream, url):
        with await upstream.send(b"POST", url, b"/", [], b"") as answer:
            connection = answer._connection
            async with asyncio.timeout(60):
                while not connection._is_paused:
                    await asyncio.sleep(0.01)
        engine.answer = WHOLE
        assert await body_of(upstream, url) == (200, b"ok")
        assert engine.connections == 2


async def test_an_answer_to_head_ends_with_its_head() -> None:
    engine = Engine(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    async with asking(engine) as (upstream, url), asyncio.timeout(60):
        for _ in range(2):
            assert await body_of(upstream, url, b"", b"HEAD") == (200, b"")
        assert engine.asked[1].startswith(b"HEAD /base/path?a=b HTTP/1.1\r\n")


async def test_engines_are_given_the_key_that_they_ask_for() -> None:
    engine = Engine(WHOLE)
    async with asking(engine, key="k-1") as (upstream, url):
        await body_of(upstream, url)
        assert b"\r\nauthorization: Bearer k-1\r\n" in engine.asked[0]


@pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
def test_what_is_sent_waits_for_no_acknowledgement(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def check() -> None:
        async with asking(Engine(WHOLE)) as (upstream, url):
            with await upstream.send(b"POST", url, b"/", [], b"") as answer:
                wire = answer._connection._transport.get_extra_info("socket")
                assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(check())


@pytest.mark.parametrize(
    ("path", "query", "target"),
    [
        ("/v1/responses/resp_1.a", b"", b"/v1/responses/resp_1.a"),
        ("/v1/responses/a b/cancel", b"x=%20&y", b"/v1/responses/a%20b/cancel?x=%20&y"),
        ("/v1/completions\r\nhost: other\n", b"", b"/v1/completions%0D%0Ahost%3A%20other%0A"),
        ("/\u00fc?", b"", b"/%C3%BC%3F"),
    ],
)
def test_a_path_is_one_again_on_the_way_to_an_engine(
    path: str, query: bytes, target: bytes
) -> None:
    assert target_of(path, query) == target
