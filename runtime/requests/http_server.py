"""A request server over HTTP: a small ASGI application in front of the dispatcher, on uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, Final
from urllib.parse import unquote

import uvicorn

from runtime.requests.base import HEADERS_BYTES_MAX, Canary, Handler, ServerStatus
from runtime.requests.canary import watch
from runtime.requests.dispatch import Dispatcher, Request, Running
from runtime.requests.errors import Outcome, PayloadTooLarge
from runtime.requests.http import MEDIA_TYPE, REQUESTS, STOPS, STREAM, TIMEOUT, from_wire
from runtime.requests.settings import RequestPlaneSettings
from runtime.requests.tcp import authority
from runtime.requests.wire import LENGTH_BYTES, End, Item, Ping, encode
from runtime.tls import server_context

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 2
BUFFER_BYTES: Final = 64 << 10
_POLL_S: Final = 0.005
_STATUS: Final = {
    Outcome.DONE: 200,
    Outcome.UNKNOWN_ENDPOINT: 404,
    Outcome.TOO_LARGE: 413,
    Outcome.DRAINING: 503,
    Outcome.OVERLOADED: 429,
    Outcome.DEADLINE: 504,
    Outcome.CANCELLED: 500,
    Outcome.FAILED: 500,
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Uvicorn(uvicorn.Server):
    """Leaves the process's signals to the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    def __init__(self, settings: RequestPlaneSettings) -> None:
        self._settings = settings
        self._dispatcher = Dispatcher(settings)
        self._streams: dict[str, Running] = {}
        self._replies: set[HttpReply] = set()
        self._violations_total = 0
        self._address: str | None = None
        self._uvicorn: _Uvicorn | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def serve(self, endpoint: str, handler: Handler, *, canary: Canary | None = None) -> None:
        self._dispatcher.serve(endpoint, handler, canary)

    def withdraw(self, endpoint: str) -> None:
        self._dispatcher.withdraw(endpoint)

    async def start(self) -> str:
        assert self._uvicorn is None, "started already"
        settings = self._settings
        config = uvicorn.Config(
            self._application,
            interface="asgi3",
            proxy_headers=False,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=settings.connections_max + 1,
            h11_max_incomplete_event_size=4 * HEADERS_BYTES_MAX,
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
        config.load()
        if settings.tls is not None:
            config.ssl = server_context(settings.tls)
        server = self._uvicorn = _Uvicorn(config)
        listener = await _listen(settings.host, settings.port)
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="request-http")
        self._tasks.append(serving)
        async with asyncio.timeout(START_TIMEOUT_S):
            while not server.started and not serving.done():
                await asyncio.sleep(_POLL_S)
        if serving.done():
            await serving
            raise OSError("the HTTP server ended as it started")
        self._tasks.append(asyncio.create_task(watch(self._dispatcher), name="canaries"))
        self._tasks.append(asyncio.create_task(self._beat(), name="http-beat"))
        scheme = "http" if settings.tls is None else "https"
        host = settings.advertise_host or settings.host
        self._address = f"{scheme}://{authority(host, listener.getsockname()[1])}"
        return self._address

    async def drain(self, timeout_s: float) -> int:
        return await self._dispatcher.drain(timeout_s)

    async def close(self) -> None:
        tasks, self._tasks = self._tasks, []
        await self._dispatcher.close()
        for watching in tasks[1:]:
            watching.cancel()
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)
        self._address = None

    def status(self) -> ServerStatus:
        server = self._uvicorn
        connections = len(server.server_state.connections) if server is not None else 0
        return self._dispatcher.status("http", self._address, connections, self._violations_total)

    # -- the application ------------------------------------------------------------------

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        path = unquote(scope["raw_path"].decode("latin-1"))
        reply = HttpReply(send, self._settings)
        headers = dict(scope["headers"])
        if scope["method"] == "POST" and path.startswith(REQUESTS):
            timeout_s = _timeout_s(headers.get(TIMEOUT.encode()), self._settings.timeout_max)
            try:
                async with asyncio.timeout(timeout_s):
                    payload = await _body(receive, self._settings.frame_max)
            except (PayloadTooLarge, TimeoutError) as error:
                self._violations_total += 1
                kind = Outcome.TOO_LARGE if str(error) else Outcome.DEADLINE
                reply.end(kind, "a request's body")
                await reply.run()
                return
            if payload is not None:
                request = Request(
                    path.removeprefix(REQUESTS), payload, from_wire(scope["headers"]), timeout_s
                )
                stream = headers.get(STREAM.encode(), b"").decode("latin-1")
                await self._answer(request, stream, reply, receive)
        elif scope["method"] == "POST" and path.startswith(STOPS):
            running = self._streams.get(path.removeprefix(STOPS))
            if running is not None:
                running.stop()
            await reply.plain(204 if running is not None else 404)
        else:
            self._violations_total += 1
            await reply.plain(404)

    async def _answer(
        self, request: Request, stream: str, reply: HttpReply, receive: Receive
    ) -> None:
        running = self._dispatcher.open(request, reply)
        if running is None:
            await reply.run()
            return
        self._streams[stream] = running
        self._replies.add(reply)
        leaving = asyncio.create_task(_kill_when_left(receive, running), name="http-disconnect")
        try:
            await reply.run()
        finally:
            self._replies.discard(reply)
            self._streams.pop(stream, None)
            running.kill()  # of no effect on one that has ended
            leaving.cancel()

    async def _beat(self) -> None:
        """For all, that those who wait know that the server is there."""
        while True:
            await asyncio.sleep(self._settings.ping_interval)
            for reply in self._replies:
                reply.beat()


class HttpReply:
    """Frames as the body of an answer that begins when there is something to say.

    `run` alone sends. What is said in one turn of the event loop goes out in one piece, so that
    a short answer costs one write; who says more than `BUFFER_BYTES` waits until it is sent.
    """

    def __init__(self, send: Send, settings: RequestPlaneSettings) -> None:
        self._send = send
        self._frame_bytes_max = settings.frame_max
        self._buffer = bytearray()
        self._due = asyncio.Event()
        self._room = asyncio.Event()
        self._end: End | None = None
        self._begun = False
        self._sending = False

    async def item(self, payload: bytes) -> None:
        data = encode(Item(1, payload))
        over_bytes = len(data) - LENGTH_BYTES - self._frame_bytes_max
        if over_bytes > 0:
            most_bytes = max(0, len(payload) - over_bytes)
            raise PayloadTooLarge(
                f"a response of {len(payload)} bytes; at most {most_bytes} may be"
            )
        self._buffer += data
        self._due.set()
        if len(self._buffer) >= BUFFER_BYTES:
            self._room.clear()
            await self._room.wait()

    def end(self, outcome: Outcome, message: str) -> None:
        if self._end is None:
            self._end = End(1, outcome, message)
            self._due.set()

    def beat(self) -> None:
        """Called now and then: says that there is nothing to say."""
        if not self._sending and not self._due.is_set():
            self._buffer += encode(Ping())
            self._due.set()

    async def run(self) -> None:
        """Send until the end. To a client that has left nothing is sent, without an error."""
        while True:
            await self._due.wait()
            await asyncio.sleep(0)  # the end of a short answer comes with its last item
            self._due.clear()
            end, data = self._end, bytes(self._buffer)
            self._buffer.clear()
            self._room.set()
            status = 200 if data or end is None else _STATUS[end.outcome]
            if end is not None:
                data += encode(end)
            self._sending = True
            await self._body(data, status, is_last=end is not None)
            self._sending = False
            if end is not None:
                return

    async def plain(self, status: int) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": []})
        await self._send({"type": "http.response.body", "body": b""})

    async def _body(self, data: bytes, status: int, *, is_last: bool) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", MEDIA_TYPE.encode())]
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


async def _body(receive: Receive, most_bytes: int) -> bytes | None:
    """None if the client left before it was whole."""
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        data += message.get("body", b"")
        if len(data) > most_bytes:
            raise PayloadTooLarge(f"more than {most_bytes} bytes")
        if not message.get("more_body", False):
            return bytes(data)


async def _kill_when_left(receive: Receive, running: Running) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.kill()


def _timeout_s(text: bytes | None, most_s: float) -> float:
    try:
        timeout_s = float(text or b"inf")
    except ValueError:
        return 0.0
    return most_s if math.isnan(timeout_s) else max(0.0, min(timeout_s, most_s))


async def _listen(host: str, port: int) -> socket.socket:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, *_, address = found[0]
    listener = socket.create_server(address, family=family)
    # Connections inherit it: asyncio sets it only on sockets made with a protocol number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
