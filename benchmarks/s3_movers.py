"""What should move S3 objects: NIXL's OBJ plugin or boto3 on threads?

Starts a real S3 server on this machine, writes and reads objects with both as the S3 tier would (a
private buffer for each range, many ranges at a time), and prints one JSON line. That the tier uses
boto3 alone rests on it: NIXL was not faster for certain, does not tell a missing object from an
outage, and cannot renew short-lived credentials.

    python -m benchmarks.s3_movers [--megabytes 32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from runtime.embedded import EmbeddedS3
from storage_tiers.bucket import S3Bucket
from storage_tiers.files import Moved
from storage_tiers.nixl import AgentOwner, Target, availability

SIZES_BYTES = (256 << 10, 1 << 20, 4 << 20)
READ_TARGET = 0.67  # below it NIXL's reads would be worth their place
NIXL_THREADS = 8


class NixlObjects:
    """Objects through the OBJ plugin."""

    def __init__(self, bucket: str, server: EmbeddedS3) -> None:
        options = {
            "access_key": server.access_key_id,
            "secret_key": server.secret_access_key,
            "bucket": bucket,
            "endpoint_override": server.endpoint_url,
            "scheme": "http",
            "region": server.region,
            "use_virtual_addressing": "false",
            "num_threads": str(NIXL_THREADS),
        }
        self._owner = AgentOwner("OBJ", options)
        self._devices = itertools.count(1)

    async def put(self, name: str, body: bytearray) -> None:
        target = Target("OBJ", next(self._devices), len(body), name)
        outcome = await self._owner.move(memoryview(body), target, 0, write=True)
        assert isinstance(outcome, Moved), outcome

    async def get_range(self, name: str, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        target = Target("OBJ", next(self._devices), offset + length, name)
        outcome = await self._owner.move(memoryview(data), target, offset, write=False)
        assert isinstance(outcome, Moved), outcome
        return data

    def close(self) -> None:
        self._owner.close()


async def rate(count: int, size_bytes: int, call: Callable[[int], Awaitable[object]]) -> float:
    """MB/s of `count` calls at once."""
    began = time.perf_counter()
    await asyncio.gather(*(call(index) for index in range(count)))
    return count * size_bytes / (time.perf_counter() - began) / 1e6


async def measure(
    plain: S3Bucket, nixl: NixlObjects, size_bytes: int, total_bytes: int, rounds: int
) -> list[dict[str, object]]:
    count = max(total_bytes // size_bytes, 1)
    bodies = [bytearray(os.urandom(size_bytes)) for _ in range(count)]
    rates: dict[str, list[float]] = {}

    def put(way: S3Bucket | NixlObjects, label: str) -> Callable[[int], Awaitable[object]]:
        return lambda i: way.put(f"{size_bytes}/{label}/{i}", bodies[i])

    def get(way: S3Bucket | NixlObjects) -> Callable[[int], Awaitable[object]]:
        return lambda i: way.get_range(f"{size_bytes}/boto3/{i}", 0, size_bytes)

    ways: list[tuple[str, Callable[[int], Awaitable[object]]]] = [
        ("put/boto3", put(plain, "boto3")),
        ("put/nixl", put(nixl, "nixl")),
        ("get/boto3", get(plain)),
        ("get/nixl", get(nixl)),
    ]
    for round_ in range(rounds + 1):
        # The first round warms connections; the order turns, so that neither is always second.
        for name, call in ways if round_ % 2 else [ways[1], ways[0], ways[3], ways[2]]:
            if round_ == 0 and name == "get/nixl":
                continue  # its objects are being written in this round
            measured = await rate(count, size_bytes, call)
            if round_:
                rates.setdefault(name, []).append(measured)
    arrived = await nixl.get_range(f"{size_bytes}/nixl/0", 0, size_bytes)
    assert arrived == bodies[0], "what NIXL wrote and read is not what was given"
    return [
        _row(
            f"{operation} {size_bytes >> 10} KiB",
            rates[f"{operation}/boto3"],
            rates[f"{operation}/nixl"],
        )
        for operation in ("put", "get")
    ]


def _row(name: str, boto3: list[float], nixl: list[float]) -> dict[str, object]:
    ratio = statistics.median(boto3) / statistics.median(nixl)
    target = READ_TARGET if name.startswith("get") else None
    return {
        "name": f"boto3 {name}",
        "value": round(statistics.median(boto3), 1),
        "min": round(min(boto3), 1),
        "max": round(max(boto3), 1),
        "unit": "MB/s",
        "against": "NIXL OBJ",
        "against_value": round(statistics.median(nixl), 1),
        "against_min": round(min(nixl), 1),
        "against_max": round(max(nixl), 1),
        "ratio": round(ratio, 2),
        "target": target,
        "ok": target is None or ratio >= target,
    }


async def run(total_bytes: int, rounds: int) -> list[dict[str, object]]:
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedS3(Path(directory), buckets=["movers"]) as server,
    ):
        plain = S3Bucket(
            "movers",
            endpoint_url=server.endpoint_url,
            region=server.region,
            addressing_style="path",
            access_key_id=server.access_key_id,
            secret_access_key=server.secret_access_key,
        )
        await plain.open()
        nixl = NixlObjects("movers", server)
        results: list[dict[str, object]] = []
        for size_bytes in SIZES_BYTES:
            results += await measure(plain, nixl, size_bytes, total_bytes, rounds)
        nixl.close()
        await plain.close()
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=32, help="moved each way and round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    trouble = availability("OBJ")
    if trouble is not None:
        print(f"nothing to compare: {trouble}", file=sys.stderr)
        print(json.dumps({"benchmark": "s3_movers", "results": []}))
        return
    results = asyncio.run(run(arguments.megabytes << 20, arguments.rounds))
    print(json.dumps({"benchmark": "s3_movers", "results": results}))


if __name__ == "__main__":
    main()
