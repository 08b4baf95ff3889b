"""A real daemon's tiers below a mock engine: chunks of made-up bytes, stored and loaded for real.

A chunk is one block; its bytes follow from its key, so every byte that comes back is checked. What
the daemon has of a prompt is fetched before the engine gets the request (`fetch`): the wait is the
real one, and the engine then finds the blocks loaded. Stores are queued, bounded, and dropped when
the queue is full: it costs hits and nothing else. The daemon's client waits, so a thread has it.
"""

from __future__ import annotations

import asyncio
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Self, TypeVar

import numpy as np

from kvbm.stand_in import StandIn
from mocker.content import Chain
from mocker.tiers import Found, Link
from mocker.timing import TierTiming
from runtime.tasks import end
from storage_tiers.base import Chunk, Key, StoreItem

QUEUED_MAX: Final = 4096
LOADED_MAX: Final = 1 << 16
STORED_AT_ONCE: Final = 64
STORE_S: Final = 20.0  # for slots; a daemon that is away is not waited for
SLOTS_EVERY_S: Final = 0.01

T = TypeVar("T")


class DaemonTiers:
    """Takes the place of `NodeTiers`. Use as an async context manager.

    Entering it waits for the daemon only if it `awaits` it. While the daemon is away nothing is
    found there, and what is to be stored is dropped.
    """

    def __init__(
        self, socket: Path, chunk_bytes: int, *, node: int = 0, awaits: bool = True
    ) -> None:
        self.node = node
        self.timing = TierTiming()
        self.stored_total = 0
        self.loaded_total = 0
        self.dropped_total = 0
        self.failed_total = 0  # calls that the daemon did not answer in time
        self.wrong_total = 0  # chunks whose bytes are not what was stored
        self._awaits = awaits
        self._chunk_bytes = chunk_bytes
        self._threads = ThreadPoolExecutor(1, "daemon-client")
        self._stand_in = StandIn(socket, chunk_bytes)
        self._loaded: OrderedDict[int, None] = OrderedDict()  # blocks whose bytes have come
        self._queue: asyncio.Queue[StoreItem] = asyncio.Queue(QUEUED_MAX)
        self._storing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises TimeoutError where it awaits a daemon and none answers."""
        await self._call(self._stand_in.__enter__ if self._awaits else self._stand_in.start)
        self._storing = asyncio.create_task(self._store_queued(), name="storing")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._storing is not None:
            await end(self._storing)
        await self._call(self._stand_in.close)
        self._threads.shutdown()

    async def fetch(self, hashes: Sequence[int]) -> int:
        """Load what the daemon has of these blocks, from the first on; how many came."""
        keys = [self._key(one) for one in hashes]
        try:
            came = await self._call(lambda: self._checked(keys))
        except TimeoutError:
            self.failed_total += 1
            return 0
        for block in hashes[:came]:
            self._loaded[block] = None
        while len(self._loaded) > LOADED_MAX:
            self._loaded.popitem(last=False)
        self.loaded_total += came
        return came

    # -- what an engine asks of its tiers --------------------------------------------------

    def find(self, hashes: Sequence[int], first: int, end: int) -> list[Found]:
        index = first
        while index < end and hashes[index] in self._loaded:
            index += 1
        return [Found("G2", index - first)] if index > first else []

    def load(
        self, now_ps: int, bus: Link, runs: Sequence[Found], hashes: Sequence[int], block_bytes: int
    ) -> int:
        """They are here already."""
        for block in hashes:
            self._loaded.pop(block, None)
        return now_ps

    def promote(self, at_ps: int, engine: int, chain: Chain, first: int, end: int) -> None:
        """The daemon has done it."""

    def store(self, at_ps: int, engine: int, chain: Chain, first: int, end: int) -> None:
        for index in range(first, end):
            key = self._key(chain.hashes[index])
            parent = self._key(chain.hashes[index - 1]) if index else None
            chunk = Chunk(key, self._chunk_bytes, 0, parent, index)
            item = StoreItem(chunk, memoryview(content_of(key, self._chunk_bytes)))
            try:
                self._queue.put_nowait(item)
            except asyncio.QueueFull:
                self.dropped_total += end - index
                return

    def check_integrity(self) -> None:
        assert len(self._loaded) <= LOADED_MAX

    # -- inside ----------------------------------------------------------------------------

    async def drained(self) -> None:
        """Until all that was queued is with the daemon."""
        await self._queue.join()

    async def _store_queued(self) -> None:
        while True:
            items = [await self._queue.get()]
            while len(items) < STORED_AT_ONCE and not self._queue.empty():
                items.append(self._queue.get_nowait())
            stored = await self._store(items)
            self.stored_total += stored
            self.dropped_total += len(items) - stored
            for _ in items:
                self._queue.task_done()

    async def _store(self, items: Sequence[StoreItem]) -> int:
        """How many of them the daemon took. Lookups have their turn while it has no room."""
        loop, stored = asyncio.get_running_loop(), 0
        end_s = loop.time() + STORE_S
        while stored < len(items):
            taken = await self._call(partial(self._stand_in.offer, items[stored:]))
            if not taken and (not self._stand_in.client.ready or loop.time() > end_s):
                break
            stored += taken
            if not taken:
                await asyncio.sleep(SLOTS_EVERY_S)
        return stored

    def _checked(self, keys: Sequence[Key]) -> int:
        for index, data in enumerate(self._stand_in.fetch(keys)):
            if data is None:
                return index
            if data != content_of(keys[index], self._chunk_bytes):
                self.wrong_total += 1
                return index
        return len(keys)

    def _key(self, block_hash: int) -> Key:
        return Key(struct.pack("<QI", block_hash, self._chunk_bytes) + b"mok\0")

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def content_of(key: Key, length: int) -> bytes:
    """Bytes that look random and follow from the key."""
    return np.random.Generator(np.random.SFC64(int.from_bytes(key, "little"))).bytes(length)
