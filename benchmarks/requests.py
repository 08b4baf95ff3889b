"""What the request plane costs on loopback, each kind against bare peers in the same run.

Server and client are two processes, as they are in a fleet. Round trips: one after the other, a
payload of 256 bytes each way. Streamed: one request, many responses of 256 bytes. The peer is an
echo and a pump over `asyncio.start_server` with a length before each message and no more. The
plane over HTTP has another one: the same two as a bare application on uvicorn, asked with aiohttp.

    python -m benchmarks.requests [--rounds 3] [--kinds tcp,nats,http]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn

from kvbm.cli.figures import Row, compared, tell
from runtime.embedded import EmbeddedNats
from runtime.requests import RequestContext, RequestPlaneSettings, create_request_plane

PAYLOAD = b"x" * 256
ROUND_TRIPS = 500
STREAMED = 20_000
CONCURRENT = 32
LENGTH_BYTES = 4
BARE_HTTP = "bare http"
PUMP = (0xFFFFFFFF).to_bytes(LENGTH_BYTES, "little")  # in place of a length: send the whole stream


# -- the server's process -----------------------------------------------------------------


async def echo(payload: bytes, _context: RequestContext) -> AsyncIterator[bytes]:
    yield payload


async def pump(payload: bytes, _context: RequestContext) -> AsyncIterator[bytes]:
    for _ in range(int(payload)):
        yield PAYLOAD


async def bare(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The peer: no streams, headers, deadlines, cancellation or limits."""
    try:
        while True:
            length = await reader.readexactly(LENGTH_BYTES)
            if length == PUMP:
                for _ in range(STREAMED):
                    writer.write(len(PAYLOAD).to_bytes(LENGTH_BYTES, "little") + PAYLOAD)
                    await writer.drain()
            else:
                writer.write(length + await reader.readexactly(int.from_bytes(length, "little")))
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def bare_http(scope: Any, receive: Any, send: Any) -> None:
    """The HTTP peer: a chunked answer, as the plane's are."""
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(STREAMED if scope["path"] == "/pump" else 1):
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def serve_bare_http() -> None:
    options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off"}
    config = uvicorn.Config(bare_http, interface="asgi3", proxy_headers=False, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await uvicorn.Server(config).serve(sockets=[listener])


async def serve(settings: dict[str, Any]) -> None:
    if settings["plane"] == BARE_HTTP:
        await serve_bare_http()
        return
    if settings["plane"] == "bare":
        server = await asyncio.start_server(bare, "127.0.0.1", 0)
        address = str(server.sockets[0].getsockname()[1])
    else:
        plane = create_request_plane(RequestPlaneSettings(**settings), "benchmark").server()
        plane.serve("bench.echo.once", echo)
        plane.serve("bench.pump.all", pump)
        address = await plane.start()
    print(address, flush=True)
    await asyncio.Event().wait()


# -- the client's -------------------------------------------------------------------------


async def per_second(count: int, work: Callable[[], Awaitable[None]]) -> float:
    await work()
    began = time.perf_counter()
    await work()
    return count / (time.perf_counter() - began)


async def of_bare(address: str) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address))
    message = len(PAYLOAD).to_bytes(LENGTH_BYTES, "little") + PAYLOAD

    async def read() -> None:
        length = await reader.readexactly(LENGTH_BYTES)
        await reader.readexactly(int.from_bytes(length, "little"))

    async def trips() -> None:
        for _ in range(ROUND_TRIPS):
            writer.write(message)
            await read()

    async def stream() -> None:
        writer.write(PUMP)
        for _ in range(STREAMED):
            await read()

    async def many() -> None:
        """The same connection, as many messages on it at a time."""
        for _ in range(ROUND_TRIPS // CONCURRENT):
            writer.write(message * CONCURRENT)
            for _ in range(CONCURRENT):
                await read()

    figures = {
        "round trips": await per_second(ROUND_TRIPS, trips),
        f"round trips, {CONCURRENT} at once": await per_second(
            ROUND_TRIPS // CONCURRENT * CONCURRENT, many
        ),
        "streamed": await per_second(STREAMED, stream),
    }
    writer.close()
    return figures


async def of_bare_http(address: str) -> dict[str, float]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:

        async def trip() -> None:
            async with http.post(f"{address}/echo", data=PAYLOAD) as response:
                assert await response.read() == PAYLOAD

        async def stream() -> None:
            async with http.post(f"{address}/pump", data=PAYLOAD) as response:
                size_bytes = sum([len(data) async for data in response.content.iter_any()])
                assert size_bytes == STREAMED * len(PAYLOAD)

        return await of_requests(trip, stream)


async def of_requests(
    trip: Callable[[], Awaitable[None]], stream: Callable[[], Awaitable[None]]
) -> dict[str, float]:
    async def trips() -> None:
        for _ in range(ROUND_TRIPS):
            await trip()

    async def many() -> None:
        for _ in range(ROUND_TRIPS // CONCURRENT):
            await asyncio.gather(*(trip() for _ in range(CONCURRENT)))

    return {
        "round trips": await per_second(ROUND_TRIPS, trips),
        f"round trips, {CONCURRENT} at once": await per_second(
            ROUND_TRIPS // CONCURRENT * CONCURRENT, many
        ),
        "streamed": await per_second(STREAMED, stream),
    }


async def of_plane(settings: dict[str, Any], address: str) -> dict[str, float]:
    client = create_request_plane(RequestPlaneSettings(**settings), "benchmark").client()

    async def trip() -> None:
        async with client.stream(address, "bench.echo.once", PAYLOAD) as stream:
            assert [item async for item in stream] == [PAYLOAD]

    async def stream() -> None:
        count = b"%d" % STREAMED
        async with client.stream(address, "bench.pump.all", count) as items:
            assert sum([1 async for _ in items]) == STREAMED

    figures = await of_requests(trip, stream)
    await client.close()
    return figures


def measure(settings: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.requests", "--serve", json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if settings["plane"] == "bare":
            return asyncio.run(of_bare(address))
        if settings["plane"] == BARE_HTTP:
            return asyncio.run(of_bare_http(address))
        return asyncio.run(of_plane(settings, address))
    finally:
        process.kill()
        process.wait()


def run(kinds: list[str], rounds: int) -> list[Row]:
    peers = {"bare": "bare asyncio streams"}
    if "http" in kinds:
        peers[BARE_HTTP] = "bare uvicorn and aiohttp"
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in [*peers, *kinds]}
    with ExitStack() as stack:
        nats: dict[str, Any] = {}
        if "nats" in kinds:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbm-requests-")))
            server = stack.enter_context(EmbeddedNats(folder))
            nats = {
                "nats_url": server.url,
                "nats_user": server.user,
                "nats_password": server.password,
            }
        for number in range(rounds):
            # In turns of who is first: what the machine does meanwhile falls on all alike.
            for kind in list(found)[:: 1 if number % 2 else -1]:
                found[kind].append(measure({"plane": kind, **(nats if kind == "nats" else {})}))
    return [
        compared(
            f"{kind}: {name}" + (" (of HTTP)" if peer == BARE_HTTP else ""),
            "/s",
            [figures[name] for figures in found[kind]],
            told,
            [figures[name] for figures in found[peer]],
        )
        for kind in kinds
        for peer, told in peers.items()
        if peer == "bare" or kind == "http"
        for name in found[kind][0]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="tcp,nats,http")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        asyncio.run(serve(json.loads(arguments.serve)))
    else:
        tell("requests", run(arguments.kinds.split(","), arguments.rounds))


if __name__ == "__main__":
    main()
