"""The load of `benchmarks.frontend`, and the bare relay it holds frontends against; processes both.

python -m benchmarks.frontend_load '{"port": 8000, "requests": 400, ...}'     the load: see Load
python -m benchmarks.frontend_load relay PORT URL...                          the relay
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import string
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

import aiohttp
import httptools
import numpy as np
import uvicorn
import uvloop

MODEL: Final = "mock"
PATH: Final = "/v1/chat/completions"
PREFIXES: Final = 8
TIMEOUT_S: Final = 300.0
EVENT: Final = b"data: "


@dataclass(frozen=True)
class Load:
    """`prefix_words`: of one of eight beginnings that prompts share; `words`: of each alone."""

    port: int
    requests: int
    concurrency: int
    words: int
    prefix_words: int = 0
    tokens: int = 1
    stream: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Loaded:
    """What came of it, as the client saw it."""

    per_s: float
    events: int  # all of them; 0 where nothing was streamed
    p50_ms: float
    p99_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float


def words(source: random.Random, count: int) -> str:
    """Made of letters at random: as hard to tokenise as text can be."""
    letters = string.ascii_lowercase
    return " ".join("".join(source.choices(letters, k=source.randint(3, 10))) for _ in range(count))


def bodies(load: Load) -> list[bytes]:
    same = random.Random(1)
    prefixes = [words(same, load.prefix_words) for _ in range(PREFIXES)]
    own = random.Random(load.seed)
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": load.tokens, "stream": load.stream}
    asked |= {"ignore_eos": True, "temperature": 0.0}
    made = []
    for number in range(load.requests):
        text = f"{prefixes[number % PREFIXES]} {words(own, load.words)}"
        message = {"role": "user", "content": text}
        made.append(json.dumps({**asked, "messages": [message]}).encode())
    return made


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, source: list[bytes], times: list[tuple[float, float, int]]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._source = source
        self._times = times

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._socket: socket.socket = transport.get_extra_info("socket")

    def ask(self) -> None:
        if not self._source:
            self.done.set_result(None)
            return
        body = self._source.pop()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        self._parser: Any = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._first = 0.0
        self._began = time.perf_counter()
        self._transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        # Whoever answers with Nagle's algorithm on would else wait for the client's ACK.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the connection was closed"))

    # -- called by the parser --------------------------------------------------------------

    def on_body(self, data: bytes) -> None:
        self._first = self._first or time.perf_counter()
        self._parts.append(data)

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        answer = b"".join(self._parts)
        if self._parser.get_status_code() != 200:
            self.done.set_exception(RuntimeError(answer[:500].decode()))
            return
        timed = (now - self._began, self._first - self._began, answer.count(EVENT))
        self._times.append(timed)
        asyncio.get_running_loop().call_soon(self.ask)


async def run(load: Load) -> Loaded:
    """Raises RuntimeError with the first answer that is none."""
    source, times = bodies(load), []  # type: ignore[var-annotated]
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(load.concurrency):
        _, client = await loop.create_connection(
            lambda: Client(source, times), "127.0.0.1", load.port
        )
        clients.append(client)
    began = time.perf_counter()
    for client in clients:
        client.ask()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*(client.done for client in clients))
    took = time.perf_counter() - began
    whole, first, events = np.array(times).T
    return Loaded(
        load.requests / took,
        int(events.sum()),
        *(float(np.quantile(whole, q) * 1e3) for q in (0.5, 0.99)),
        *(float(np.quantile(first, q) * 1e3) for q in (0.5, 0.99)),
    )


# -- the floor ----------------------------------------------------------------------------


def relay(port: int, urls: list[str]) -> None:
    """The same libraries and bytes, each engine in turn; nothing is looked at."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        url = next(turn) + scope["path"]
        async with sessions[0].post(url, data=body, headers=HEADERS) as answer:
            headers = [(b"content-type", answer.headers["content-type"].encode())]
            if "content-length" in answer.headers:
                headers.append((b"content-length", answer.headers["content-length"].encode()))
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def serve() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            sessions.append(session)
            config = uvicorn.Config(
                app, port=port, lifespan="off", access_log=False, log_level="error"
            )
            await uvicorn.Server(config).serve()

    sessions: list[aiohttp.ClientSession] = []
    turn = itertools.cycle(urls)
    uvloop.run(serve())


HEADERS: Final = {"content-type": "application/json"}


if __name__ == "__main__":
    if sys.argv[1] == "relay":
        relay(int(sys.argv[2]), sys.argv[3:])
    else:
        print(json.dumps(asdict(uvloop.run(run(Load(**json.loads(sys.argv[1])))))))
