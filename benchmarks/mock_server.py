"""What a mock engine's server costs: processor time for each request and for each streamed event.

The server is a process of its own (`python -m mocker serve`) at a speedup that keeps it busy; its
user and system time are read before and after. Answers of two lengths tell what an event and what
a request costs. The limit: a bare asyncio server that writes as many bytes, one write an event.

    python -m benchmarks.mock_server [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from kvbm.cli.figures import Row, compared, tell

CONCURRENT = 32
REQUESTS = 256
SHORT, LONG = 16, 272
PROMPT = list(range(1000, 1512))
EVENT = b"x" * 190  # about what an event of a completion has
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

Ask = Callable[[int], Awaitable[None]]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


async def ask(port: int, body: bytes, end: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    tail = b""
    while data := await reader.read(1 << 16):
        tail = tail[-64:] + data
    assert end in tail, tail
    writer.close()


async def load(port: int, body: bytes, end: bytes) -> None:
    gate = asyncio.Semaphore(CONCURRENT)

    async def one() -> None:
        async with gate:
            await ask(port, body, end)

    await asyncio.gather(*(one() for _ in range(REQUESTS)))


def measured(pid: int, port: int, body: Callable[[int], bytes], end: bytes) -> tuple[float, float]:
    """Microseconds for a request without its events, and for an event."""
    spent = []
    for tokens in (SHORT, LONG):
        before = cpu_s(pid)
        asyncio.run(load(port, body(tokens), end))
        spent.append((cpu_s(pid) - before) / REQUESTS * 1e6)
    event_us = (spent[1] - spent[0]) / (LONG - SHORT)
    return spent[0] - SHORT * event_us, event_us


def completion(tokens: int) -> bytes:
    return json.dumps({"prompt": PROMPT, "max_tokens": tokens, "stream": True}).encode()


# -- the limit ----------------------------------------------------------------------------


class Bare(asyncio.Protocol):
    """As many writes as the request's body says, one for each turn of the loop; no more."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._left = int(data.rpartition(b"\r\n")[2])
        self._write()

    def _write(self) -> None:
        self._transport.write(EVENT)
        self._left -= 1
        if self._left:
            asyncio.get_running_loop().call_soon(self._write)
        else:
            self._transport.close()


def serve_bare(port: multiprocessing.Queue[int]) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", 0)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    ports: multiprocessing.Queue[int] = multiprocessing.Queue()
    bare = multiprocessing.Process(target=serve_bare, args=(ports,), daemon=True)
    bare.start()
    bare_port = ports.get(timeout=60)
    with tempfile.TemporaryDirectory() as folder:
        options = [f"discovery.file_directory={folder}", "speedup=1000", "block_tokens=64"]
        command = [sys.executable, "-m", "mocker", "serve"]
        command += [part for option in options for part in ("--set", option)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert server.stdout is not None
        port = int(json.loads(server.stdout.readline())["engines"][0]["url"].rpartition(":")[2])
        try:
            ours, limit = [], []
            for _ in range(rounds + 1):
                ours.append(measured(server.pid, port, completion, b"[DONE]"))
                assert bare.pid is not None
                limit.append(measured(bare.pid, bare_port, lambda n: b"%d" % n, b"x"))
        finally:
            server.terminate()
            server.wait(30)
            bare.terminate()
            bare.join()
    rows: list[Row] = []
    for index, name in enumerate(("a request", "a streamed event")):
        mine, theirs = ([one[index] for one in some[1:]] for some in (ours, limit))
        rows.append(compared(f"CPU of {name}", "us", mine, "bare asyncio writes", theirs))
    tell("mock_server", rows)


if __name__ == "__main__":
    main()
