"""What an engine's connector tells the daemon for routers: who it is, and where its events are."""

from __future__ import annotations

import xxhash

from kvbm.protocol import WORKER_ID_MAX
from runtime.events.engine_feed import rank_endpoint


def parse_worker_id(given: int | str) -> int:
    """A number, or text of one: decimal, or hexadecimal after `0x`. Raises ValueError."""
    number = int(given, 0) if isinstance(given, str) else given
    if not 0 < number <= WORKER_ID_MAX:
        raise ValueError(f"{given!r} is not within 1 and 2^64 - 1")
    return number


def derived_worker_id(engine_id: str) -> int:
    """Of an engine that nobody named: the same for all its ranks."""
    return xxhash.xxh3_64_intdigest(engine_id.encode()) or 1


def events_endpoint(endpoint: str | None, rank: int) -> str:
    """Where the daemon, on the same node, hears a rank of an engine; empty if it cannot."""
    if not endpoint or not endpoint.startswith(("tcp://", "ipc://")):
        return ""
    try:
        return rank_endpoint(endpoint, rank)
    except ValueError:
        return ""
