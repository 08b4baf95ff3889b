"""What asking the router over HTTP takes, against the decision alone and an empty endpoint.

A router process with 64 workers that hold the beginnings of prompts of 8,192 tokens; a client that
keeps its connections and measures from the first byte sent to the last read. Against: an endpoint
of the same app in the same process that reads as long a body and answers nothing; and, in this
process, the decision alone, from tokens to worker, hashing included.

    python -m benchmarks.router_service [--workers 64] [--tokens 8192] [--requests 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import Request
from fastapi.responses import Response

from benchmarks.router import PROMPTS, Fleet, Scale, Tokens, timed_us
from kvbm.cli.figures import Row, tell
from router.settings import RouterSettings

CONCURRENT = 8
ROUNDS = 5
ENDED_AT_ONCE = 64


# -- the router's process -----------------------------------------------------------------


async def serve(scale: Scale) -> None:
    from router.app import create_app
    from router.assembly import running
    from router.index import WorkerId
    from router.metrics import RouterMetrics
    from router.model import Engine
    from router.service import RouterService
    from runtime import telemetry
    from runtime.engine_card import EngineCard
    from runtime.web.server import WebServer

    telemetry.configure("json", "warning", sys.stderr, {})
    settings = RouterSettings.load(
        environ={},
        overrides={"discovery.discovery": "memory", "requests.plane": "memory"},
    ).value
    async with running(settings, {}, RouterMetrics("0", settings.name)) as assembly:
        await assembly.fleet.wait_synced()
        card = EngineCard(model="m", url="http://engine", block_tokens=scale.block_tokens)
        for instance in range(1, scale.workers + 1):
            assembly._put(Engine(instance, card))
        for worker, tier, names, local in Fleet(scale, "kv").holdings:
            assembly.index.stored(WorkerId(worker.instance + 1), tier, None, names, local)
        app = create_app(RouterService(assembly))

        @app.post("/empty", response_class=Response)
        async def empty(request: Request) -> Response:
            await request.body()
            return Response(b"{}", media_type="application/json")

        server = WebServer(app, "127.0.0.1", 0, section="http", concurrency_max=1024)
        await server.start()
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until the parent ends
        await server.stop()


# -- the client ---------------------------------------------------------------------------


class Connection:
    """HTTP/1.1, kept open; as little as it takes, so that the server is what is measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))

    async def ask(self, request: bytes) -> bytes:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await self._reader.readexactly(length)
        assert head.startswith(f"HTTP/1.1 {HTTPStatus.OK.value}".encode()), (head, body)
        return body

    def close(self) -> None:
        self._writer.close()


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@dataclass(slots=True)
class Client:
    port: int
    pid: int
    count: int

    async def latencies_us(self, requests: list[bytes]) -> tuple[list[float], list[float]]:
        """One after the other: by the clock, and of the server's processor time."""
        connection = await Connection.open(self.port)
        clock = (~self.pid << 3) | 2  # clock_getcpuclockid(3)
        taken: list[float] = []
        worked: list[float] = []
        answers: list[bytes] = []
        for number in range(self.count):
            worked_ns, start = time.clock_gettime_ns(clock), time.perf_counter_ns()
            answers.append(await connection.ask(requests[number % len(requests)]))
            taken.append((time.perf_counter_ns() - start) / 1000)
            worked.append((time.clock_gettime_ns(clock) - worked_ns) / 1000)
            if len(answers) == ENDED_AT_ONCE:
                await self._end(connection, answers)
        await self._end(connection, answers)
        connection.close()
        return taken, worked

    async def per_second(self, requests: list[bytes]) -> float:
        connections = [await Connection.open(self.port) for _ in range(CONCURRENT)]
        answers: list[bytes] = []

        async def some(first: int) -> None:
            for number in range(first, self.count, CONCURRENT):
                answer = await connections[first].ask(requests[number % len(requests)])
                answers.append(answer)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for first in range(CONCURRENT):
                tasks.create_task(some(first))
        taken_s = time.perf_counter() - start
        await self._end(connections[0], answers)
        for connection in connections:
            connection.close()
        return self.count / taken_s

    async def _end(self, connection: Connection, answers: list[bytes]) -> None:
        """Not measured."""
        names = [name for answer in answers if (name := json.loads(answer).get("request"))]
        answers.clear()
        for first in range(0, len(names), 1024):
            events = [{"request": name, "kind": "end"} for name in names[first : first + 1024]]
            body = json.dumps({"events": events}).encode()
            await connection.ask(post("/v1/requests/events", body))


def quantile(taken: list[float], share: float) -> float:
    return statistics.quantiles(taken, n=100)[int(share * 100) - 1]


def latency_row(name: str, share: float, taken: list[float], base: list[float], peer: str) -> Row:
    value, against = quantile(taken, share), quantile(base, share)
    return {
        "name": name,
        "value": round(value, 1),
        "min": round(min(taken), 1),
        "max": round(max(taken), 1),
        "unit": "us",
        "against": peer,
        "against_value": round(against, 1),
        "ratio": round(value / against, 2),
        "target": None,
        "ok": True,
    }


def rate_row(name: str, rates: list[float], base: list[float]) -> Row:
    value, against = statistics.median(rates), statistics.median(base)
    return {
        "name": name,
        "value": round(value, 1),
        "min": round(min(rates), 1),
        "max": round(max(rates), 1),
        "unit": "requests/s",
        "against": "an empty endpoint",
        "against_value": round(against, 1),
        "ratio": round(value / against, 2),
        "target": None,
        "ok": True,
    }


async def measure(client: Client, prompts: list[Tokens], scale: Scale) -> list[Row]:
    bodies = [json.dumps({"tokens": tokens.tolist()}).encode() for tokens in prompts]
    packed = [
        json.dumps({"tokens": base64.b64encode(tokens.astype("<u4").tobytes()).decode()}).encode()
        for tokens in prompts
    ]
    kinds = {
        "numbers": [post("/v1/route", body) for body in bodies],
        "base64": [post("/v1/route", body) for body in packed],
        "empty, as numbers": [post("/empty", body) for body in bodies],
        "empty, as base64": [post("/empty", body) for body in packed],
    }
    fleet = Fleet(scale, "kv")
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "decision")}
    work: dict[str, list[float]] = {kind: [] for kind in kinds}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):  # in turns, so that all see the same machine
        for kind, requests in kinds.items():
            taken, worked = await client.latencies_us(requests)
            times[kind] += taken
            work[kind] += worked
            rates[kind].append(await client.per_second(requests))
        times["decision"] += timed_us(fleet.router, prompts, scale, client.count)
    rows: list[Row] = []
    for kind in ("numbers", "base64"):
        empty = f"empty, as {kind}"
        what = f"route, {scale.tokens} tokens as {kind}, {scale.workers} workers"
        for label, share in (("median", 0.5), ("p99", 0.99)):
            rows.append(
                latency_row(
                    f"{what}, {label}", share, times[kind], times[empty], "an empty endpoint"
                )
            )
        name = f"{what}, the server's processor time, median"
        rows.append(latency_row(name, 0.5, work[kind], work[empty], "an empty endpoint"))
        rows.append(rate_row(f"{what}, {CONCURRENT} at a time", rates[kind], rates[empty]))
    for label, share in (("median", 0.5), ("p99", 0.99)):
        name = f"route, as base64, {label}"
        rows.append(
            latency_row(name, share, times["base64"], times["decision"], "the decision in process")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    scale = Scale(given.workers, given.tokens, given.block_tokens)
    if given.serve:
        asyncio.run(serve(scale))
        return
    command = [sys.executable, "-m", "benchmarks.router_service", "--serve"]
    for name in ("workers", "tokens", "block_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdin is not None
        port = int(server.stdout.readline())
        prompts = Fleet(scale, "kv").prompts[:PROMPTS]
        client = Client(port, server.pid, max(given.requests // ROUNDS, 100))
        rows = asyncio.run(measure(client, prompts, scale))
        server.stdin.close()
    tell("router_service", rows)


if __name__ == "__main__":
    main()
