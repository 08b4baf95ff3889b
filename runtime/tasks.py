"""Tasks that have ended when they are said to."""

from __future__ import annotations

import asyncio
from typing import Any, Final

AGAIN_S: Final = 5.0
"""Longer than anything takes to end in order."""


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel it, and return when it has ended; raises what it raised.

    It is cancelled again until it has: before Python 3.12 `asyncio.wait_for`, which libraries use,
    loses a cancellation that comes together with what it waits for.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=AGAIN_S)
    if not task.cancelled():
        task.result()
