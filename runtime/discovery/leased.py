"""A `Discovery` over any store: the lease kept alive, what is owned written, watchers in truth.

What this process wants registered is remembered here; one task brings the store to it. It grants
the lease, renews it three times in its life, writes what is not written yet, and after a loss
starts over with a new lease and everything owned. Failures are retried for as long as it is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from typing import Final, assert_never

import structlog

from runtime.discovery.base import (
    WATCH_KEYS,
    Deleted,
    DiscoveryStatus,
    DiscoveryUnavailable,
    Outcome,
    Pending,
    Put,
    ValueRefused,
    Watch,
    Written,
    check_key,
    check_prefix,
    check_value,
)
from runtime.discovery.store import LeaseLost, Snapshot, Store

OWNED_MAX: Final = 4096
WRITE_WAIT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 3.0
RENEWALS_PER_TTL: Final = 3
RETRY_S: Final = 0.1  # doubles up to
RETRY_S_MAX: Final = 2.0

_log = structlog.get_logger()


class LeasedDiscovery:
    def __init__(self, store: Store, ttl_s: float) -> None:
        assert ttl_s > 0
        self._store = store
        self._ttl_s = ttl_s
        self._owned: dict[str, bytes] = {}
        self._unwritten: dict[str, int] = {}  # key -> number of its last change
        self._change = 0
        self._wake = asyncio.Event()
        self._settled = asyncio.Condition()
        self._keeper: asyncio.Task[None] | None = None
        self._watches: dict[Watch, asyncio.Task[None]] = {}
        self._lease: str | None = None
        self._renewed_s = 0.0
        self._error: str | None = "not connected yet"
        self._lease_losses_total = 0
        self._reregistered_total = 0
        self._relists_total = 0
        self._closed = False

    async def start(self) -> None:
        assert self._keeper is None and not self._closed, "started already"
        self._keeper = asyncio.create_task(self._keep(), name="discovery-lease")
        self._keeper.add_done_callback(self._ended)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        tasks = [*self._watches.values(), *([self._keeper] if self._keeper else [])]
        for watch in list(self._watches):
            watch.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._lease is not None:
            # If this fails, the values are gone when the lease ends by itself.
            with contextlib.suppress(DiscoveryUnavailable, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._store.revoke(self._lease)
        self._lease = None
        self._error = "closed"
        await self._store.close()

    async def put(self, key: str, value: bytes) -> Outcome:
        check_key(key)
        check_value(key, value)
        if key not in self._owned and len(self._owned) >= OWNED_MAX:
            raise ValueRefused(f"this process has {OWNED_MAX} values registered, the most allowed")
        self._owned[key] = value
        return await self._write(key)

    async def delete(self, key: str) -> Outcome:
        check_key(key)
        if self._owned.pop(key, None) is None and key not in self._unwritten:
            return Written()
        return await self._write(key)

    async def list(self, prefix: str) -> dict[str, bytes]:
        check_prefix(prefix)
        return await self._store.list(prefix)

    def watch(self, prefix: str, limit: int = WATCH_KEYS) -> Watch:
        check_prefix(prefix)
        assert not self._closed
        watch = Watch(prefix, limit, self._unwatch)
        task = asyncio.create_task(self._follow(watch), name="discovery-watch")
        task.add_done_callback(self._ended)
        self._watches[watch] = task
        return watch

    def status(self) -> DiscoveryStatus:
        return DiscoveryStatus(
            kind=self._store.kind,
            connected=self._error is None,
            error=self._error,
            lease=self._lease,
            registered=len(self._owned),
            pending=len(self._unwritten),
            lease_losses_total=self._lease_losses_total,
            reregistered_total=self._reregistered_total,
            relists_total=self._relists_total,
            skipped_total=self._store.skipped_total,
            watches=len(self._watches),
            watch_dropped_total=sum(watch.dropped_total for watch in self._watches),
        )

    # -- what is owned --------------------------------------------------------------------

    async def _write(self, key: str) -> Outcome:
        assert self._keeper is not None and not self._closed, "not open"
        self._change += 1
        self._unwritten[key] = self._change
        self._wake.set()
        try:
            async with asyncio.timeout(WRITE_WAIT_S), self._settled:
                await self._settled.wait_for(lambda: key not in self._unwritten)
        except TimeoutError:
            return Pending(self._error or f"not written within {WRITE_WAIT_S:g} s")
        return Written()

    async def _keep(self) -> None:
        retry_s = RETRY_S
        while True:
            try:
                await self._serve()
            except LeaseLost as error:
                _log.warning(
                    "lease_lost", lease=self._lease, values=len(self._owned), why=str(error)
                )
                self._lease = None
                self._lease_losses_total += 1
                self._reregistered_total += len(self._owned)
            except DiscoveryUnavailable as error:
                if self._error != str(error):
                    _log.warning("discovery_unavailable", kind=self._store.kind, why=str(error))
                self._error = str(error)
            else:
                retry_s = RETRY_S
                continue
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_S_MAX, self._ttl_s / RENEWALS_PER_TTL)

    async def _serve(self) -> None:
        """Everything that is due now, then wait until something is."""
        if self._lease is None:
            lease = await self._store.grant(self._ttl_s)
            self._lease = lease
            self._renewed_s = time.monotonic()
            for key in self._owned:
                self._unwritten.setdefault(key, 0)
            _log.info("lease_granted", kind=self._store.kind, lease=lease)
        elif self._due_s() <= 0 or self._error:
            asked_s = time.monotonic()
            await self._store.renew(self._lease)
            self._renewed_s = asked_s
        self._wake.clear()
        for key in list(self._unwritten):
            await self._write_one(self._lease, key)
            if self._due_s() <= 0:
                return  # many writes must not cost the lease
        self._error = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(self._due_s(), 0)):
                await self._wake.wait()

    def _due_s(self) -> float:
        """Seconds until the lease is to be renewed."""
        return self._renewed_s + self._ttl_s / RENEWALS_PER_TTL - time.monotonic()

    async def _write_one(self, lease: str, key: str) -> None:
        change = self._unwritten[key]
        value = self._owned.get(key)
        if value is None:
            await self._store.delete(lease, key)
        else:
            await self._store.put(lease, key, value)
        if self._unwritten[key] == change:
            del self._unwritten[key]
            async with self._settled:
                self._settled.notify_all()

    # -- what is watched ------------------------------------------------------------------

    async def _follow(self, watch: Watch) -> None:
        retry_s = RETRY_S
        while True:
            why = "the watch ended"
            try:
                async with aclosing(self._store.watch(watch.prefix)) as changes:
                    async for change in changes:
                        retry_s = RETRY_S
                        _tell(watch, change)
                        if watch.is_starved and not isinstance(change, Snapshot):
                            why = "there is room for what was dropped"
                            break
            except DiscoveryUnavailable as error:
                why = str(error)
            self._relists_total += 1
            _log.info("watch_begins_anew", prefix=watch.prefix, why=why)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_S_MAX)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Tasks end by being cancelled; one that failed must show."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = f"{task.get_name()} failed: {error!r}"
            _log.error("discovery_task_failed", task=task.get_name(), why=repr(error))

    def _unwatch(self, watch: Watch) -> None:
        task = self._watches.pop(watch, None)
        if task is not None:
            task.cancel()


def _tell(watch: Watch, change: Snapshot | Put | Deleted) -> None:
    match change:
        case Snapshot(values):
            watch.replace(values)
        case Put(key, value):
            watch.change(key, value)
        case Deleted(key):
            watch.change(key, None)
        case _:
            assert_never(change)
