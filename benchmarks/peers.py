"""A peer's host memory: what the peer tier reads a second, against the same bytes moved bare.

Ours is the whole of a load: claim, read, checksum, release, in batches as the daemon takes them. It
is held against a bare NIXL UCX read of the same bytes in batches of the same size, between two
processes that do nothing else, and against the same bytes over a bare TCP connection. All are on
this machine; both nodes' parts of the tier share one process, which a fleet's do not.

    python -m benchmarks.peers [--megabytes 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from kvbm.cli.figures import Row, compared, tell
from kvbm.meter import CountingMeter
from kvbm.note_dict import NoteDict
from kvbm.onboard import BATCH_BYTES, BATCH_CHUNKS
from kvbm.peers.contents import Contents
from kvbm.peers.network import PeerNetwork
from kvbm.peers.settings import PeerSettings
from runtime.events.memory import NullPlane
from storage_tiers.arena import Arena
from storage_tiers.base import Chunk, Key, Loaded, LoadItem, SilentListener
from storage_tiers.codec import checksum
from storage_tiers.dram import DramTier
from storage_tiers.files import Moved
from storage_tiers.stream import receive_all, send_all
from storage_tiers.ucx import UcxMover

SIZES_BYTES = (256 << 10, 1 << 20, 4 << 20)
START_S = 120.0
DEADLINE_S = 30.0

Work = Callable[[], Coroutine[Any, Any, None]]


class _NoEvents:
    def stored(self, tier: object, keys: object) -> None:
        pass

    def removed(self, tier: object, keys: object) -> None:
        pass


async def _sound(_: Key) -> bool:
    return True


class Node:
    """Host memory and its network, as the daemon puts them together."""

    def __init__(self, arena_bytes: int, mover: str, nodes: list[str]) -> None:
        self.dram = DramTier(Arena.create(arena_bytes), SilentListener())
        notes = NoteDict(_NoEvents())
        self.contents = Contents(notes)
        settings = {
            "port": 0,
            "mover": mover,
            "nodes": nodes,
            "deadline": DEADLINE_S,
            "token": "of the benchmark",
        }
        self.network = PeerNetwork(
            PeerSettings.model_validate(settings),
            self.dram,
            self.contents,
            notes,
            CountingMeter(),
            listener=SilentListener(),
            check=_sound,
            plane=NullPlane(),
            namespace="benchmark",
            node=f"node-{id(self)}",
        )

    async def start(self, group: asyncio.TaskGroup) -> asyncio.Task[None]:
        await self.network.open()
        await self.network.tier.open()
        return group.create_task(self.network.run())


class Tier:
    """Ours: one node's chunks, loaded by another into its own arena."""

    def __init__(self, size: int, total: int, mover: str) -> None:
        self._size, self._count, self._mover = size, total // size, mover
        # A quarter may be lent, and the reader's batches are that at most.
        self._arena_bytes = max(total, 16 * BATCH_BYTES) + (64 << 20)
        self._batches: list[list[LoadItem]] = []
        self._tier: Any = None

    async def start(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        owner = Node(self._arena_bytes, self._mover, [])
        tasks = [await owner.start(group)]
        port = owner.network.owner.port
        reader = Node(self._arena_bytes, self._mover, [f"127.0.0.1:{port}"])
        tasks.append(await reader.start(group))
        items: list[LoadItem] = []
        for index in range(self._count):
            slot, into = owner.dram.reserve(self._size), reader.dram.reserve(self._size)
            assert slot is not None and into is not None
            view = owner.dram.view(slot)
            view[:] = os.urandom(self._size)
            key = Key(index.to_bytes(16, "big"))
            chunk = Chunk(key, self._size, checksum(view), None, 0)
            owner.dram.commit(slot, chunk, sealed=True)
            items.append(LoadItem(key, reader.dram.view(into)))
        owner.contents.again([item.key for item in items])
        expected = "tcp" if self._mover == "plain" else "nixl-ucx"
        async with asyncio.timeout(START_S):
            while not self._is_ready(reader, expected):
                await asyncio.sleep(0.05)
        step = max(1, min(BATCH_CHUNKS, BATCH_BYTES // self._size))
        self._batches = [items[at : at + step] for at in range(0, len(items), step)]
        self._tier = reader.network.tier
        return tasks

    def _is_ready(self, reader: Node, mover: str) -> bool:
        [peer] = reader.network.status()
        return peer.mover == mover and peer.chunks == self._count

    async def read(self) -> None:
        waiting = list(self._batches)

        async def worker() -> None:
            while waiting:
                for outcome in await self._tier.load(waiting.pop(0)):
                    assert isinstance(outcome, Loaded), outcome

        await asyncio.gather(worker(), worker())  # as the onboarder does


class Bare:
    """NIXL's UCX plugin between two processes, nothing around it."""

    def __init__(self, size: int, total: int) -> None:
        arenas = [Arena.create(total) for _ in range(2)]
        for arena in arenas:
            arena.data[:] = bytes(total)
        self._far, self._near = (UcxMover(arena, lambda: None) for arena in arenas)
        step = max(1, min(BATCH_CHUNKS, BATCH_BYTES // size))
        pieces = [(at, at, size) for at in range(0, total // size * size, size)]
        self._batches = [pieces[at : at + step] for at in range(0, len(pieces), step)]

    async def start(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        tasks = [group.create_task(mover.run()) for mover in (self._far, self._near)]
        async with asyncio.timeout(START_S):
            while self._far.own is None or self._near.own is None:
                await asyncio.sleep(0.05)
        return tasks

    async def read(self) -> None:
        assert self._far.own is not None
        self._far.serve(DEADLINE_S)
        waiting, remote = list(self._batches), self._far.own

        async def worker() -> None:
            while waiting:
                assert await self._near.read(remote, waiting.pop(0), DEADLINE_S) == Moved()

        await asyncio.gather(worker(), worker())
        self._far.serve(0)


class Tcp:
    """A bare connection through loopback from another process, into memory of this one."""

    def __init__(self, total: int, stack: ExitStack) -> None:
        self._target = memoryview(bytearray(total))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]
        child = subprocess.Popen([sys.executable, "-m", __spec__.name, "--send", f"{port}:{total}"])
        stack.callback(child.wait)
        self._sock, _ = listener.accept()
        stack.callback(self._sock.close)

    async def read(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        await asyncio.to_thread(self._read, deadline)

    def _read(self, deadline: float) -> None:
        self._sock.sendall(b"!")
        receive_all(self._sock, [self._target], deadline)


def send(port: int, total: int) -> None:
    """The other process of `Tcp`: all bytes, each time it is asked."""
    data = memoryview(bytearray(total))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        while sock.recv(1):
            send_all(sock, [data], time.monotonic() + DEADLINE_S)
            sock.settimeout(None)


async def measure(size: int, total: int, rounds: int, stack: ExitStack) -> list[Row]:
    ucx, plain, bare = Tier(size, total, "auto"), Tier(size, total, "plain"), Bare(size, total)
    tcp = Tcp(total, stack)
    rates: dict[str, list[float]] = {}
    async with asyncio.TaskGroup() as group:
        tasks = [*await ucx.start(group), *await plain.start(group), *await bare.start(group)]
        works: list[tuple[str, Work]] = [
            *(("ucx", ucx.read), ("bare ucx", bare.read)),
            *(("plain", plain.read), ("bare tcp", tcp.read)),
        ]
        for round_ in range(rounds + 1):
            for name, work in works if round_ % 2 else works[::-1]:
                began = time.perf_counter()
                await work()
                if round_:
                    rates.setdefault(name, []).append(total / (time.perf_counter() - began) / 1e6)
        for task in tasks:
            task.cancel()
    kib = size >> 10
    return [
        compared(f"peer by NIXL, {kib} KiB", "MB/s", rates["ucx"], "NIXL UCX", rates["bare ucx"]),
        compared(f"peer by NIXL, {kib} KiB", "MB/s", rates["ucx"], "TCP", rates["bare tcp"]),
        compared(f"peer by TCP, {kib} KiB", "MB/s", rates["plain"], "TCP", rates["bare tcp"]),
    ]


def run(megabytes: int, rounds: int) -> list[Row]:
    rows: list[Row] = []
    for size in SIZES_BYTES:
        with ExitStack() as stack:
            rows += asyncio.run(measure(size, megabytes << 20, rounds, stack))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256, help="moved each way and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--send", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        send(*map(int, arguments.send.split(":")))
    else:
        tell("peers", run(arguments.megabytes, arguments.rounds))


if __name__ == "__main__":
    main()
