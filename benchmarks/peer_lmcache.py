"""G3 against a peer: our SSD tier and LMCache's local-disk backend on the same chunks and disk.

Both get the same chunks in page-aligned memory, write them until each side says they are on the
disk, and read them back into memory of their own kind; what came is compared with what went in.
What they promise differs, and the row says only how fast: ours syncs, keeps a catalogue that
survives a crash, and verifies a checksum of every chunk it reads; LMCache's backend writes a file a
chunk, syncs nothing, keeps its index in memory and checks nothing. It is told to use O_DIRECT, as
ours does: through the page cache it would measure memory.

LMCache is no dependency. Where it is missing this says so and ends with status 0:

    pip install --no-deps lmcache==0.5.6 aiofile caio
    python -m benchmarks.peer_lmcache [--folder build] [--megabytes 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.ssd import SIZES_BYTES, Ours
from kvbm.cli.figures import Row, compared, tell

THREADS = 8  # as many of LMCache's I/O threads as chunks are in flight here
WRITE_TIMEOUT_S = 120.0


class Peer:
    """LMCache's disk backend with its memory, its event loop running in a thread."""

    def __init__(self, folder: Path, total_bytes: int, rounds: int) -> None:
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        gibibytes = total_bytes / (1 << 30)
        config = LMCacheEngineConfig.from_defaults(
            local_cpu=False,
            max_local_cpu_size=3 * gibibytes,
            local_disk=f"file://{folder}",
            # What is removed it goes on counting, and then stores nothing more.
            max_local_disk_size=(rounds + 2) * gibibytes,
            extra_config={"use_odirect": True, "disk_io_threads": THREADS},
        )
        metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.uint8,
            kv_shape=(1, 2, 256, 1, 128),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._memory = LocalCPUBackend(config, metadata)
        self._disk = LocalDiskBackend(config, self._loop, self._memory, "cpu")

    def key(self, number: int) -> Any:
        from lmcache.utils import CacheEngineKey

        return CacheEngineKey("bench", 1, 0, number, torch.uint8)

    def objects(self, sources: list[memoryview]) -> list[Any]:
        """Its memory objects, filled; outside what is timed, as ours lie in memory already."""
        from lmcache.v1.memory_management import MemoryFormat

        made = []
        for source in sources:
            shape = torch.Size([2, 1, len(source) // 2, 1])
            memory = self._memory.allocate(shape, torch.uint8, MemoryFormat.KV_2LTD)
            assert memory is not None, "LMCache has no memory left"
            _bytes_of(memory)[:] = np.asarray(source)
            made.append(memory)
        return made

    def write(self, keys: list[Any], objects: list[Any]) -> None:
        ended = threading.Semaphore(0)
        self._disk.batched_submit_put_task(
            keys, objects, on_complete_callback=lambda _: ended.release()
        )
        for _ in keys:
            assert ended.acquire(timeout=WRITE_TIMEOUT_S), "LMCache does not end its writes"

    def read(self, keys: list[Any]) -> list[Any]:
        found: list[Any] = self._disk.batched_get_blocking(keys)
        assert all(memory is not None for memory in found), "LMCache lost a chunk"
        return found

    def drop(self, keys: list[Any]) -> None:
        self._disk.batched_remove(keys)

    def close(self) -> None:
        self._disk.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes_of(memory: Any) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memory.byte_array, dtype=np.uint8)


async def measure(folder: Path, size: int, total: int, rounds: int) -> list[Row]:
    (folder / "lmcache").mkdir()
    ours = Ours(folder / "tier", size, total // size)
    await ours.tier.open()
    rates: dict[str, list[float]] = {}
    with Peer(folder / "lmcache", total, rounds) as peer:
        objects = peer.objects(ours.sources)

        async def theirs(round_: int) -> dict[str, float]:
            keys = [peer.key(round_ * len(objects) + i) for i in range(len(objects))]
            began = time.perf_counter()
            peer.write(keys, objects)
            written = time.perf_counter()
            found = peer.read(keys)
            read = time.perf_counter()
            for memory, source in zip(found, ours.sources, strict=True):
                assert np.array_equal(_bytes_of(memory), np.asarray(source))
                memory.ref_count_down()
            peer.drop(keys)
            return {"their write": written - began, "their read": read - written}

        async def tier(_: int) -> dict[str, float]:
            return {"write": await ours.write(), "read": await ours.read()}

        for round_ in range(rounds + 1):
            for side in (theirs, tier) if round_ % 2 else (tier, theirs):
                for name, seconds in (await side(round_)).items():
                    if round_:
                        rates.setdefault(name, []).append(total / seconds / 1e9)
    await ours.tier.close()
    return [
        compared(
            f"G3 {name}, {size >> 10} KiB",
            "GB/s",
            rates[name],
            "LMCache, O_DIRECT",
            rates[f"their {name}"],
        )
        for name in ("write", "read")
    ]


def run(folder: Path, megabytes: int, rounds: int) -> list[Row]:
    logging.getLogger("lmcache").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for size in SIZES_BYTES:
        with tempfile.TemporaryDirectory(dir=folder.absolute()) as inside:
            rows += asyncio.run(measure(Path(inside), size, megabytes << 20, rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk to measure")
    parser.add_argument("--megabytes", type=int, default=256, help="moved each way and round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if importlib.util.find_spec("lmcache") is None:
        print(
            "LMCache is not installed here, so there is nothing to compare with; to have it:\n"
            "  pip install --no-deps lmcache==0.5.6 aiofile caio",
            file=sys.stderr,
        )
        tell("peer_lmcache", [])
        return
    tell("peer_lmcache", run(arguments.folder, arguments.megabytes, arguments.rounds))


if __name__ == "__main__":
    main()
