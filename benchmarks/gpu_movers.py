"""What should move KV in a GPU's memory: CUDA's own calls or NIXL?

The same pages, as many and as scattered, go between a GPU and host memory through `DevicePages` and
through NIXL's UCX plugin within one process. Then, where NIXL's GDS_MT plugin loads, a file's bytes
go straight to the GPU, against the same file read into host memory by its POSIX plugin: what is
read so goes on to the GPU several times as fast as any SSD reads, meanwhile.

That the connector copies with CUDA rests on others' figures so far (docs/ARCHITECTURE.md, G1);
this is the command that can prove it wrong.

    python -m benchmarks.gpu_movers [--rounds 5] [--window 0.3] [--directory DIR]

Without a GPU it says so and ends with status 3.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hbm import KIB, NO_GPU, Shape, Work, rate
from kvbm.cli.figures import Row, compared, tell
from storage_tiers.cupy_gpu import CupyGpu
from storage_tiers.gpu import Gpu, GpuUnavailableError
from storage_tiers.hbm import Bytes, address_of
from storage_tiers.nixl import NixlUnavailableError, add_plugin, new_agent

PAGE_BYTES = (32 * KIB, 256 * KIB, 2560 * KIB)
BATCH = 256  # pages of a transfer
FILE_BYTES = 1 << 30
PIECE_BYTES = 1 << 20
ALIGNMENT = 4096  # of O_DIRECT
TRANSFER_TIMEOUT_S = 60.0


class Agent:
    """A NIXL agent with one plugin. Raises NixlUnavailableError."""

    def __init__(self, plugin: str) -> None:
        self._plugin = plugin
        self._agent, errors = new_agent(f"bench-{plugin}")
        add_plugin(self._agent, errors, plugin, {})
        self._registered: list[Any] = []

    def register(self, kind: str, address: int, size: int, device: int = 0) -> None:
        descriptor = [(address, size, device, "")]
        done = self._agent.register_memory(descriptor, kind, backends=[self._plugin])
        self._registered.append(done)

    def work(
        self,
        operation: str,
        near: tuple[str, Sequence[int]],
        far: tuple[str, Sequence[int]],
        size: int,
        device: int = 0,
    ) -> Work:
        """Moves pieces of a size between places of two kinds. `device`: a file's descriptor."""
        sides = []
        for (kind, places), number in ((near, 0), (far, device)):
            rows = [(place, size, number) for place in places]
            descriptors = np.array(rows, dtype=np.uint64)
            sides.append(self._agent.get_xfer_descs(descriptors, kind))

        def work() -> int:
            agent = self._agent
            handle = agent.initialize_xfer(operation, *sides, agent.name, b"", [self._plugin])
            end = time.monotonic() + TRANSFER_TIMEOUT_S
            state = agent.transfer(handle)
            while state == "PROC" and time.monotonic() < end:
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"NIXL's {self._plugin} plugin ended with {state}")
            agent.release_xfer_handle(handle)
            return size * len(near[1])

        return work

    def close(self) -> None:
        for each in self._registered:
            self._agent.deregister_memory(each)


def memory_rows(gpu: Gpu, kind: str, rounds: int, window_s: float) -> list[Row]:
    """Pages to host memory and back. `kind`: NIXL's word for the GPU's memory."""
    rows: list[Row] = []
    for page_bytes in PAGE_BYTES:
        size = BATCH * page_bytes
        ours = Shape(gpu, np.zeros(4 * size, dtype=np.uint8), page_bytes, BATCH, None)
        host, device = np.zeros(size, dtype=np.uint8), gpu.allocate(2 * size)
        agent = Agent("UCX")
        agent.register(kind, device, 2 * size)
        agent.register("DRAM", address_of(host), size)
        order = np.random.default_rng(0).permutation(2 * BATCH)[:BATCH]
        pages = [device + int(page) * page_bytes for page in order]
        slots = [address_of(host) + page * page_bytes for page in range(BATCH)]
        for out, operation, name in ((True, "WRITE", "G1 to G2"), (False, "READ", "G2 to G1")):
            own = ours.works(out=out, back=not out)
            theirs = [agent.work(operation, (kind, pages), ("DRAM", slots), page_bytes)]
            pairs = [(rate(own, window_s)[0], rate(theirs, window_s)[0]) for _ in range(rounds)]
            label = f"{name}, {page_bytes // KIB} KiB"
            rows.append(compared(label, "GB/s", *_apart(pairs, "NIXL UCX"), 1.0))
        agent.close()
        ours.close()
        gpu.free(device)
    return rows


def file_rows(
    gpu: Gpu, kind: str, plugin: str, directory: Path, size: int, rounds: int
) -> list[Row]:
    """A file read into host memory, and into the GPU by `plugin`. Raises NixlUnavailableError."""
    straight, bounced = Agent(plugin), Agent("POSIX")
    whole = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    host = whole[-address_of(whole) % ALIGNMENT :][:size]
    device = gpu.allocate(size)
    straight.register(kind, device, size)
    bounced.register("DRAM", address_of(host), size)
    places = range(0, size, PIECE_BYTES)
    with _file(directory, host) as file:
        works = []
        for agent, memory, address in (
            (bounced, "DRAM", address_of(host)),
            (straight, kind, device),
        ):
            agent.register("FILE", 0, size, file)
            near = (memory, [address + place for place in places])
            works.append(agent.work("READ", near, ("FILE", list(places)), PIECE_BYTES, file))
        pairs = [(_once(works[0]), _once(works[1])) for _ in range(rounds)]
        for agent in (straight, bounced):
            agent.close()
    gpu.free(device)
    return [compared("file to host memory", "GB/s", *_apart(pairs, f"to the GPU by {plugin}"))]


@contextmanager
def _file(directory: Path, data: Bytes) -> Iterator[int]:
    """A file of these bytes, read past the page cache."""
    path = directory / "gpu_movers"
    data.tofile(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _once(work: Work) -> float:
    began = time.perf_counter()
    return work() / (time.perf_counter() - began) / 1e9


def _apart(
    pairs: Sequence[tuple[float, float]], theirs: str
) -> tuple[list[float], str, list[float]]:
    return [own for own, _ in pairs], theirs, [other for _, other in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=0.3, help="seconds of each figure")
    parser.add_argument("--directory", help="on the SSD to read from")
    options = parser.parse_args()
    try:
        gpu = CupyGpu(0)
    except GpuUnavailableError as error:
        message = f"benchmarks.gpu_movers needs an NVIDIA GPU, and none is seen: {error}"
        print(message, file=sys.stderr)
        sys.exit(NO_GPU)
    rows = memory_rows(gpu, "VRAM", options.rounds, options.window)
    try:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            rows += file_rows(gpu, "VRAM", "GDS_MT", Path(folder), FILE_BYTES, options.rounds)
    except NixlUnavailableError as error:
        print(f"no row of files: {error}", file=sys.stderr)
    tell("gpu_movers", rows)


if __name__ == "__main__":
    main()
