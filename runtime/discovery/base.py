"""Discovery: who is there, told to all who ask or watch.

A value is put under a key and is there for as long as the one who put it lives: every `Discovery`
holds one lease with a time to live and renews it. When the process dies, its values are gone after
that time; when it closes, at once. When the lease is lost (the server restarted, the network was
cut, the process was stopped for a while) everything is put again under a new one: losing a lease
never ends a process. A watcher ends up with the truth whatever happened in between: after a
broken connection all is listed again and it is told the differences.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, Self

KEY_CHARACTERS_MAX: Final = 1024
SEGMENT_CHARACTERS_MAX: Final = 200
VALUE_BYTES_MAX: Final = 256 << 10  # etcd takes 1.5 MiB a request, a Kubernetes object 1 MiB
WATCH_KEYS: Final = 1 << 16

_SEGMENT = re.compile(rf"[A-Za-z0-9._~%-]{{1,{SEGMENT_CHARACTERS_MAX}}}")


class DiscoveryError(Exception):
    """The root: ValueRefused (the caller's doing) and DiscoveryUnavailable (nobody's)."""


class ValueRefused(DiscoveryError):
    """A key or value that no kind of discovery takes; the message says what is allowed."""


class DiscoveryUnavailable(DiscoveryError):
    """The other side cannot be reached, or answered with an error."""


@dataclass(frozen=True, slots=True)
class Written:
    """All others can see it."""


@dataclass(frozen=True, slots=True)
class Pending:
    """It is remembered here, and written as soon as the other side can be reached."""

    reason: str


Outcome = Written | Pending


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Deleted:
    key: str


@dataclass(frozen=True, slots=True)
class Synced:
    """All that was there when it was listed has been told; comes again after each relisting."""


Event = Put | Deleted | Synced


@dataclass(frozen=True, slots=True)
class DiscoveryStatus:
    kind: str
    connected: bool
    error: str | None  # why it is not connected
    lease: str | None
    registered: int  # values that this process keeps there
    pending: int  # of those and of deletions: not yet written
    lease_losses_total: int
    reregistered_total: int  # values put again after a lease was lost
    relists_total: int  # times that a watch had to begin anew
    skipped_total: int  # entries found that nobody of ours can have written
    watches: int
    watch_dropped_total: int  # keys beyond what an open watch may hold


class Discovery(Protocol):
    """All methods are called from one event loop."""

    async def start(self) -> None:
        """Begin to work; returns at once, whether the other side can be reached or not."""
        ...

    async def close(self) -> None:
        """Take back all that was put, if that is quick, and end the watches. Idempotent."""
        ...

    async def put(self, key: str, value: bytes) -> Outcome:
        """Keep `value` under `key` until `delete` or `close`. Raises ValueRefused."""
        ...

    async def delete(self, key: str) -> Outcome:
        """Take back what this object put there; what others put stays."""
        ...

    async def list(self, prefix: str) -> dict[str, bytes]:
        """All that is under `prefix` ("" or ending in "/"); raises DiscoveryUnavailable."""
        ...

    def watch(self, prefix: str, limit: int = WATCH_KEYS) -> Watch:
        """All that is under `prefix`, then `Synced`, then each change."""
        ...

    def status(self) -> DiscoveryStatus: ...


class Watch:
    """Changes for one watcher, as an async iterator that ends when it is closed.

    It holds what is true and what was told, not a queue of events: however slow the watcher and
    however fast the changes, it takes memory for `limit` keys. Changes of a key that were not
    taken yet are merged (and counted); what is taken is the latest.
    """

    def __init__(self, prefix: str, limit: int, on_close: Callable[[Watch], None]) -> None:
        assert limit > 0
        self.prefix = prefix
        self.merged_total = 0
        self.dropped_total = 0
        self._limit = limit
        self._on_close = on_close
        self._truth: dict[str, bytes] = {}
        self._told: dict[str, bytes] = {}
        self._due: dict[str | None, None] = {}  # keys in order, None for `Synced`
        self._arrived = asyncio.Event()
        self._starved = False
        self._closed = False

    @property
    def is_starved(self) -> bool:
        """Keys were dropped for want of room, and now there is some: list again."""
        return self._starved and len(self._truth) < self._limit

    def replace(self, whole: Mapping[str, bytes]) -> None:
        """Called by the backend with all there is: the differences become due."""
        if self._closed:
            return
        self._starved = False
        for key in [key for key in self._truth if key not in whole]:
            self.change(key, None)
        for key, value in whole.items():
            self.change(key, value)
        self._due.pop(None, None)  # one that is due yet comes after these changes
        self._due[None] = None
        self._arrived.set()

    def change(self, key: str, value: bytes | None) -> None:
        """Called by the backend; None deletes."""
        if self._closed or self._truth.get(key) == value:
            return
        if value is None:
            del self._truth[key]
        elif key not in self._truth and len(self._truth) >= self._limit:
            self.dropped_total += 1
            self._starved = True
            return
        else:
            self._truth[key] = value
        if key in self._due:
            self.merged_total += 1
            if self._told.get(key) == value:
                del self._due[key]
            return
        self._due[key] = None
        self._arrived.set()

    def close(self) -> None:
        """End the iteration after what is due. Idempotent."""
        if not self._closed:
            self._closed = True
            self._arrived.set()
            self._on_close(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._due:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        key = next(iter(self._due))
        del self._due[key]
        if key is None:
            return Synced()
        value = self._truth.get(key)
        if value is None:
            del self._told[key]
            return Deleted(key)
        self._told[key] = value
        return Put(key, value)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def check_key(key: str) -> None:
    """Raises ValueRefused unless every segment is a plain, percent-encoded one."""
    if len(key) > KEY_CHARACTERS_MAX:
        raise ValueRefused(f"the key {key[:60]!r}... is longer than {KEY_CHARACTERS_MAX}")
    for segment in key.split("/"):
        if _SEGMENT.fullmatch(segment) is None or segment in {".", ".."}:
            raise ValueRefused(
                f"the key {key!r} has the segment {segment!r}; allowed: 1 to "
                f"{SEGMENT_CHARACTERS_MAX} letters, digits and ._~%-, others percent-encoded"
            )


def check_prefix(prefix: str) -> None:
    """Raises ValueRefused: a prefix ends at a level, so that `a` never means `ab`."""
    if not prefix:
        return
    if not prefix.endswith("/"):
        raise ValueRefused(f"the prefix {prefix!r} must end in '/'")
    check_key(prefix[:-1])


def check_value(key: str, value: bytes) -> None:
    if len(value) > VALUE_BYTES_MAX:
        raise ValueRefused(
            f"the value for {key!r} has {len(value)} bytes; allowed: up to {VALUE_BYTES_MAX}"
        )
