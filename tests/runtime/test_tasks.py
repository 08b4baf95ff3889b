"""Tasks end when they are told to, even where a library loses the telling."""

from __future__ import annotations

import asyncio

import pytest

from runtime import tasks
from runtime.tasks import end


async def test_a_task_is_over_when_it_was_ended() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    await end(task)
    assert task.cancelled()
    await end(task)


async def test_a_cancellation_that_a_library_loses_is_told_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    lost = 0

    async def work() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost == 3:
                    raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await end(task)
    assert task.cancelled() and lost == 3


async def test_what_a_task_raised_is_raised() -> None:
    async def work() -> None:
        raise ValueError("broken")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="broken"):
        await end(task)


async def test_who_ends_a_task_may_be_cancelled() -> None:
    """Before the task has ended: it is told once, and goes on with its end."""
    held = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await held.wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    ending = asyncio.create_task(end(task))
    await asyncio.sleep(0.01)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert not task.done()
    held.set()
    await asyncio.wait([task], timeout=60)
    assert task.cancelled()
