"""G4: chunks in any S3, shared by every node that has the bucket.

Runs of consecutive chunks share an object, so that requests are few. Names carry the keys
(`storage_tiers.objects`): a node learns of another's objects by listing what is new. Any node may
delete the oldest objects to hold capacity and age. Every record is verified on arrival: bytes,
key, and lengths. What `find` says of another node's chunk is its key and length only (checksum 0,
no parent, position 0) until it is loaded; `Loaded` has all of it. Notes lie behind an object's
records; those of objects that were found by listing come later (`storage_tiers.tails`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final, TypeVar

from storage_tiers.admission import Admission
from storage_tiers.base import (
    Chunk,
    Corrupt,
    Failed,
    Full,
    Key,
    Known,
    Loaded,
    LoadItem,
    LoadOutcome,
    Missing,
    RecoveryReport,
    RemovalReason,
    Stored,
    StoreItem,
    StoreOutcome,
    TierError,
    TierListener,
    TierName,
    TierUsage,
    tenant_of,
)
from storage_tiers.bucket import Bucket, BucketError, ObjectMissingError
from storage_tiers.budget import Budget
from storage_tiers.chunk_index import fingerprint, relative_cost
from storage_tiers.eviction import Quotas
from storage_tiers.leaves import NONE
from storage_tiers.object_index import ObjectIndex, StoredObject
from storage_tiers.objects import (
    NODE_PATTERN,
    PREFIX_LENGTH_MAX,
    BadRecord,
    ObjectName,
    build,
    group,
    parse_record,
    record_bytes,
    tail_bytes,
)
from storage_tiers.retention import Retention
from storage_tiers.settle import Gate, settled
from storage_tiers.tails import Tails

_PUTS_MAX: Final = 4
_GETS_MAX: Final = 16
_CLOSED: Final = Failed("the S3 tier is closed")

T = TypeVar("T")


class S3Tier:
    """A prefix in a bucket. One event loop calls it; `refresh` runs by itself every `refresh_s`."""

    name = TierName.S3

    def __init__(
        self,
        bucket: Bucket,
        capacity_bytes: int,
        listener: TierListener,
        *,
        node: str,
        prefix: str = "kvbm",
        object_bytes: int = 16 << 20,
        max_age_s: float | None = None,
        refresh_s: float = 10.0,
        note_reads_per_s: float = 50.0,
        timeout_s: float = 30.0,
        admission: Admission | None = None,
        put_budget: Budget | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`put_budget` is in requests that write an object, the dear ones."""
        if not NODE_PATTERN.fullmatch(node) or len(prefix) > PREFIX_LENGTH_MAX:
            raise TierError(f"node {node!r} or prefix {prefix!r} cannot be in an object's name")
        self._bucket = bucket
        self._capacity_bytes = capacity_bytes
        self._listener = listener
        self._node = node
        self._prefix = prefix.strip("/")
        self._object_bytes = object_bytes
        self._refresh_s = refresh_s
        self._clock = clock
        self._session = secrets.token_hex(4)
        self._sequence = itertools.count(1)
        self._index = ObjectIndex()
        self._requests: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._tails = Tails(
            self._index,
            self._fetch_tail,
            lambda keys, notes: listener.noted(self.name, keys, notes),
            requests=self._requests,
            errors=self._errors,
            reads_per_s=note_reads_per_s,
        )
        self._retention = Retention(
            bucket,
            self._index,
            self._prefix,
            capacity_bytes,
            clock,
            appeared=lambda keys: listener.appeared(self.name, keys),
            removed=self._tell_removed,
            found=self._tails.add,
            requests=self._requests,
            max_age_s=max_age_s,
            timeout_s=timeout_s,
        )
        self._storing: dict[Key, asyncio.Future[bool]] = {}  # keys of PUTs under way
        self._admission = admission
        self._quotas = quotas or {}
        self._put_budget = Budget() if put_budget is None else put_budget
        self._puts = asyncio.Semaphore(_PUTS_MAX)
        self._gets = asyncio.Semaphore(_GETS_MAX)
        self._gate = Gate()
        self._tasks: list[asyncio.Task[None]] = []
        self._stored_bytes = self._loaded_bytes = self._corrupt = 0
        self._evictions: Counter[str] = Counter()

    async def open(self) -> RecoveryReport:
        began = time.monotonic()
        self._worker = ThreadPoolExecutor(2, thread_name_prefix="s3-records")
        try:
            await self._bucket.open()
            self._gate.shut = False
            await self._retention.discover()
            await self._retention.trim()
        except BaseException as error:
            self._gate.shut = True
            self._worker.shutdown()
            await self._bucket.close()
            if isinstance(error, BucketError):
                raise TierError(f"S3 cannot be used: {error}") from error
            raise
        self._tasks = [
            asyncio.create_task(self._refresh_forever()),
            asyncio.create_task(self._tails.run()),
        ]
        return RecoveryReport(
            self.name,
            chunks=len(self._index),
            bytes=self._index.used_bytes,
            seconds=time.monotonic() - began,
        )

    async def close(self) -> None:
        if self._gate.shut:
            return
        self._gate.shut = True
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._gate.close()
        await self._bucket.close()
        self._worker.shutdown()

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        return [self._index.chunk(key) for key in keys]

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        if self._gate.shut:
            return [_CLOSED] * len(items)
        with self._gate:
            return await self._store(items)

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        if self._gate.shut:
            return [_CLOSED] * len(items)
        with self._gate:
            return await self._load(items)

    async def remove(self, keys: Sequence[Key]) -> None:
        """Forget keys on this node; an object goes when none of its keys is wanted any more."""
        if self._gate.shut:
            return
        gone: list[Key] = []
        empty: list[str] = []
        for key in keys:
            for stored in self._index.holders(key):
                if self._index.ignore(stored, key):
                    gone.append(key)
                if len(stored.ignored) == len(stored.chunks) and stored.pins == 0:
                    empty.append(stored.name)
        self._tell_removed(gone, RemovalReason.REQUESTED)
        with self._gate:
            try:
                await self._retention.delete(empty, RemovalReason.REQUESTED)
            except BucketError:
                self._errors["delete"] += 1

    def refusal(self, chunk: Chunk) -> str | None:
        if self._put_budget.left <= 0:
            return "budget"
        tag = tenant_of(chunk.key)
        quota = self._quotas.get(tag)
        if quota is not None and self._index.tenant_bytes[tag] >= quota:
            return "quota"  # age makes room again, whose objects these are
        if self._admission is None:
            return None
        admitted = self._admission.admits(
            fingerprint(chunk.key),
            self._clock(),
            parent=NONE,
            cost_s=relative_cost(chunk),
            size_bytes=chunk.length,
            full=False,
        )
        return None if admitted else "admission"

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        """Marks nothing: objects go by age, whatever was used."""
        return [key for key in keys if self._index.holder(key) is None]

    async def refresh(self) -> None:
        """Learn what other nodes stored and deleted, and hold capacity and age."""
        if self._gate.shut:
            return
        with self._gate:
            try:
                await self._retention.discover()
                await self._retention.trim()
            except BucketError:
                self._errors["refresh"] += 1

    def usage(self) -> TierUsage:
        return TierUsage(
            tier=self.name,
            mover=self._bucket.mover,
            capacity_bytes=self._capacity_bytes,
            used_bytes=self._index.used_bytes,
            chunks=len(self._index),
            stored_bytes_total=self._stored_bytes,
            loaded_bytes_total=self._loaded_bytes,
            evictions_total=dict(self._evictions),
            corrupt_total=self._corrupt,
            errors_total=dict(self._errors),
            requests_total=dict(self._requests),
        )

    def check_integrity(self) -> None:
        self._index.check_integrity()
        assert self._retention.reserved_bytes >= 0

    # -- store ---------------------------------------------------------------------------

    async def _store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        outcomes: dict[Key, StoreOutcome] = {}
        awaited: dict[Key, asyncio.Future[bool]] = {}
        fresh: list[StoreItem] = []
        for item in items:
            key = item.chunk.key
            if self._index.holder(key) is not None:
                outcomes[key] = Known()
            elif key in self._storing:
                awaited[key] = self._storing[key]
            else:
                self._storing[key] = asyncio.get_running_loop().create_future()
                fresh.append(item)
        groups = group(fresh, self._object_bytes)
        try:
            async with asyncio.TaskGroup() as tasks:
                putting = [tasks.create_task(self._store_group(run)) for run in groups]
        finally:
            for item in fresh:
                key = item.chunk.key
                self._storing.pop(key).set_result(self._index.holder(key) is not None)
        for run, outcome in zip(groups, putting, strict=True):
            outcomes.update((item.chunk.key, outcome.result()) for item in run)
        first = {item.chunk.key: index for index, item in reversed(list(enumerate(items)))}
        for key, done in awaited.items():
            if key not in outcomes:
                there = await asyncio.shield(done)
                outcomes[key] = Known() if there else Failed("another store of it failed")
        return [
            Known()
            if first[item.chunk.key] != index and isinstance(outcomes[item.chunk.key], Stored)
            else outcomes[item.chunk.key]
            for index, item in enumerate(items)
        ]

    async def _store_group(self, run: Sequence[StoreItem]) -> StoreOutcome:
        chunks = [item.chunk for item in run]
        size = record_bytes(chunks[0].length) * len(run) + tail_bytes(chunks)
        async with self._puts:
            try:
                if not await self._retention.reserve(size):
                    return Full("no object can be deleted to make room for this one")
            except BucketError as error:
                self._errors["delete"] += 1
                return Failed(str(error))
            try:
                body = await settled(self._in_thread(build, run))
                parts = self._new_name(run)
                name = parts.encode(self._prefix)
                self._put_budget.spend(1)
                self._requests["put"] += 1
                await self._retention.within(self._bucket.put(name, body))
                self._index.add(name, parts, chunks)
            except BucketError as error:
                self._errors["store"] += 1
                return Failed(str(error))
            finally:
                self._retention.reserved_bytes -= size
        self._stored_bytes += sum(item.chunk.length for item in run)
        return Stored()

    def _new_name(self, run: Sequence[StoreItem]) -> ObjectName:
        return ObjectName(
            created_ms=int(self._clock() * 1000),
            node=self._node,
            sequence=f"{self._session}{next(self._sequence):06x}",
            length=run[0].chunk.length,
            keys=tuple(item.chunk.key for item in run),
            tail_bytes=tail_bytes([item.chunk for item in run]),
        )

    # -- load ----------------------------------------------------------------------------

    async def _load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        outcomes: list[LoadOutcome] = [Missing()] * len(items)
        wanted: dict[StoredObject, dict[int, list[int]]] = {}  # record -> indexes of its items
        for index, item in enumerate(items):
            stored = self._index.holder(item.key)
            if stored is not None:
                record = stored.index_of(item.key)
                assert len(item.into) >= stored.chunks[record].length, "the buffer is long enough"
                wanted.setdefault(stored, {}).setdefault(record, []).append(index)
        for stored in wanted:
            stored.pins += 1
        try:
            async with asyncio.TaskGroup() as tasks:
                for stored, records in wanted.items():
                    for first, count in _runs(sorted(records)):
                        tasks.create_task(
                            self._load_run(stored, first, count, records, items, outcomes)
                        )
        finally:
            for stored in wanted:
                stored.pins -= 1
        return outcomes

    async def _load_run(
        self,
        stored: StoredObject,
        first: int,
        count: int,
        records: dict[int, list[int]],
        items: Sequence[LoadItem],
        outcomes: list[LoadOutcome],
    ) -> None:
        """One range of neighbouring records: fetch, verify, hand out.

        With the last record comes the tail behind it, where it is not known yet.
        """
        size = record_bytes(stored.chunks[first].length)
        run = range(first, first + count)
        is_last = run.stop == len(stored.chunks)
        tail = stored.tail_bytes if is_last and not stored.is_tail_read else 0
        try:
            async with self._gets:
                self._requests["get"] += 1
                data = await self._retention.within(
                    self._bucket.get_range(stored.name, first * size, count * size + tail)
                )
        except ObjectMissingError:
            self._tell_removed(self._index.drop(stored.name), RemovalReason.REQUESTED)
            return
        except BucketError as error:
            self._errors["load"] += 1
            for record in run:
                for index in records[record]:
                    outcomes[index] = Failed(str(error))
            return

        def hand_out() -> list[Chunk | BadRecord]:
            view = memoryview(data)
            found: list[Chunk | BadRecord] = []
            for record in run:
                at = (record - first) * size
                chunk = parse_record(view[at : at + size], stored.chunks[record].key)
                found.append(chunk)
                if isinstance(chunk, Chunk):
                    for index in records[record]:
                        items[index].into[: chunk.length] = view[at : at + chunk.length]
            return found

        parsed = await settled(self._in_thread(hand_out))
        notes = self._tails.take(stored, bytes(data[-tail:])) if tail else []
        for record, chunk in zip(run, parsed, strict=True):
            outcome = self._judge(stored, record, chunk)
            if notes and isinstance(outcome, Loaded):
                outcome = Loaded(replace(outcome.chunk, note=notes[record]))
            for index in records[record]:
                outcomes[index] = outcome

    async def _fetch_tail(self, stored: StoredObject) -> bytes | bytearray:
        async with self._gets:
            return await self._retention.within(
                self._bucket.get_range(stored.name, stored.tail_at, stored.tail_bytes)
            )

    def _judge(self, stored: StoredObject, record: int, chunk: Chunk | BadRecord) -> LoadOutcome:
        if isinstance(chunk, Chunk) and chunk.length == stored.chunks[record].length:
            stored.chunks[record] = chunk
            self._loaded_bytes += chunk.length
            return Loaded(chunk)
        self._corrupt += 1
        key = stored.chunks[record].key
        if self._index.ignore(stored, key):
            self._tell_removed([key], RemovalReason.CORRUPT)
        return Corrupt(chunk.reason if isinstance(chunk, BadRecord) else "the length differs")

    def _tell_removed(self, keys: Sequence[Key], reason: RemovalReason) -> None:
        if keys:
            self._evictions[reason.value] += len(keys)
            self._listener.removed(self.name, keys, reason)

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            await self.refresh()

    # -- below ---------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)


def _runs(records: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, count) of neighbours."""
    runs: list[tuple[int, int]] = []
    for record in records:
        if runs and record == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((record, 1))
    return runs
