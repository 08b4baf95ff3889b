"""What Python itself spends on a transfer between a GPU and host memory, without a GPU.

While Python works out a copy it holds the interpreter's lock, which the engine's own thread wants.
Here `DevicePages` copies 64 MiB in blocks drawn at random on a GPU that takes every call and does
nothing, so what is measured is the processor time of one thread, all but CUDA's own calls, as a
share of what a bus of 50 GB/s takes for those bytes (the published figure to beat, one way).

    python -m benchmarks.hbm_planning [--rounds 30]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks.hbm import KIB, LAYERS_MAX, PAGE_BYTES, PIN_TIMEOUT_S
from kvbm.cli.figures import Row, bounded, tell
from storage_tiers.device_batches import Way
from storage_tiers.device_pages import DevicePages
from storage_tiers.gpu import Copies, Descriptors
from storage_tiers.hbm import CopyPlan, KvTensor

TRANSFER_BYTES = 64 << 20
BLOCKS = 4096  # of the engine
BLOCKS_PER_CHUNK = 16
BUS_BYTES_PER_S = 50e9
TARGET = 0.15  # most, for pages from
TARGET_PAGE_BYTES = 32 * KIB


class NoGpu:
    """A `Gpu` that does nothing."""

    has_kernel = True
    maps_host = True

    def stream(self) -> int:
        return 1

    def mark(self, stream: int) -> object:
        return None

    def wait(self, stream: int, mark: object) -> None:
        return

    def finish(self, mark: object) -> None:
        return

    def copy(self, stream: int, copies: Copies, *, to_host: bool, pinned: bool) -> None:
        return

    def copy_pieces(self, stream: int, pieces: Descriptors, size: int) -> None:
        return

    def descriptors(self, count: int) -> Descriptors:
        return np.empty((count, 2), dtype=np.uint64)

    def allocate(self, size: int) -> int:
        return 1 << 40

    def free(self, address: int) -> None:
        return

    def pin(self, address: int, size: int) -> None:
        return

    def unpin(self, address: int) -> None:
        return


def share(page_bytes: int, way: Way, rounds: int) -> Row:
    """Of one size of page, 32 layers; from the engine to its slots."""
    block_bytes = LAYERS_MAX * page_bytes
    blocks = max(1, TRANSFER_BYTES // block_bytes)
    layers = [
        KvTensor((2 + layer) << 40, BLOCKS, page_bytes, page_bytes) for layer in range(LAYERS_MAX)
    ]
    pages = DevicePages(
        NoGpu(), layers, [list(range(LAYERS_MAX))], engine_stream=lambda: 1, ways=(way, way)
    )
    memory = np.empty(blocks * block_bytes, dtype=np.uint8)  # never touched
    pages.attach(memory)
    pages.fence()
    assert pages._memory is not None
    pages._memory.wait(PIN_TIMEOUT_S)
    indexes = np.random.default_rng(0).permutation(BLOCKS)[:blocks].tolist()
    chunks = [slice(at, at + BLOCKS_PER_CHUNK) for at in range(0, blocks, BLOCKS_PER_CHUNK)]
    shares: list[float] = []
    for _ in range(rounds):
        began = time.thread_time()
        plans = [
            CopyPlan(0, indexes[at], 0, memory[at.start * block_bytes : at.stop * block_bytes])
            for at in chunks
        ]
        copied = pages.gather(plans, pages.fence())
        shares.append((time.thread_time() - began) / (copied / BUS_BYTES_PER_S))
    pages.close()
    target = TARGET if page_bytes >= TARGET_PAGE_BYTES else None
    return bounded(f"{way.value}, pages of {page_bytes // KIB} KiB", "of bus", shares, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    rows = [share(size, way, options.rounds) for size in PAGE_BYTES for way in Way]
    tell("hbm_planning", rows)


if __name__ == "__main__":
    main()
