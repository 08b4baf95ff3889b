"""G3: what the SSD tier writes and reads, against a bare O_DIRECT loop on the same disk.

Ours is durable and verified: data, sync, catalogue, checksums. The limit writes the same sizes
with as many in flight (threads, positioned I/O, one fdatasync at the end) and checks nothing.

    python -m benchmarks.ssd [--folder build] [--megabytes 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from kvbm.cli.figures import Row, compared, tell
from kvbm.cli.limits import BareFile, aligned
from kvbm.onboard import BATCH_BYTES as LOAD_BYTES
from kvbm.onboard import BATCH_CHUNKS
from storage_tiers.base import Chunk, Key, Loaded, LoadItem, SilentListener, Stored, StoreItem
from storage_tiers.codec import checksum
from storage_tiers.ssd import STORES_AT_ONCE, SsdTier

SIZES_BYTES = (256 << 10, 1 << 20, 4 << 20)
BATCH_BYTES = 32 << 20  # as `offload.batch_bytes`
TARGET = 0.85


def items_of(buffers: list[memoryview], round_: int) -> list[StoreItem]:
    items: list[StoreItem] = []
    for index, buffer in enumerate(buffers):
        key = Key(round_.to_bytes(8, "big") + index.to_bytes(8, "big"))
        items.append(StoreItem(Chunk(key, len(buffer), checksum(buffer), None, index), buffer))
    return items


async def measure(folder: Path, size: int, total: int, rounds: int) -> list[Row]:
    count = total // size
    bare = BareFile(folder / "bare", total)
    tier = SsdTier(folder / f"tier-{size}", 2 * total + (64 << 20), SilentListener())
    await tier.open()
    sources, targets = aligned(count, size), aligned(count, size)
    rates: dict[str, list[float]] = {"write": [], "bare write": [], "read": [], "bare read": []}

    def note(name: str, began: float, round_: int) -> None:
        if round_:
            rates[name].append(total / (time.perf_counter() - began) / 1e9)

    for round_ in range(rounds + 1):
        items = items_of(sources, round_)

        async def ours(items: list[StoreItem] = items, round_: int = round_) -> None:
            began = time.perf_counter()
            step = BATCH_BYTES // size
            parts = [items[at : at + step] for at in range(0, count, step)]

            async def writer() -> None:
                while parts:
                    outcomes = await tier.store(parts.pop(0))
                    assert all(isinstance(outcome, Stored) for outcome in outcomes), outcomes

            await asyncio.gather(*(writer() for _ in range(STORES_AT_ONCE)))  # as the offloader
            note("write", began, round_)
            began = time.perf_counter()
            wanted = [LoadItem(i.chunk.key, t) for i, t in zip(items, targets, strict=True)]
            step = min(BATCH_CHUNKS, LOAD_BYTES // size)
            batches = [wanted[at : at + step] for at in range(0, count, step)]

            async def worker() -> None:
                while batches:
                    for outcome in await tier.load(batches.pop(0)):
                        assert isinstance(outcome, Loaded), outcome

            await asyncio.gather(worker(), worker())  # as the onboarder does
            note("read", began, round_)

        def limit(round_: int = round_) -> None:
            began = time.perf_counter()
            bare.write(sources, size)
            note("bare write", began, round_)
            began = time.perf_counter()
            bare.read(targets, size)
            note("bare read", began, round_)

        if round_ % 2:
            limit()
            await ours()
        else:
            await ours()
            limit()
    mover = tier.usage().mover
    await tier.close()
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
