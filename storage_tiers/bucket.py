"""One S3 bucket: the few calls the S3 tier needs, and boto3 behind a bounded thread pool.

The one file that imports boto3. Every call has a timeout and a bounded number of attempts; what
goes wrong becomes a `BucketError` with one short sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import boto3
import botocore.config
import botocore.exceptions

LIST_MAX: Final = 1000  # S3's own page size, for listing and deleting
_CONNECT_TIMEOUT_S: Final = 5.0
_TAG_REFUSALS: Final = {
    "AccessDenied",
    "InvalidArgument",
    "InvalidRequest",
    "InvalidTag",
    "MethodNotAllowed",
    "NotImplemented",
}
_MISSING: Final = {"NoSuchKey", "404", "NotFound"}

T = TypeVar("T")


class BucketError(Exception):
    """The object store refused or could not be reached."""


class ObjectMissingError(BucketError):
    """There is no object of that name (any more)."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing."""

    name: str
    size_bytes: int


class Bucket(Protocol):
    """What a tier needs of an object store. Calls may be cancelled; none uses caller's memory."""

    @property
    def mover(self) -> str: ...

    async def open(self) -> None:
        """Connect and check that the bucket answers. Raises BucketError."""
        ...

    async def put(self, name: str, body: bytearray) -> None:
        """Store an object; `body` is the callee's from now on."""
        ...

    async def get_range(self, name: str, offset: int, length: int) -> bytes | bytearray:
        """Exactly these bytes. Raises ObjectMissingError, or BucketError if they are fewer."""
        ...

    async def list_after(self, prefix: str, after: str) -> list[Listed]:
        """Up to a page of objects whose name begins with `prefix` and sorts after `after`."""
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that do not exist are deleted already."""
        ...

    async def close(self) -> None: ...


class S3Bucket:
    """A bucket through boto3. Credentials come from the standard AWS chain unless given."""

    def __init__(
        self,
        bucket: str,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        addressing_style: str = "auto",
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        threads: int = 8,
        timeout_s: float = 20.0,
        attempts: int = 3,
    ) -> None:
        self.bucket = bucket
        self._endpoint_url = endpoint_url
        self._region = region
        self._access_key_id = access_key_id
        self._secret_access_key = secret_access_key
        self._config = botocore.config.Config(
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=timeout_s,
            retries={"total_max_attempts": attempts, "mode": "standard"},
            max_pool_connections=threads,
            s3={"addressing_style": addressing_style},
            # Every record carries its own checksum; servers other than AWS's differ in theirs.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._client: Any = None
        self._tagging = True

    @property
    def mover(self) -> str:
        return "boto3"

    async def open(self) -> None:
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="s3")

        def connect() -> None:
            session = boto3.Session(
                aws_access_key_id=self._access_key_id,
                aws_secret_access_key=self._secret_access_key,
                region_name=self._region,
            )
            if session.get_credentials() is None:
                raise BucketError(
                    "no AWS credentials were found; set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, a profile or a role"
                )
            self._client = session.client(
                "s3",
                endpoint_url=self._endpoint_url,
                region_name=session.region_name or "us-east-1",
                config=self._config,
            )
            self._client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)

        await self._run(f"opening bucket {self.bucket}", connect)

    async def put(self, name: str, body: bytearray) -> None:
        def upload() -> None:
            options = {"Bucket": self.bucket, "Key": name, "Body": body}
            if self._tagging:
                try:
                    self._client.put_object(**options, Tagging="kvbm=1")
                except botocore.exceptions.ClientError as error:
                    if _code(error) not in _TAG_REFUSALS:
                        raise
                else:
                    return
            self._client.put_object(**options)
            self._tagging = False

        await self._run("PUT", upload)

    async def get_range(self, name: str, offset: int, length: int) -> bytes | bytearray:
        def download() -> bytes:
            answer = self._client.get_object(
                Bucket=self.bucket, Key=name, Range=f"bytes={offset}-{offset + length - 1}"
            )
            # Not the body's own context: inside it is the bare stream, whose errors are urllib3's.
            with contextlib.closing(answer["Body"]) as body:
                data: bytes = body.read()
            if len(data) != length:
                raise BucketError(f"GET: {len(data)} of {length} bytes came")
            return data

        return await self._run("GET", download)

    async def list_after(self, prefix: str, after: str) -> list[Listed]:
        def page() -> list[Listed]:
            answer = self._client.list_objects_v2(
                Bucket=self.bucket, Prefix=prefix, StartAfter=after, MaxKeys=LIST_MAX
            )
            return [Listed(entry["Key"], entry["Size"]) for entry in answer.get("Contents", [])]

        return await self._run("LIST", page)

    async def delete(self, names: Sequence[str]) -> None:
        def drop() -> None:
            for start in range(0, len(names), LIST_MAX):
                objects = [{"Key": name} for name in names[start : start + LIST_MAX]]
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True}
                )
                for error in answer.get("Errors", []):
                    if error.get("Code") not in _MISSING:
                        raise BucketError(f"DELETE: {error.get('Code')}")

        if names:
            await self._run("DELETE", drop)

    async def close(self) -> None:
        """Threads still in a call end with its timeout; nobody waits for them."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    async def _run(self, what: str, call: Callable[[], T]) -> T:
        assert self._pool is not None, "open first"
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except botocore.exceptions.ClientError as error:
            if _code(error) in _MISSING:
                raise ObjectMissingError(f"{what}: no such object") from error
            message = error.response.get("Error", {}).get("Message", "")
            raise BucketError(f"{what}: {_code(error)} {message}".rstrip()) from error
        except (botocore.exceptions.BotoCoreError, OSError) as error:
            raise BucketError(f"{what}: {error}") from error


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
