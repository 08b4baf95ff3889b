"""What an engine's connector tells the daemon for routers: who it is, and where its events are."""

from __future__ import annotations

import xxhash

from runtime.events.engine_feed import rank_endpoint
from runtime.names import parse_instance_id


def parse_worker_id(given: int | str) -> int:
    """A number, or text of one: decimal, or hexadecimal after `0x`. Raises ValueError."""
    return parse_instance_id(given)


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
