"""G1 to G2 and back: what the connector's worker copies, against memcpy.

The KV tensors lie as in vLLM's CPU build: a page per layer and block, all layers in one allocation.
A job moves 96 MiB of chunks in scattered blocks through `KvbmWorker`, its thread and its checks
included.

- `memcpy` is the limit and the target's measure: as many pieces of the same size, one behind the
  other in both memories, in one C loop on one thread. No scattered copy that goes through the cache
  reaches it; ours may pass it, because its stores go past the cache.
- `memcpy, same pieces` is the same job with libc's memcpy for each page, in a compiled loop: what
  the scattered addresses leave of the limit.

    python -m benchmarks.engine_copies [--rounds 7]
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import time
from functools import partial
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from connectors.vllm.transfer import ArenaSlots
from connectors.vllm.worker_side import KvbmWorker
from kvbm.cli.figures import Row, compared, interleaved, tell
from kvbm.protocol import VERSION, Hello, Welcome
from storage_tiers.arena import Arena, Slot
from storage_tiers.hbm import HostPages
from storage_tiers.slabs import SlabAllocator

JOB_BYTES = 96 << 20  # about what a prompt of 2,000 tokens is; short jobs would time the scheduler
TARGET = 0.90
libc_memcpy: Any = ctypes.CDLL(None).memcpy
libc_memcpy.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]
libc_memcpy.restype = ctypes.c_size_t
SHAPES = ((30, 49152), (32, 16384), (80, 8192))  # layers, bytes of a page


def _memcpy_each(targets: Any, sources: Any, size: int) -> None:
    for index in range(len(targets)):
        libc_memcpy(targets[index], sources[index], size)


memcpy_each: Any = numba.njit("void(uint64[::1], uint64[::1], int64)", nogil=True)(_memcpy_each)


class Copies:
    """One shape of KV, a worker on it, and the limit's buffers."""

    def __init__(self, layers: int, page_bytes: int) -> None:
        self._chunk_bytes = layers * page_bytes
        chunks = self._chunks = JOB_BYTES // self._chunk_bytes
        self.job_bytes = chunks * self._chunk_bytes
        self._arena = Arena.create(2 * chunks * (self._chunk_bytes + (1 << 21)))
        allocator = SlabAllocator(self._arena.capacity_bytes)
        offsets = [allocator.allocate(self._chunk_bytes) for _ in range(chunks)]
        self._slots = [
            Slot(at, self._chunk_bytes, self._arena.advance(at)) for at in offsets if at is not None
        ]
        # Torch's own memory: how it is aligned decides whether loads and stores collide.
        tensors = list(torch.ones((layers, chunks * 2, page_bytes), dtype=torch.uint8).numpy())
        self._worker = KvbmWorker(
            HostPages(tensors, [list(range(layers))]),
            socket_path="/nonexistent/kvbm.sock",
            hello=lambda: Hello(
                VERSION, "worker", "bench", 0, 1, {}, [self._chunk_bytes], False, os.getpid()
            ),
            rank=0,
            blocks_per_chunk=1,
            load_deadline_s=60.0,
        )
        welcome = Welcome(VERSION, self._arena.epoch, 1)
        self._worker.connected(1, welcome, os.dup(self._arena.fd))
        self._jobs = 0
        self._random = np.random.default_rng(0)
        # Rows apart by a cache line, so that NumPy copies each with a memcpy of its own.
        rows = chunks * layers
        self._engine = torch.ones((rows, page_bytes + 64), dtype=torch.uint8).numpy()
        self._engine = self._engine[:, :page_bytes]
        shared = np.frombuffer(self._arena.data, dtype=np.uint8)[-rows * page_bytes :]
        self._shared = shared.reshape(rows, page_bytes)

    def worker(self, *, is_load: bool) -> float:
        """GB/s of one job."""
        self._jobs += 1
        blocks = self._random.permutation(self._chunks * 2)[: self._chunks].tolist()
        pages = GPULoadStoreSpec(blocks, [self._chunks], [0])
        slots = ArenaSlots(
            transfer=self._jobs,
            request="bench",
            epoch=self._arena.epoch,
            session=1,
            offsets=[slot.offset for slot in self._slots],
            generations=[slot.generation for slot in self._slots],
            groups=[0] * self._chunks,
            lengths=[self._chunk_bytes],
            rank_offsets=[[0]],
        )
        began = time.perf_counter()
        if is_load:
            self._worker.submit_load(self._jobs, slots, pages)
        else:
            self._worker.submit_store(self._jobs, pages, slots)
        self._worker.wait({self._jobs})
        seconds = time.perf_counter() - began
        assert self._worker.get_finished() and self._worker.take_failed() == (set(), set())
        return self.job_bytes / seconds / 1e9

    def same_pieces(self, *, is_load: bool) -> float:
        """GB/s of one job with memcpy in place of our copies."""
        with patch("storage_tiers.hbm.copy_pieces", memcpy_each):
            return self.worker(is_load=is_load)

    def memcpy(self, *, is_load: bool) -> float:
        """GB/s of the limit."""
        source, target = self._engine, self._shared
        if is_load:
            source, target = target, source
        began = time.perf_counter()
        np.copyto(target, source)
        return self.job_bytes / (time.perf_counter() - began) / 1e9

    def close(self) -> None:
        self._worker.shutdown()


def run(rounds: int) -> list[Row]:
    logging.getLogger("kvbm.link").setLevel(logging.ERROR)  # there is no daemon here
    results: list[Row] = []
    for layers, page_bytes in SHAPES:
        copies = Copies(layers, page_bytes)
        for name, is_load in (("G1 to G2", False), ("G2 to G1", True)):
            ours = partial(copies.worker, is_load=is_load)
            for against, limit, target in (
                ("memcpy", copies.memcpy, TARGET),
                ("memcpy, same pieces", copies.same_pieces, None),
            ):
                figures = interleaved(rounds, ours, partial(limit, is_load=is_load))
                label = f"{name}, {layers} x {page_bytes >> 10} KiB"
                results.append(compared(label, "GB/s", figures[0], against, figures[1], target))
        copies.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    tell("engine_copies", run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
