"""What each kind of discovery is written as: a store of values under leases.

`LeasedDiscovery` makes a `Discovery` of any store: it alone knows about retries, re-registration
and watchers, so a store is only what its other side can do. Every call has a deadline of its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from runtime.discovery.base import Deleted, DiscoveryUnavailable, Put


class LeaseLost(DiscoveryUnavailable):
    """The lease is not there any more, nor what was put under it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    values: dict[str, bytes]


def changes(
    told: Mapping[str, bytes] | None, values: dict[str, bytes]
) -> Iterator[Snapshot | Put | Deleted]:
    """What a watcher that was told of `told` (None: of nothing yet) does not know of `values`."""
    if told is None:
        yield Snapshot(values)
        return
    for key in [key for key in told if key not in values]:
        yield Deleted(key)
    for key, value in values.items():
        if told.get(key) != value:
            yield Put(key, value)


class Store(Protocol):
    """All may raise DiscoveryUnavailable; leases are named by strings of the store's own."""

    kind: str
    skipped_total: int

    async def grant(self, ttl_s: float) -> str: ...

    async def renew(self, lease: str) -> None:
        """Raises LeaseLost."""
        ...

    async def revoke(self, lease: str) -> None:
        """What was put under it is gone when this returns."""
        ...

    async def put(self, lease: str, key: str, value: bytes) -> None:
        """Replaces whatever is there, whoever put it; raises LeaseLost."""
        ...

    async def delete(self, lease: str, key: str) -> None:
        """Unless another lease holds the key by now."""
        ...

    async def list(self, prefix: str) -> dict[str, bytes]: ...

    def watch(self, prefix: str) -> AsyncGenerator[Snapshot | Put | Deleted]:
        """All there is first, then what changes; a later snapshot says what is true by then."""
        ...

    async def close(self) -> None: ...
