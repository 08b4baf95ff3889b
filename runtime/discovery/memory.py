"""Discovery within one process: programs that share one `MemoryStore` find each other.

For tests and single-process programs, with the real behaviour, leases that run out included.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from itertools import count
from typing import Final

from runtime.discovery.base import Deleted, DiscoveryUnavailable, Put
from runtime.discovery.store import LeaseLost, Snapshot

WATCH_CHANGES_MAX: Final = 4096


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    ends: asyncio.TimerHandle


class MemoryStore:
    kind = "memory"

    def __init__(self) -> None:
        self.skipped_total = 0
        self._ids = count(1)
        self._leases: dict[str, _Lease] = {}
        self._values: dict[str, tuple[str, bytes]] = {}  # key -> lease, value
        self._listeners: set[asyncio.Queue[Put | Deleted]] = set()

    async def grant(self, ttl_s: float) -> str:
        lease = f"{next(self._ids):x}"
        self._leases[lease] = _Lease(ttl_s, self._end_in(lease, ttl_s))
        return lease

    async def renew(self, lease: str) -> None:
        held = self._held(lease)
        held.ends.cancel()
        held.ends = self._end_in(lease, held.ttl_s)

    async def revoke(self, lease: str) -> None:
        self.expire(lease)

    def expire(self, lease: str) -> None:
        """End a lease now, whoever renews it."""
        held = self._leases.pop(lease, None)
        if held is None:
            return
        held.ends.cancel()
        for key in [key for key, (owner, _) in self._values.items() if owner == lease]:
            del self._values[key]
            self._tell(Deleted(key))

    async def put(self, lease: str, key: str, value: bytes) -> None:
        self._held(lease)
        self._values[key] = (lease, value)
        self._tell(Put(key, value))

    async def delete(self, lease: str, key: str) -> None:
        if self._values.get(key, ("", b""))[0] == lease:
            del self._values[key]
            self._tell(Deleted(key))

    async def list(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, (_, value) in self._values.items() if key.startswith(prefix)}

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot | Put | Deleted]:
        changes: asyncio.Queue[Put | Deleted] = asyncio.Queue(WATCH_CHANGES_MAX)
        self._listeners.add(changes)
        try:
            yield Snapshot(await self.list(prefix))
            while changes in self._listeners or not changes.empty():
                change = await changes.get()
                if change.key.startswith(prefix):
                    yield change
        finally:
            self._listeners.discard(changes)
        raise DiscoveryUnavailable("more changes came than this watch could hold")

    async def close(self) -> None:
        """Others may go on using it."""

    def _held(self, lease: str) -> _Lease:
        held = self._leases.get(lease)
        if held is None:
            raise LeaseLost(f"the lease {lease} is over")
        return held

    def _end_in(self, lease: str, ttl_s: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(ttl_s, self.expire, lease)

    def _tell(self, change: Put | Deleted) -> None:
        for changes in list(self._listeners):
            try:
                changes.put_nowait(change)
            except asyncio.QueueFull:
                self._listeners.discard(changes)  # its watch begins anew, from a snapshot
