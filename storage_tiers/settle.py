"""Running an operation to its end although its caller was cancelled.

A tier must not return while a thread or a device still reads or writes the caller's buffers.
Operations that touch them therefore run as a task of their own, and a cancelled caller waits for
it before it raises. The waiting is bounded by the operation's own I/O.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def settled(operation: Coroutine[Any, Any, T]) -> T:
    """Await `operation` to its end; if the caller is cancelled meanwhile, raise only then."""
    task = asyncio.ensure_future(operation)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen: the caller asked not to hear of it
        raise cancelled
    return task.result()


class Gate:
    """Counts who is inside, so that closing can wait for them and refuse the rest."""

    def __init__(self) -> None:
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.shut = True

    def __enter__(self) -> None:
        self._inside += 1
        self._empty.clear()

    def __exit__(self, *_: object) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._empty.set()

    async def close(self) -> None:
        """Let nobody in any more and wait until everybody has left."""
        self.shut = True
        await self._empty.wait()
