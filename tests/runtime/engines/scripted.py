"""Engines' servers whose every answer is written down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httptools


@dataclass
class Asked:
    """A request as the engine got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


Script = Callable[["Wire", Asked], Awaitable[None]]


class Wire(asyncio.Protocol):
    """One connection to the engine."""

    def __init__(self, engine: Engine) -> None:
        self.gone = asyncio.Event()
        self._engine = engine
        self._parser: Any = httptools.HttpRequestParser(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = b""
        self._headers: dict[str, str] = {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        method = self._parser.get_method().decode()
        self._engine.take(self, Asked(method, self._url.decode(), self._headers, self._body))

    def whole(self, body: bytes, status: int = 200, kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"server: uvicorn\r\n\r\n" + body)

    def begin(self) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    def part(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        self.transport.write(b"0\r\n\r\n")

    def break_off(self) -> None:
        self.transport.abort()


class Engine:
    """A server that does what its script says."""

    def __init__(self, instance: int, script: Script) -> None:
        self.instance = instance
        self.script = script
        self.asked: list[Asked] = []
        self.wires: list[Wire] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for wire in self.wires:
            wire.transport.abort()
        for task in self._tasks:
            task.cancel()

    def take(self, wire: Wire, asked: Asked) -> None:
        self.asked.append(asked)
        task = asyncio.ensure_future(self.script(wire, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _connected(self) -> Wire:
        self.wires.append(Wire(self))
        return self.wires[-1]


def event(tokens: list[int], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": "?", "token_ids": tokens, "finish_reason": finish, **more}
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"


def ending(cached: int) -> bytes:
    usage = {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": cached}}
    return b'data: {"choices":[],"usage":%s}\n\ndata: [DONE]\n\n' % json.dumps(usage).encode()


def saying(*parts: bytes, broken: bool = False) -> Script:
    async def script(wire: Wire, asked: Asked) -> None:
        wire.begin()
        for part in parts:
            wire.part(part)
        if broken:
            wire.break_off()
        else:
            wire.end()

    return script


def refusing(status: int, message: str) -> Script:
    async def script(wire: Wire, asked: Asked) -> None:
        wire.whole(json.dumps({"error": {"message": message, "code": status}}).encode(), status)

    return script
