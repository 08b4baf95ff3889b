"""G1 to G2 and back: what the connector's worker copies, against one contiguous memcpy.

The KV tensors lie as in vLLM's CPU build: a page per layer and block, all layers in one allocation.
A job moves 64 chunks through `KvbmWorker`, its thread and its checks included; the
limit copies as many pieces of the same size, in order, between the engine's kind of memory and the
arena's, in one C loop on one thread.

    python -m benchmarks.engine_copies [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.report import Row, compared, interleaved, tell
from kvbm.protocol import VERSION, Hello, Welcome
from storage_tiers.arena import Arena, Slot
from storage_tiers.hbm import HostPages
from storage_tiers.slabs import SlabAllocator

CHUNKS = 64
TARGET = 0.90
SHAPES = ((30, 49152), (32, 16384), (80, 8192))  # layers, bytes of a page


def measure(layers: int, page_bytes: int, rounds: int) -> list[Row]:
    from vllm.v1.kv_offload.base import GPULoadStoreSpec

    from connectors.vllm.transfer import ArenaSlots
    from connectors.vllm.worker_side import KvbmWorker

    chunk_bytes = layers * page_bytes
    random = np.random.default_rng(0)
    tensors = list(np.ones((layers, CHUNKS * 2, page_bytes), dtype=np.uint8))
    arena = Arena.create(2 * CHUNKS * (chunk_bytes + (1 << 21)))
    allocator = SlabAllocator(arena.capacity_bytes)
    offsets = [allocator.allocate(chunk_bytes) for _ in range(CHUNKS)]
    slots = [Slot(at, chunk_bytes, arena.advance(at)) for at in offsets if at is not None]
    with tempfile.TemporaryDirectory() as folder:
        worker = KvbmWorker(
            HostPages(tensors, [list(range(layers))]),
            socket_path=str(Path(folder) / "nobody"),
            hello=lambda: Hello(VERSION, "worker", "bench", 0, 1, {}, [chunk_bytes], False, 0),
            rank=0,
            blocks_per_chunk=1,
            load_deadline_s=60.0,
        )
        worker.connected(1, Welcome(VERSION, arena.epoch, 1), os.dup(arena.fd))
        job = 0

        def run(*, is_load: bool) -> float:
            nonlocal job
            job += 1
            blocks = random.permutation(CHUNKS * 2)[:CHUNKS].tolist()
            pages = GPULoadStoreSpec(blocks, [CHUNKS], [0])
            where = ArenaSlots(
                transfer=job,
                request="bench",
                epoch=arena.epoch,
                session=1,
                offsets=[slot.offset for slot in slots],
                generations=[slot.generation for slot in slots],
                groups=[0] * CHUNKS,
                lengths=[chunk_bytes],
                rank_offsets=[[0]],
            )
            began = time.perf_counter()
            if is_load:
                worker.submit_load(job, where, pages)
            else:
                worker.submit_store(job, pages, where)
            worker.wait({job})
            seconds = time.perf_counter() - began
            assert not worker.take_failed()[0] and worker.get_finished()
            return CHUNKS * chunk_bytes / seconds / 1e9

        # Rows apart by a cache line, so that NumPy copies each with a memcpy of its own.
        rows = CHUNKS * layers
        engine = np.ones((rows, page_bytes + 64), dtype=np.uint8)[:, :page_bytes]
        shared = np.frombuffer(arena.data, dtype=np.uint8)[-rows * page_bytes :]
        shared = shared.reshape(rows, page_bytes)

        def memcpy(*, is_load: bool) -> float:
            began = time.perf_counter()
            np.copyto(*((engine, shared) if is_load else (shared, engine)))
            return CHUNKS * chunk_bytes / (time.perf_counter() - began) / 1e9

        shape = f"{layers} x {page_bytes >> 10} KiB"
        results = []
        for name, is_load in (("G1 to G2", False), ("G2 to G1", True)):
            ours, limit = interleaved(
                rounds, partial(run, is_load=is_load), partial(memcpy, is_load=is_load)
            )
            results.append(compared(f"{name}, {shape}", "GB/s", ours, "memcpy", limit, TARGET))
        worker.shutdown()
    arena.close()
    return results


def run(rounds: int) -> list[Row]:
    return [row for shape in SHAPES for row in measure(*shape, rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    tell("engine_copies", run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
