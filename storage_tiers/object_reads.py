"""S3 reads through NIXL's OBJ plugin, where it loads; the rest of the bucket stays with boto3.

Range reads were 1.3 to 3 times faster than boto3's (`benchmarks/s3_movers.py`), writes about equal.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Final

from storage_tiers.bucket import Bucket, BucketError, Listed, S3Bucket
from storage_tiers.files import Moved
from storage_tiers.nixl import AgentOwner, NixlUnavailableError, Target

__all__ = ["NixlReads", "make_bucket"]

_FAILURES_MAX: Final = 3  # reads in a row before NIXL is no longer asked
_THREADS: Final = 4


class NixlReads:
    """A `Bucket` whose ranges are read by the OBJ plugin, and everything else by boto3.

    NIXL does not tell a missing object from a refusal, so boto3 repeats a read that failed and has
    the last word. Short-lived credentials stay with boto3, which renews them.
    """

    def __init__(self, plain: S3Bucket, *, required: bool = False) -> None:
        self._plain = plain
        self._required = required
        self._owner: AgentOwner | None = None
        self._failures = 0
        self._devices = itertools.count(1)

    @property
    def mover(self) -> str:
        return "nixl-obj" if self._owner is not None else self._plain.mover

    async def open(self) -> None:
        await self._plain.open()
        try:
            self._owner = await asyncio.to_thread(AgentOwner, "OBJ", _object_options(self._plain))
        except NixlUnavailableError as error:
            if self._required:
                raise BucketError(f"{error}; use mover boto3 or auto") from error

    async def put(self, name: str, body: bytearray) -> None:
        await self._plain.put(name, body)

    async def get_range(self, name: str, offset: int, length: int) -> bytes | bytearray:
        owner = self._owner
        if owner is None or self._failures >= _FAILURES_MAX:
            return await self._plain.get_range(name, offset, length)
        data = bytearray(length)
        target = Target("OBJ", next(self._devices), offset + length, name)
        outcome = await owner.move(memoryview(data), target, offset, write=False)
        if isinstance(outcome, Moved):
            self._failures = 0
            return data
        repeated = await self._plain.get_range(name, offset, length)
        self._failures += 1  # it was NIXL's alone: boto3 could read it
        return repeated

    async def list_after(self, prefix: str, after: str) -> list[Listed]:
        return await self._plain.list_after(prefix, after)

    async def delete(self, names: Sequence[str]) -> None:
        await self._plain.delete(names)

    async def close(self) -> None:
        if self._owner is not None:
            await asyncio.to_thread(self._owner.close)
        await self._plain.close()


def make_bucket(plain: S3Bucket, kind: str) -> Bucket:
    """`boto3`, `nixl` (refuses to open without it), or `auto`: NIXL reads if it loads."""
    if kind not in {"auto", "nixl", "boto3"}:
        raise BucketError(f"unknown S3 mover {kind!r}: use auto, nixl or boto3")
    return plain if kind == "boto3" else NixlReads(plain, required=kind == "nixl")


def _object_options(bucket: S3Bucket) -> dict[str, str]:
    """What the OBJ plugin wants to know; refuses what boto3 has to do."""
    found = bucket.credentials
    assert found is not None, "the bucket is open"
    if found.session_token is not None:
        raise NixlUnavailableError("the credentials are short-lived, boto3 renews them")
    virtual = bucket.addressing_style == "virtual" or (
        bucket.addressing_style == "auto" and bucket.endpoint_url is None
    )
    options = {
        "access_key": found.access_key_id,
        "secret_key": found.secret_access_key,
        "bucket": bucket.bucket,
        "region": bucket.region or "us-east-1",
        "use_virtual_addressing": str(virtual).lower(),
        "num_threads": str(_THREADS),
    }
    if bucket.endpoint_url is not None:
        options["endpoint_override"] = bucket.endpoint_url
        options["scheme"] = bucket.endpoint_url.partition(":")[0]
    return options
