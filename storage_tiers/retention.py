"""What is in the bucket and what may stay: listing, capacity and age of the S3 tier's objects.

Nodes share the bucket and do not talk to each other: each learns of new objects from their names,
and any of them deletes the oldest. Deleting what another has deleted already is harmless; what one
node deletes, the others find missing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from storage_tiers.base import Key, RemovalReason
from storage_tiers.bucket import Bucket, BucketError, Listed
from storage_tiers.object_index import ObjectIndex, StoredObject
from storage_tiers.objects import ObjectName, root

_OVERLAP_MS: Final = 120_000  # clocks differ, and a name is older than its object's arrival
_FULL_LISTING_EVERY: Final = 20  # listings; finds what other nodes deleted

T = TypeVar("T")


class Retention:
    """Keeps an `ObjectIndex` true and the bucket within its bounds. Calls raise BucketError."""

    def __init__(
        self,
        bucket: Bucket,
        index: ObjectIndex,
        prefix: str,
        capacity_bytes: int,
        clock: Callable[[], float],
        *,
        appeared: Callable[[Sequence[Key]], None],
        removed: Callable[[Sequence[Key], RemovalReason], None],
        found: Callable[[StoredObject], None],
        requests: Counter[str],
        max_age_s: float | None,
        timeout_s: float,
    ) -> None:
        self._bucket = bucket
        self._index = index
        self._prefix = prefix
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._appeared = appeared
        self._removed = removed
        self._found = found
        self._requests = requests
        self._max_age_s = max_age_s
        self._timeout_s = timeout_s
        self._room = asyncio.Lock()
        self._listing = asyncio.Lock()
        self._listings = 0
        self._newest_ms = 0
        self.reserved_bytes = 0  # of objects being written; who reserved gives them back

    async def discover(self) -> None:
        """Learn of objects from where new names can be, now and then of everything."""
        async with self._listing:
            everything = self._listings % _FULL_LISTING_EVERY == 0
            after = root(self._prefix)
            if not everything:
                after += f"{max(0, self._newest_ms - _OVERLAP_MS):013d}"
            before = set(self._index.names()) if everything else set()
            seen: set[str] = set()
            while page := await self._list(after):
                after = page[-1].name
                seen.update(listed.name for listed in page)
                self._take_page(page)
            self._listings += 1
            for name in before - seen:
                self._removed(self._index.drop(name), RemovalReason.REQUESTED)

    async def trim(self) -> None:
        """Delete what is too old, and the oldest while the bucket is too full."""
        if self._max_age_s is not None:
            oldest_ms = int((self._clock() - self._max_age_s) * 1000)
            old = itertools.takewhile(lambda o: o.created_ms < oldest_ms, self._index.oldest())
            await self.delete([stored.name for stored in old], RemovalReason.AGE)
        async with self._room:
            await self._make_room(0)

    async def reserve(self, size_bytes: int) -> bool:
        """Make room for an object and hold it; False if it cannot be made."""
        async with self._room:
            if not await self._make_room(size_bytes):
                return False
            self.reserved_bytes += size_bytes
            return True

    async def delete(self, names: Sequence[str], reason: RemovalReason) -> None:
        """Out of the bucket, then out of the index. If it fails the index is as before."""
        if names:
            self._requests["delete"] += 1
            await self.within(self._bucket.delete(names))
            self._removed([key for name in names for key in self._index.drop(name)], reason)

    async def within(self, call: Coroutine[Any, Any, T]) -> T:
        """A call of the bucket, with the tier's deadline."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except TimeoutError as error:
            raise BucketError(f"no answer within {self._timeout_s:g} s") from error

    async def _list(self, after: str) -> Sequence[Listed]:
        self._requests["list"] += 1
        return await self.within(self._bucket.list_after(root(self._prefix), after))

    def _take_page(self, page: Sequence[Listed]) -> None:
        appeared: list[Key] = []
        found: list[str] = []
        horizon_ms = int(self._clock() * 1000) + _OVERLAP_MS
        for listed in page:
            parts = ObjectName.parse(self._prefix, listed.name)
            if parts is None or parts.size_bytes != listed.size_bytes:
                continue  # not ours, or cut short
            if listed.name not in self._index:
                appeared.extend(self._index.add(listed.name, parts))
                found.append(listed.name)
            if parts.created_ms <= horizon_ms:  # a clock far ahead must not hide the others
                self._newest_ms = max(self._newest_ms, parts.created_ms)
        if appeared:
            self._appeared(appeared)
        for name in found:
            if (stored := self._index.get(name)) is not None:  # not one that is deleted already
                self._found(stored)

    async def _make_room(self, size_bytes: int) -> bool:
        excess = self._index.used_bytes + self.reserved_bytes + size_bytes - self._capacity_bytes
        victims: list[str] = []
        if size_bytes <= self._capacity_bytes:
            for stored in self._index.oldest():
                if excess <= 0:
                    break
                victims.append(stored.name)
                excess -= stored.size_bytes
        if excess > 0:
            return False
        await self.delete(victims, RemovalReason.CAPACITY)
        return True
