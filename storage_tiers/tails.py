"""Notes of objects that are known by name only, read in the background.

Other nodes wrote these objects, or this node before it was restarted. Their tails are read the
newest first, a few at once and so many a second, because each costs a request. What cannot be read
in a few attempts, or turns out damaged, is counted and its chunks stay without notes; they can be
loaded all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from storage_tiers.base import Key
from storage_tiers.bucket import BucketError, ObjectMissingError
from storage_tiers.object_index import ObjectIndex, StoredObject
from storage_tiers.objects import parse_tail

QUEUE_MAX: Final = 1 << 17  # objects; beyond it the oldest are not read
AT_ONCE: Final = 4
ATTEMPTS: Final = 3
RETRY_PAUSE_S: Final = 5.0


class Tails:
    """One event loop calls it; `run` until cancelled."""

    def __init__(
        self,
        index: ObjectIndex,
        fetch: Callable[[StoredObject], Awaitable[bytes | bytearray]],
        told: Callable[[Sequence[Key], Sequence[bytes]], None],
        *,
        requests: Counter[str],
        errors: Counter[str],
        reads_per_s: float,
    ) -> None:
        """`fetch` reads an object's tail and raises BucketError; no reads at 0 `reads_per_s`."""
        self._index = index
        self._fetch = fetch
        self._told = told
        self._requests = requests
        self._errors = errors
        self._reads_per_s = reads_per_s
        self._queue: deque[tuple[StoredObject, int]] = deque()  # and which attempt is next
        self._arrived = asyncio.Event()
        self._due = 0.0  # when the next read may begin

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, stored: StoredObject) -> None:
        """An object was found whose notes are not known."""
        if not stored.tail_bytes or not self._reads_per_s:
            return
        if len(self._queue) >= QUEUE_MAX:
            self._queue.popleft()
            self._errors["notes_dropped"] += 1
        self._queue.append((stored, 1))
        self._arrived.set()

    def take(self, stored: StoredObject, tail: bytes) -> list[bytes]:
        """What an object's tail says, told; empty for all its chunks if it is damaged."""
        stored.is_tail_read = True
        keys = [chunk.key for chunk in stored.chunks]
        notes = parse_tail(tail, keys)
        if notes is None:
            self._errors["notes_damaged"] += 1
            return [b""] * len(keys)
        known = {k: n for k, n in zip(keys, notes, strict=True) if n and k not in stored.ignored}
        if known and self._index.get(stored.name) is stored:
            self._told(list(known), list(known.values()))
        return notes

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._read_on())

    # -- below ---------------------------------------------------------------------------

    async def _read_on(self) -> None:
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            stored, attempt = self._queue.pop()
            if not stored.is_tail_read and self._index.get(stored.name) is stored:
                await self._turn()
                await self._read(stored, attempt)

    async def _turn(self) -> None:
        now = time.monotonic()
        begin = max(now, self._due)
        self._due = begin + 1 / self._reads_per_s
        await asyncio.sleep(begin - now)

    async def _read(self, stored: StoredObject, attempt: int) -> None:
        self._requests["get_notes"] += 1
        try:
            tail = await self._fetch(stored)
        except ObjectMissingError:
            return  # deleted by another node; the next full listing says so
        except BucketError:
            self._errors["notes"] += 1
            if attempt >= ATTEMPTS:
                self._errors["notes_dropped"] += 1
                return
            await asyncio.sleep(RETRY_PAUSE_S)
            self._queue.appendleft((stored, attempt + 1))
            return
        if not stored.is_tail_read:
            self.take(stored, bytes(tail))
