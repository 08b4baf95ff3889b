"""For all tests."""

from __future__ import annotations

import asyncio


def pytest_configure() -> None:
    """Have no event loop unless somebody makes one.

    Asked for the current loop where none was ever set, asyncio makes one that nobody closes:
    pytest-asyncio keeps it between tests, the first `asyncio.run` of a test lets go of it, and its
    sockets are found unclosed in whatever test runs when it is collected.
    """
    asyncio.set_event_loop(None)
