"""G4: what the S3 tier writes and reads, against bare boto3 moving the same bytes as large objects.

Ours packs chunks, checksums every record and verifies what it reads; the limit puts and gets whole
objects of the same size on as many threads, and looks at nothing. Both talk in turns to one real S3
server on this machine.

    python -m benchmarks.objects [--megabytes 128] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from pathlib import Path

from benchmarks.ssd import key_of
from kvbm.cli.figures import Row, compared, tell
from kvbm.onboard import BATCH_BYTES, BATCH_CHUNKS
from runtime.embedded import EmbeddedS3
from storage_tiers.base import Chunk, Key, Loaded, LoadItem, SilentListener, Stored, StoreItem
from storage_tiers.bucket import S3Bucket
from storage_tiers.codec import checksum
from storage_tiers.s3 import S3Tier

SIZES_BYTES = (256 << 10, 1 << 20, 4 << 20)
OBJECT_BYTES = 16 << 20
AT_ONCE = 4  # objects, as the daemon's lane gives them
TARGET = 0.80
BUCKET = "objects"


class Sides:
    """The tier and the bare client, with the same bytes."""

    def __init__(self, server: EmbeddedS3, size: int, total: int) -> None:
        self._size = size
        self._data = [memoryview(bytearray(os.urandom(size))) for _ in range(total // size)]
        self._targets = [memoryview(bytearray(size)) for _ in self._data]
        self._bodies = [os.urandom(OBJECT_BYTES) for _ in range(total // OBJECT_BYTES)]
        self._server = server
        self._numbers = itertools.count()
        self.bare = self._bucket()
        self.tier = S3Tier(
            self._bucket(),
            1 << 40,
            SilentListener(),
            node="bench",
            prefix=f"tier-{size}",
            object_bytes=OBJECT_BYTES,
        )
        self._keys: list[Key] = []
        self._names: list[str] = []

    async def write(self) -> None:
        number = next(self._numbers)
        self._keys = [key_of(number, i) for i, _ in self._all()]
        items = [
            StoreItem(
                Chunk(key, self._size, checksum(data), self._keys[i - 1] if i else None, i), data
            )
            for key, (i, data) in zip(self._keys, self._all(), strict=True)
        ]
        step = AT_ONCE * OBJECT_BYTES // self._size
        for at in range(0, len(items), step):
            outcomes = await self.tier.store(items[at : at + step])
            assert all(isinstance(outcome, Stored) for outcome in outcomes), outcomes

    async def read(self) -> None:
        wanted = [LoadItem(k, t) for k, t in zip(self._keys, self._targets, strict=True)]
        step = min(BATCH_CHUNKS, BATCH_BYTES // self._size)
        batches = [wanted[at : at + step] for at in range(0, len(wanted), step)]

        async def worker() -> None:
            while batches:
                for outcome in await self.tier.load(batches.pop(0)):
                    assert isinstance(outcome, Loaded), outcome

        await asyncio.gather(worker(), worker())  # as the onboarder does

    async def bare_write(self) -> None:
        number = next(self._numbers)
        self._names = [f"bare-{self._size}/{number}/{i}" for i, _ in enumerate(self._bodies)]
        pairs = list(zip(self._names, self._bodies, strict=True))
        for at in range(0, len(pairs), AT_ONCE):
            part = pairs[at : at + AT_ONCE]
            await asyncio.gather(*(self.bare.put(name, bytearray(body)) for name, body in part))

    async def bare_read(self) -> None:
        async def get(name: str) -> None:
            await self.bare.get_range(name, 0, OBJECT_BYTES)

        for at in range(0, len(self._names), AT_ONCE):
            await asyncio.gather(*(get(name) for name in self._names[at : at + AT_ONCE]))

    def _all(self) -> list[tuple[int, memoryview]]:
        return list(enumerate(self._data))

    def _bucket(self) -> S3Bucket:
        return S3Bucket(
            BUCKET,
            endpoint_url=self._server.endpoint_url,
            region=self._server.region,
            addressing_style="path",
            access_key_id=self._server.access_key_id,
            secret_access_key=self._server.secret_access_key,
        )


async def measure(server: EmbeddedS3, size: int, total: int, rounds: int) -> list[Row]:
    sides = Sides(server, size, total)
    await sides.bare.open()
    await sides.tier.open()
    rates: dict[str, list[float]] = {}
    ours = [("write", sides.write), ("read", sides.read)]
    limit = [("bare write", sides.bare_write), ("bare read", sides.bare_read)]
    for round_ in range(rounds + 1):
        for name, call in [*limit, *ours] if round_ % 2 else [*ours, *limit]:
            began = time.perf_counter()
            await call()
            if round_:
                rates.setdefault(name, []).append(total / (time.perf_counter() - began) / 1e6)
    await sides.tier.close()
    await sides.bare.close()
    return [
        compared(
            f"G4 {name}, {size >> 10} KiB",
            "MB/s",
            rates[name],
            "boto3",
            rates[f"bare {name}"],
            TARGET,
        )
        for name in ("write", "read")
    ]


def run(megabytes: int, rounds: int) -> list[Row]:
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedS3(Path(directory), buckets=[BUCKET]) as server,
    ):
        for size in SIZES_BYTES:
            rows += asyncio.run(measure(server, size, megabytes << 20, rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=128, help="moved each way and round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tell("objects", run(arguments.megabytes, arguments.rounds))


if __name__ == "__main__":
    main()
