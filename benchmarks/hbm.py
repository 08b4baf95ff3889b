"""G1 to G2 and back on a GPU: copies between a GPU's pages and pinned host memory, against the bus.

The limit is measured in the same run: one large copy of pinned memory, each way and both at once.
Ours are transfers of so many pages of a size through `DevicePages`, in blocks drawn at random, as
the connector's worker makes them: two threads each way, one transfer after the other. Then the same
beside a matrix product that keeps the GPU busy, and what that costs the product. The targets hold
for transfers of at least 16 MiB; what smaller ones reach is told too.

    python -m benchmarks.hbm [--rounds 3] [--window 0.3]

Without a GPU it says so and ends with status 3.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvbm.cli.figures import Row, compared, tell
from storage_tiers.cupy_gpu import CupyGpu
from storage_tiers.device_batches import Way
from storage_tiers.device_pages import DevicePages
from storage_tiers.gpu import Copies, Gpu, GpuUnavailableError
from storage_tiers.hbm import Bytes, CopyPlan, KvTensor, address_of

NO_GPU = 3
KIB = 1024
PAGE_BYTES = (8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 2560 * KIB)
BATCHES = (1, 4, 16, 64, 256, 1024)  # pages of a transfer
LAYERS_MAX = 32
CEILING_BYTES = 256 << 20
JUDGED_BYTES = 16 << 20  # transfers from here on are held to the targets
TARGETS = {32 * KIB: 0.80, 64 * KIB: 0.80, 128 * KIB: 0.80}  # of the bus; 0.95 above
TARGET_LARGE = 0.95
PRODUCT_TARGET = 0.98  # of the products a second without copies
PRODUCT_SIZE = 8192
THREADS_EACH_WAY = 2
PIN_TIMEOUT_S = 120.0

Work = Callable[[], int]
"""Does a transfer and returns its bytes."""


class Load(Protocol):
    """What keeps the GPU's multiprocessors busy meanwhile."""

    def done(self) -> int:
        """How many products have ended since it began."""
        ...


@dataclass(frozen=True)
class Scale:
    """How much is measured; a test does less."""

    page_bytes: Sequence[int] = PAGE_BYTES
    batches: Sequence[int] = BATCHES
    ceiling_bytes: int = CEILING_BYTES
    rounds: int = 3
    window_s: float = 0.3


class Shape:
    """An engine with pages of one size, and transfers of so many of them."""

    def __init__(self, gpu: Gpu, host: Bytes, page_bytes: int, batch: int, way: Way | None) -> None:
        layers = min(batch, LAYERS_MAX)
        self._blocks = batch // layers
        self._random = np.random.default_rng(0)
        self._gpu = gpu
        count = 2 * THREADS_EACH_WAY * self._blocks
        self._kv = gpu.allocate(layers * count * page_bytes)
        places = [
            KvTensor(self._kv + layer * count * page_bytes, count, page_bytes, page_bytes)
            for layer in range(layers)
        ]
        self.bytes = layers * self._blocks * page_bytes
        self.pages = DevicePages(
            gpu,
            places,
            [list(range(layers))],
            engine_stream=gpu.stream,
            ways=None if way is None else (way, way),
        )
        self.pages.attach(host[: 2 * THREADS_EACH_WAY * self.bytes])
        self.pages.fence()  # the engine runs
        assert self.pages._memory is not None
        self.pages._memory.wait(PIN_TIMEOUT_S)
        self._stripes = [
            host[index * self.bytes : (index + 1) * self.bytes]
            for index in range(2 * THREADS_EACH_WAY)
        ]
        # Each thread has blocks of its own, as transfers of an engine do.
        self._own = self._random.permutation(count).reshape(2 * THREADS_EACH_WAY, -1)

    def works(self, *, out: bool, back: bool) -> list[Work]:
        copies = [self.pages.gather] * out + [self.pages.scatter] * back
        return [
            self._work(copy, index * THREADS_EACH_WAY + thread)
            for index, copy in enumerate(copies)
            for thread in range(THREADS_EACH_WAY)
        ]

    def close(self) -> None:
        self.pages.close()
        self._gpu.free(self._kv)

    def _work(self, copy: Callable[..., int], index: int) -> Work:
        stripe, own = self._stripes[index], self._own[index]

        def work() -> int:
            return copy([CopyPlan(0, self._random.permutation(own).tolist(), 0, stripe)])

        return work


def large_copies(gpu: Gpu, host: Bytes, size: int) -> tuple[dict[bool, Work], int]:
    """One copy each way (True: to the host) and the GPU memory that it needs."""
    device = gpu.allocate(2 * size)
    works: dict[bool, Work] = {}
    for to_host in (True, False):
        stream, half = gpu.stream(), 0 if to_host else size
        arrays = (device + half, address_of(host) + half, size)
        copies = Copies(*(np.array([each], dtype=np.uint64) for each in arrays))

        def work(stream: int = stream, copies: Copies = copies, to_host: bool = to_host) -> int:
            gpu.copy(stream, copies, to_host=to_host, pinned=True)
            gpu.finish(gpu.mark(stream))
            return size

        works[to_host] = work
    return works, device


def rate(works: Sequence[Work], window_s: float, load: Load | None = None) -> tuple[float, float]:
    """GB/s of these repeated side by side, and products a second meanwhile."""
    moved = [0] * len(works)
    ending = threading.Event()

    def repeat(index: int) -> None:
        while not ending.is_set():
            moved[index] += works[index]()

    for work in works:
        work()
    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(len(works))]
    products = load.done() if load else 0
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    ending.wait(window_s)
    products = (load.done() if load else 0) - products
    seconds_of_products = time.perf_counter() - began
    ending.set()
    for thread in threads:
        thread.join()
    return sum(moved) / (time.perf_counter() - began) / 1e9, products / seconds_of_products


def run(gpu: Gpu, busy: Callable[[], Any], scale: Scale) -> list[Row]:
    """`busy()` is a context with a `Load`."""
    largest = max(scale.page_bytes) * max(scale.batches) * 2 * THREADS_EACH_WAY
    host = np.zeros(max(largest, 2 * scale.ceiling_bytes), dtype=np.uint8)
    gpu.pin(address_of(host), host.nbytes)
    large, device = large_copies(gpu, host, scale.ceiling_bytes)
    limits: dict[tuple[bool, bool], list[float]] = {}
    rows: list[Row] = []
    for ways in ((True, False), (False, True), (True, True)):
        works = [large[True]] * ways[0] + [large[False]] * ways[1]
        limits[ways] = [rate(works, scale.window_s)[0] for _ in range(scale.rounds)]
    gpu.free(device)
    gpu.unpin(address_of(host))
    for page_bytes in scale.page_bytes:
        for batch in scale.batches:
            rows += _of_shape(gpu, busy, scale, host, page_bytes, batch, limits)
        rows += _of_ways(gpu, scale, host, page_bytes, limits)
    return rows


def _of_shape(
    gpu: Gpu,
    busy: Callable[[], Any],
    scale: Scale,
    host: Bytes,
    page_bytes: int,
    batch: int,
    limits: dict[tuple[bool, bool], list[float]],
) -> list[Row]:
    """The rows of one size of page and transfer."""
    shape = Shape(gpu, host, page_bytes, batch, None)
    judged = shape.bytes >= JUDGED_BYTES
    target = TARGETS.get(page_bytes, TARGET_LARGE if page_bytes >= 256 * KIB else None)
    rows: list[Row] = []
    label = f"{batch} x {page_bytes // KIB} KiB"
    for ways, limit in limits.items():
        works = shape.works(out=ways[0], back=ways[1])
        name = f"{_NAMES[ways]}, {label}"
        alone = [rate(works, scale.window_s)[0] for _ in range(scale.rounds)]
        rows.append(
            compared(name, "GB/s", alone, "large copies", limit, target if judged else None)
        )
        with busy() as load:
            without = [rate([], scale.window_s, load)[1] for _ in range(scale.rounds)]
            beside = [rate(works, scale.window_s, load) for _ in range(scale.rounds)]
        figures = [gigabytes for gigabytes, _ in beside]
        rows.append(compared(f"{name}, product beside", "GB/s", figures, "large copies", limit))
        products = [count for _, count in beside]
        rows.append(
            compared(
                f"product beside {name}",
                "1/s",
                products,
                "product alone",
                without,
                PRODUCT_TARGET if judged else None,
            )
        )
    shape.close()
    return rows


def _of_ways(
    gpu: Gpu,
    scale: Scale,
    host: Bytes,
    page_bytes: int,
    limits: dict[tuple[bool, bool], list[float]],
) -> list[Row]:
    """Each way of copying by itself: where the measured thresholds lie on this machine."""
    rows: list[Row] = []
    for way in Way:
        shape = Shape(gpu, host, page_bytes, max(scale.batches), way)
        for ways in ((True, False), (False, True)):
            works = shape.works(out=ways[0], back=ways[1])
            figures = [rate(works, scale.window_s)[0] for _ in range(scale.rounds)]
            name = f"{_NAMES[ways]}, {way.value}, {page_bytes // KIB} KiB"
            rows.append(compared(name, "GB/s", figures, "large copies", limits[ways]))
        shape.close()
    return rows


_NAMES = {(True, False): "G1 to G2", (False, True): "G2 to G1", (True, True): "both ways"}


class _Product:
    """Products of half-precision matrices on a stream of their own, one behind the other."""

    def __init__(self) -> None:
        self._done = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def done(self) -> int:
        return self._done

    def start(self) -> None:
        self._thread.start()
        while not self._done and self._thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        import cupy

        with cupy.cuda.Stream(non_blocking=True):
            left, right = (cupy.ones((PRODUCT_SIZE,) * 2, dtype=cupy.float16) for _ in range(2))
            out = cupy.empty_like(left)
            before = None
            while not self._ending.is_set():
                cupy.matmul(left, right, out=out)
                event = cupy.cuda.Event(block=True, disable_timing=True)
                event.record()
                if before is not None:
                    before.synchronize()
                    self._done += 1
                before = event
            cupy.cuda.get_current_stream().synchronize()


@contextmanager
def product() -> Iterator[Load]:
    running = _Product()
    running.start()
    try:
        yield running
    finally:
        running.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=0.3, help="seconds of each figure")
    options = parser.parse_args()
    try:
        gpu = CupyGpu(0)
    except GpuUnavailableError as error:
        print(f"benchmarks.hbm needs an NVIDIA GPU, and none is seen: {error}", file=sys.stderr)
        sys.exit(NO_GPU)
    tell("hbm", run(gpu, product, Scale(rounds=options.rounds, window_s=options.window)))


if __name__ == "__main__":
    main()
