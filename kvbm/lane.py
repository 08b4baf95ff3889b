"""A bounded queue of chunks waiting to move to or from one tier, taken in batches.

Offload and onboard each keep one lane per tier. A lane never blocks who offers: full is an answer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

from storage_tiers.base import Chunk, Key


class Lane:
    """First in, first out, unless `order` says otherwise; each key once; single event loop."""

    def __init__(self, capacity_chunks: int) -> None:
        self.capacity_chunks = capacity_chunks
        self._waiting: OrderedDict[Key, Chunk] = OrderedDict()
        self._filled = asyncio.Event()
        self._hurried = False
        self.waiting_bytes = 0
        self.order: Callable[[Sequence[Key]], list[Key]] | None = None
        """Which of the waiting go first, asked for each batch; those it leaves out come last."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: Key) -> bool:
        return key in self._waiting

    def hurry(self, hurried: bool) -> None:
        """While set, nobody lingers, not even who does already."""
        self._hurried = hurried
        self._filled.set()

    def offer(self, chunk: Chunk) -> bool:
        """Queue it unless it is queued already. False: the lane is full."""
        if chunk.key in self._waiting:
            return True
        if len(self._waiting) >= self.capacity_chunks:
            return False
        self._waiting[chunk.key] = chunk
        self.waiting_bytes += chunk.length
        self._filled.set()
        return True

    def withdraw(self, key: Key) -> bool:
        """Take one key out again; False if it was not waiting (or is on its way already)."""
        chunk = self._waiting.pop(key, None)
        if chunk is None:
            return False
        self.waiting_bytes -= chunk.length
        return True

    def withdraw_all(self) -> list[Chunk]:
        """Take everything out, in order."""
        chunks = list(self._waiting.values())
        self._waiting.clear()
        self.waiting_bytes = 0
        return chunks

    async def take(
        self,
        chunks_max: int,
        *,
        bytes_max: int | None = None,
        enough_bytes: int = 0,
        linger_s: float = 0,
    ) -> list[Chunk]:
        """The next batch: at least one chunk, and no second one beyond either bound.

        Waits up to `linger_s` for `enough_bytes` or `chunks_max` chunks.
        """
        while True:
            while not self._waiting:
                self._filled.clear()
                await self._filled.wait()
            if linger_s > 0:
                await self._linger(chunks_max, enough_bytes, linger_s)
            if self._waiting:  # not withdrawn meanwhile
                break
        if self.order is not None:
            for key in reversed(self.order(list(self._waiting))):
                self._waiting.move_to_end(key, last=False)
        batch: list[Chunk] = []
        size = 0
        while self._waiting and len(batch) < chunks_max:
            chunk = next(iter(self._waiting.values()))
            size += chunk.length
            if batch and bytes_max is not None and size > bytes_max:
                break
            self.withdraw(chunk.key)
            batch.append(chunk)
        return batch

    async def _linger(self, chunks_max: int, enough_bytes: int, linger_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + linger_s
        while self.waiting_bytes < enough_bytes and len(self) < chunks_max and not self._hurried:
            remaining = end - loop.time()
            if remaining <= 0:
                return
            self._filled.clear()
            try:
                async with asyncio.timeout(remaining):
                    await self._filled.wait()
            except TimeoutError:
                return
