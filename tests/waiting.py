"""Waiting for another process, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Raises AssertionError with `what` if it does not come true in time."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
