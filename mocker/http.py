"""As much of an HTTP/1.1 server as a mock engine needs, at a few microseconds an event.

A connection is an asyncio protocol: a request is handed to `Handle` when its body is whole, and the
answer is written to the transport by whoever has it, without a task. One request at a time; what
comes meanwhile waits, bounded. A client that leaves, or reads so slowly that more than
`UNSENT_BYTES_MAX` wait for it, is told to the answer's `on_gone`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

HEAD_BYTES_MAX: Final = 64 << 10
BODY_BYTES_MAX: Final = 64 << 20
UNSENT_BYTES_MAX: Final = 4 << 20
EVENTS: Final = b"text/event-stream; charset=utf-8"
JSON: Final = b"application/json"


class BadRequest(Exception):
    """Bytes that are no request, or too many of them."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True)
class HttpRequest:
    method: str
    path: str  # without the query
    body: bytes


class Reply:
    """The answer to one request: `whole`, or `begin`, any number of `send`, and `end`.

    Calls after the client has gone do nothing.
    """

    __slots__ = ("_connection", "on_gone")

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection
        self.on_gone: Callable[[], None] | None = None

    def whole(self, status: int, body: bytes, media: bytes = JSON) -> None:
        connection = self._connection
        if connection is not None:
            head = b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
            reason = HTTPStatus(status).phrase.encode()
            connection.write(head % (status, reason, media, len(body)) + body)
            self._done()

    def begin(self, media: bytes = EVENTS) -> None:
        if self._connection is not None:
            self._connection.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n"
                b"cache-control: no-cache\r\n\r\n" % media
            )

    def send(self, chunk: bytes) -> None:
        """A piece that `chunked` made, as it is."""
        if self._connection is not None:
            self._connection.write(chunk)

    def end(self) -> None:
        if self._connection is not None:
            self._connection.write(b"0\r\n\r\n")
            self._done()

    def gone(self) -> None:
        """Called by the connection: nobody reads any more."""
        self._connection = None
        if self.on_gone is not None:
            self.on_gone()

    def _done(self) -> None:
        connection, self._connection = self._connection, None
        self.on_gone = None
        if connection is not None:
            connection.answered()


Handle = Callable[[HttpRequest, Reply], None]


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    def __init__(self, handle: Handle, opened: set[Connection]) -> None:
        self._handle = handle
        self._opened = opened
        self._transport: asyncio.Transport | None = None
        self._unread = bytearray()
        self._reply: Reply | None = None
        self._keeps = True
        self._continued = False

    # -- called by asyncio ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=UNSENT_BYTES_MAX)
        self._opened.add(self)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        self._proceed()

    def pause_writing(self) -> None:
        """More is unsent than a reader that reads would leave."""
        self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._opened.discard(self)
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.gone()

    # -- called by the reply -------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def answered(self) -> None:
        self._reply = None
        if not self._keeps:
            if self._transport is not None:
                self._transport.close()
        elif self._unread:
            asyncio.get_running_loop().call_soon(self._proceed)

    def close(self) -> None:
        """At once, whatever is unsent."""
        if self._transport is not None:
            self._transport.abort()

    # -- inside --------------------------------------------------------------------------

    def _proceed(self) -> None:
        if self._transport is None:
            return
        try:
            if self._reply is not None:
                if len(self._unread) > HEAD_BYTES_MAX:
                    self.close()
                return
            found = self._parse()
        except BadRequest as error:
            self._keeps = False
            self._unread.clear()
            body = b'{"error":{"message":"%s","type":"BadRequestError"}}' % str(error).encode()
            self._reply = Reply(self)
            self._reply.whole(error.status, body)
            return
        if found is not None:
            self._reply = reply = Reply(self)
            self._handle(found, reply)

    def _parse(self) -> HttpRequest | None:
        """None until a request is whole. Raises BadRequest."""
        unread = self._unread
        end = unread.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX)
        if end < 0:
            if len(unread) > HEAD_BYTES_MAX:
                raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too long a head")
            return None
        first, *lines = bytes(unread[:end]).decode("latin-1").split("\r\n")
        try:
            method, target, version = first.split(" ")
        except ValueError:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "no request line") from None
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body, read = self._body(headers, end + 4)
        if body is None:
            if headers.get("expect", "").lower() == "100-continue" and not self._continued:
                self._continued = True
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        del unread[:read]
        self._continued = False
        self._keeps = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        return HttpRequest(method, target.partition("?")[0], body)

    def _body(self, headers: dict[str, str], begin: int) -> tuple[bytes | None, int]:
        """The body and where it ends; None until it is whole. Raises BadRequest."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return self._chunks(begin)
        text = headers.get("content-length", "0")
        if not (text.isascii() and text.isdigit()):
            raise BadRequest(HTTPStatus.BAD_REQUEST, "no content length")
        length = int(text)
        if length > BODY_BYTES_MAX:
            raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too long a body")
        if len(self._unread) < begin + length:
            return None, begin
        return bytes(self._unread[begin : begin + length]), begin + length

    def _chunks(self, at: int) -> tuple[bytes | None, int]:
        """Looks at all chunks anew when more come: few clients send them."""
        unread, parts = self._unread, bytearray()
        if len(unread) > BODY_BYTES_MAX + HEAD_BYTES_MAX:
            raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too long a body")
        while (line := unread.find(b"\r\n", at)) >= 0:
            try:
                size = int(unread[at:line].partition(b";")[0], 16)
            except ValueError:
                raise BadRequest(HTTPStatus.BAD_REQUEST, "no chunk") from None
            if size < 0 or size > BODY_BYTES_MAX:
                raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too long a chunk")
            if size == 0:
                end = unread.find(b"\r\n\r\n", line)
                return (None, at) if end < 0 else (bytes(parts), end + 4)
            begin = line + 2
            if len(unread) < begin + size + 2:
                return None, at
            parts += unread[begin : begin + size]
            at = begin + size + 2
        return None, at


class HttpServer:
    """Listens from `start` to `close`."""

    def __init__(self, handle: Handle, host: str = "127.0.0.1", port: int = 0) -> None:
        self._handle = handle
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._opened: set[Connection] = set()

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def start(self) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self._handle, self._opened), self._host, self._port, backlog=1024
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Idempotent."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._opened):
            connection.close()
        await asyncio.sleep(0)
