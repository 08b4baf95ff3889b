"""G3: what the SSD tier writes and reads, against a bare O_DIRECT loop on the same disk.

Ours is durable and verified: data, sync, catalogue, checksums. The limit writes the same sizes
with as many in flight (threads, positioned I/O, one fdatasync at the end) and checks nothing.

    python -m benchmarks.ssd [--folder build] [--megabytes 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import tempfile
import time
from pathlib import Path

from kvbm.cli.figures import Row, compared, tell
from kvbm.cli.limits import BareFile, aligned
from kvbm.onboard import BATCH_BYTES as LOAD_BYTES
from kvbm.onboard import BATCH_CHUNKS, WORKERS_PER_TIER
from storage_tiers.base import (
    KEY_BYTES,
    Chunk,
    Key,
    Loaded,
    LoadItem,
    SilentListener,
    Stored,
    StoreItem,
)
from storage_tiers.codec import checksum
from storage_tiers.ssd import STORES_AT_ONCE, SsdTier

SIZES_BYTES = (256 << 10, 1 << 20, 4 << 20)
IN_FLIGHT = 8
BATCH_BYTES = 32 << 20  # as `offload.batch_bytes`
TARGET = 0.85
NOTE = bytes(24 + 8 * 16)  # what an engine says of a chunk of 16 blocks


class Ours:
    """The SSD tier, stored to and loaded from as the offloader and the onboarder do it."""

    def __init__(self, folder: Path, size: int, count: int) -> None:
        self._size = size
        self.tier = SsdTier(folder, 2 * count * size + (64 << 20), SilentListener())
        self.sources, self.targets = aligned(count, size), aligned(count, size)
        self._sums = [checksum(source) for source in self.sources]
        self._rounds = itertools.count(1)
        self._items: list[StoreItem] = []

    async def write(self) -> float:
        """Seconds to store chunks it does not know."""
        number = next(self._rounds)
        self._items = [
            StoreItem(Chunk(key_of(number, i), self._size, self._sums[i], None, i, NOTE), source)
            for i, source in enumerate(self.sources)
        ]
        step = BATCH_BYTES // self._size
        parts = [self._items[at : at + step] for at in range(0, len(self._items), step)]

        async def writer() -> None:
            while parts:
                outcomes = await self.tier.store(parts.pop(0))
                assert all(isinstance(outcome, Stored) for outcome in outcomes), outcomes

        began = time.perf_counter()
        await asyncio.gather(*(writer() for _ in range(STORES_AT_ONCE)))
        return time.perf_counter() - began

    async def read(self) -> float:
        """Seconds to load what was stored last."""
        pairs = zip(self._items, self.targets, strict=True)
        wanted = [LoadItem(item.chunk.key, target) for item, target in pairs]
        step = min(BATCH_CHUNKS, LOAD_BYTES // self._size)
        batches = [wanted[at : at + step] for at in range(0, len(wanted), step)]

        async def worker() -> None:
            while batches:
                for outcome in await self.tier.load(batches.pop(0)):
                    assert isinstance(outcome, Loaded), outcome

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(WORKERS_PER_TIER)))
        return time.perf_counter() - began


def key_of(round_: int, index: int) -> Key:
    """As evenly distributed as real ones, which indexes rely on, and of no tenant."""
    name = f"{round_} {index}".encode()
    return Key(hashlib.blake2b(name, digest_size=KEY_BYTES - 1).digest() + b"\0")


async def measure(folder: Path, size: int, total: int, rounds: int) -> list[Row]:
    bare = BareFile(folder / "bare", total)
    ours = Ours(folder / "tier", size, total // size)
    await ours.tier.open()
    rates: dict[str, list[float]] = {}

    async def limit() -> dict[str, float]:
        return {
            "bare write": bare.write(ours.sources, size),
            "bare read": bare.read(ours.targets, size),
        }

    async def tier() -> dict[str, float]:
        return {"write": await ours.write(), "read": await ours.read()}

    for round_ in range(rounds + 1):
        for side in (limit, tier) if round_ % 2 else (tier, limit):
            for name, seconds in (await side()).items():
                if round_:
                    rates.setdefault(name, []).append(total / seconds / 1e9)
    mover = ours.tier.usage().mover
    await ours.tier.close()
    bare.close()
    label = f"{size >> 10} KiB, {mover}"
    return [
        compared(
            f"G3 {name}, {label}", "GB/s", rates[name], "O_DIRECT", rates[f"bare {name}"], TARGET
        )
        for name in ("write", "read")
    ]


def run(folder: Path, megabytes: int, rounds: int) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for size in SIZES_BYTES:
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            rows += asyncio.run(measure(Path(inside), size, megabytes << 20, rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk to measure")
    parser.add_argument("--megabytes", type=int, default=256, help="moved each way and round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tell("ssd", run(arguments.folder, arguments.megabytes, arguments.rounds))


if __name__ == "__main__":
    main()
