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


def live_endpoint(endpoint: str, rank: int) -> str:
    """Where the daemon, on the same node, hears a rank's publisher; empty if it cannot.

    vLLM listens at wildcard addresses and paths only; to any other it connects, and whoever listens
    there hears it.
    """
    listens = "*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://")
    return _of_rank(endpoint, rank) if listens else ""


def replay_endpoint(endpoint: str | None, rank: int) -> str:
    """Where a rank's ring answers, which always listens; empty if it has none."""
    return _of_rank(endpoint, rank) if endpoint else ""


def _of_rank(endpoint: str, rank: int) -> str:
    if not endpoint.startswith(("tcp://", "ipc://")) or endpoint.endswith(":0"):
        return ""  # within the engine's process, or at a port that nobody knows
    try:
        return rank_endpoint(endpoint, rank)
    except ValueError:
        return ""
