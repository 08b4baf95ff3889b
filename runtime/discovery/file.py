"""Discovery in a directory: for the programs of one machine, or of a shared file system.

    DIRECTORY/lock                     held while something is changed, never for long
    DIRECTORY/leases/ID                modified with each renewal; holds its time to live
    DIRECTORY/values/v1/instances/..../=ID    one value: a header with lease and checksum, the bytes

Files appear whole, by renaming. A process that is killed leaves its lease to run out: watchers
see its values go, and whoever renews next sweeps the files away. A watcher looks at the directory
at a fixed pace. What nobody of ours wrote is skipped, counted and logged once, never touched.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import structlog

from runtime.discovery.base import Deleted, DiscoveryUnavailable, Put, ValueRefused, check_key
from runtime.discovery.liveness import Liveness
from runtime.discovery.records import (
    LEASE_BYTES_MAX,
    VALUE_FILE_BYTES_MAX,
    RecordBroken,
    decode_lease,
    decode_value,
    encode_lease,
    encode_value,
)
from runtime.discovery.store import LeaseLost, Snapshot, changes

OPERATION_TIMEOUT_S: Final = 5.0
LOCK_TIMEOUT_S: Final = 2.0
SWEEP_TTLS: Final = 2.0  # dead leases are swept after this many times their life
TEMPORARY_S_MAX: Final = 60.0
SKIPPED_KNOWN_MAX: Final = 1024
_LOCK_POLL_S: Final = 0.005
_LEAF: Final = "="  # before the last segment: no segment has it, so `a` and `a/b` can both be
_TEMPORARY: Final = "."

_log = structlog.get_logger()
T = TypeVar("T")
Signature = tuple[int, int, int]


class _Locked(DiscoveryUnavailable):
    """Another process is changing something."""


@dataclass(frozen=True, slots=True)
class _Known:
    signature: Signature
    lease: str
    value: bytes


def default_directory(uid: int) -> Path:
    run = Path(f"/run/user/{uid}")
    base = run / "kvbm" if run.is_dir() else Path(f"/tmp/kvbm-{uid}")  # noqa: S108 (checked, 0700)
    return base / "discovery"


class FileStore:
    kind = "file"

    def __init__(self, directory: Path, poll_s: float) -> None:
        self.skipped_total = 0
        self._directory = directory
        self._leases = directory / "leases"
        self._values = directory / "values"
        self._poll_s = poll_s
        self._ttl_s = LOCK_TIMEOUT_S
        self._known: dict[str, _Known] = {}
        self._liveness = Liveness()
        self._skipped: dict[str, Signature] = {}
        # One thread: what is above is touched by it alone.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="discovery-file")

    async def grant(self, ttl_s: float) -> str:
        lease = secrets.token_hex(8)
        self._ttl_s = ttl_s
        await self._call(lambda: self._grant(lease, ttl_s))
        return lease

    async def renew(self, lease: str) -> None:
        await self._call(lambda: self._renew(lease))

    async def revoke(self, lease: str) -> None:
        await self._change(lambda: self._revoke(lease))

    async def put(self, lease: str, key: str, value: bytes) -> None:
        await self._change(lambda: self._put(lease, key, value))

    async def delete(self, lease: str, key: str) -> None:
        await self._change(lambda: self._delete(lease, key))

    async def list(self, prefix: str) -> dict[str, bytes]:
        return await self._call(lambda: self._scan(prefix))

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot | Put | Deleted]:
        told: dict[str, bytes] | None = None
        while True:
            values = await self.list(prefix)
            for change in changes(told, values):
                yield change
            told = values
            await asyncio.sleep(self._poll_s)

    async def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _change(self, work: Callable[[], None]) -> None:
        """Work under the lock, tried again for a while: the thread must not wait for it, and
        the lease must not run out over it."""
        end_s = time.monotonic() + min(LOCK_TIMEOUT_S, self._ttl_s / 4)
        while True:
            try:
                return await self._call(work)
            except _Locked:
                if time.monotonic() > end_s:
                    raise
            await asyncio.sleep(_LOCK_POLL_S)

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except TimeoutError as error:
            why = f"{self._directory} did not answer within {OPERATION_TIMEOUT_S:g} s"
            raise DiscoveryUnavailable(why) from error
        except OSError as error:
            raise DiscoveryUnavailable(f"{self._directory}: {error.strerror or error}") from error

    # -- in the thread --------------------------------------------------------------------

    def _grant(self, lease: str, ttl_s: float) -> None:
        self._prepare()
        _write(self._leases / lease, encode_lease(ttl_s))

    def _prepare(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_owner()
        self._leases.mkdir(exist_ok=True)
        self._values.mkdir(exist_ok=True)

    def _check_owner(self) -> None:
        info = self._directory.stat()
        if info.st_uid != os.getuid() or info.st_mode & 0o022:
            raise DiscoveryUnavailable(
                f"{self._directory} must belong to user {os.getuid()} and be writable by nobody "
                f"else; it belongs to {info.st_uid}, mode {info.st_mode & 0o777:o}"
            )

    def _renew(self, lease: str) -> None:
        path = self._leases / lease
        try:
            age_s = _age_s(path)
            ttl_s = decode_lease(_read(path, LEASE_BYTES_MAX))
            if age_s > ttl_s:
                # Watchers may have told of its end: begin anew rather than come back to life.
                with suppress(_Locked):
                    self._revoke(lease)
                raise LeaseLost(f"the lease {lease} was not renewed for {age_s:.1f} s")
            os.utime(path)
        except (FileNotFoundError, RecordBroken) as error:
            raise LeaseLost(f"the lease {lease} is not there any more") from error
        self._sweep()

    def _revoke(self, lease: str) -> None:
        with self._locked():
            self._drop({lease})

    def _put(self, lease: str, key: str, value: bytes) -> None:
        with self._locked():
            if not (self._leases / lease).exists():
                raise LeaseLost(f"the lease {lease} is not there any more")
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, encode_value(lease, value))

    def _delete(self, lease: str, key: str) -> None:
        path = self._path(key)
        with self._locked(), suppress(FileNotFoundError, RecordBroken):
            if decode_value(_read(path, VALUE_FILE_BYTES_MAX))[0] == lease:
                path.unlink()

    def _path(self, key: str) -> Path:
        *levels, last = key.split("/")
        return self._values.joinpath(*levels, f"{_LEAF}{last}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _Locked(f"{self._directory}/lock is held by another") from error
            yield
        finally:
            os.close(handle)

    # -- reading --------------------------------------------------------------------------

    def _scan(self, prefix: str) -> dict[str, bytes]:
        with suppress(FileNotFoundError):  # nobody registered anything yet
            self._check_owner()
        alive = self._living()
        found: dict[str, _Known] = {}
        for key, entry in self._entries(prefix):
            known = self._load(key, entry)
            if known is not None:
                found[key] = known
        for key in [key for key in self._known if key.startswith(prefix)]:
            if key not in found:
                del self._known[key]
        self._known |= found
        return {key: known.value for key, known in sorted(found.items()) if known.lease in alive}

    def _entries(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        waiting = [prefix]
        while waiting:
            level = waiting.pop()
            try:
                entries = list(os.scandir(self._values / level))
            except FileNotFoundError:
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{level}{entry.name}/")
                elif entry.name.startswith(_LEAF):
                    yield f"{level}{entry.name.removeprefix(_LEAF)}", entry
                elif not entry.name.startswith(_TEMPORARY):
                    self._skip(Path(entry.path), "nothing that discovery writes")

    def _load(self, key: str, entry: os.DirEntry[str]) -> _Known | None:
        path = Path(entry.path)
        try:
            signature = _signature(entry.stat(follow_symlinks=False))
            known = self._known.get(key)
            if known is not None and known.signature == signature:
                return known
            if not entry.is_file(follow_symlinks=False):
                raise RecordBroken("not a plain file")
            check_key(key)
            return _Known(signature, *decode_value(_read(path, VALUE_FILE_BYTES_MAX)))
        except FileNotFoundError:
            return None
        except (RecordBroken, ValueRefused) as error:
            self._skip(path, str(error))
            return None

    def _living(self) -> set[str]:
        return {lease for lease, silence_s, ttl_s in self._all_leases() if silence_s <= ttl_s}

    def _all_leases(self) -> Iterator[tuple[str, float, float]]:
        """Name, time since it moved and time to live of each."""
        seen: set[str] = set()
        with suppress(FileNotFoundError):
            for entry in list(os.scandir(self._leases)):
                if entry.name.startswith(_TEMPORARY):
                    continue
                try:
                    info = entry.stat(follow_symlinks=False)
                    ttl_s = decode_lease(_read(Path(entry.path), LEASE_BYTES_MAX))
                except FileNotFoundError:
                    continue
                except RecordBroken as error:
                    self._skip(Path(entry.path), str(error))
                    continue
                seen.add(entry.name)
                age_s = time.time() - info.st_mtime
                silence_s = self._liveness.silence_s(entry.name, info.st_mtime_ns, age_s)
                yield entry.name, silence_s, ttl_s
        self._liveness.keep(seen)

    def _skip(self, path: Path, why: str) -> None:
        try:
            signature = _signature(path.lstat())
        except FileNotFoundError:
            return
        if self._skipped.get(str(path)) == signature:
            return
        if len(self._skipped) >= SKIPPED_KNOWN_MAX:
            self._skipped.clear()
        self._skipped[str(path)] = signature
        self.skipped_total += 1
        _log.warning("discovery_file_skipped", file=str(path), why=why)

    # -- what the dead left ---------------------------------------------------------------

    def _sweep(self) -> None:
        dead = {
            lease
            for lease, silence_s, ttl_s in self._all_leases()
            if silence_s > SWEEP_TTLS * ttl_s
        }
        if dead:
            with suppress(_Locked), self._locked():  # else with the next renewal
                self._drop(dead)

    def _drop(self, leases: set[str]) -> None:
        """Leases first: whoever still renews one of them finds out and begins anew."""
        for lease in leases:
            (self._leases / lease).unlink(missing_ok=True)
        for folder, _, names in os.walk(self._values):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError, RecordBroken):
                    if name.startswith(_LEAF):
                        if decode_value(_read(path, VALUE_FILE_BYTES_MAX))[0] in leases:
                            path.unlink()
                    elif name.startswith(_TEMPORARY) and _age_s(path) > TEMPORARY_S_MAX:
                        path.unlink()


def _signature(info: os.stat_result) -> Signature:
    return info.st_mtime_ns, info.st_size, info.st_ino


def _age_s(path: Path) -> float:
    return time.time() - path.lstat().st_mtime


def _read(path: Path, bytes_max: int) -> bytes:
    """Raises RecordBroken for what is no plain file, and for one that is too long."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordBroken(f"cannot be read: {error.strerror}") from error
    with os.fdopen(handle, "rb") as file:
        try:
            content = file.read(bytes_max + 1)
        except OSError as error:
            raise RecordBroken(f"cannot be read: {error.strerror}") from error
    if len(content) > bytes_max:
        raise RecordBroken(f"longer than {bytes_max} bytes")
    return content


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
