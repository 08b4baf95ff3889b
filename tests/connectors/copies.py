"""One rank's part of an engine, and the arena it copies to: what the worker's tests are made of."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.kv_offload.base import GPULoadStoreSpec, TransferResult

from connectors.vllm.transfer import ArenaSlots
from connectors.vllm.worker_side import KvbmWorker
from kvbm.protocol import VERSION, Hello, Welcome
from storage_tiers.arena import PAGE, Arena, Slot
from storage_tiers.hbm import Bytes, CopyPlan, HostPages, PageAccess

WAIT_S = 20.0
BLOCKS = 24

During = Callable[[], None]


class Daemon:
    """What the worker sees of a daemon: its arena, and slots with their generations."""

    def __init__(self, session: int = 7) -> None:
        self.arena = Arena.create(1 << 20)
        self.session = session
        self._offsets = itertools.count(PAGE, PAGE)

    @property
    def welcome(self) -> Welcome:
        return Welcome(VERSION, self.arena.epoch, self.session)

    def greet(self, worker: KvbmWorker, connection: int = 1) -> None:
        worker.connected(connection, self.welcome, os.dup(self.arena.fd))

    def slots(self, count: int, length: int) -> list[Slot]:
        offsets = [next(self._offsets) for _ in range(count)]
        assert length <= PAGE
        return [Slot(offset, length, self.arena.advance(offset)) for offset in offsets]

    def read(self, slot: Slot) -> bytes:
        return bytes(self.arena.view(slot.offset, slot.length))


@dataclass(frozen=True)
class Shape:
    """An engine's cache groups and which of their blocks one transfer moves."""

    pages: Sequence[int]  # page bytes of each tensor
    groups: Sequence[Sequence[int]]  # tensors of each group
    blocks_per_chunk: int
    sizes: Sequence[int]  # blocks of the transfer, by group
    firsts: Sequence[int]  # index of its first block in its sequence, by group

    def block_bytes(self, group: int) -> int:
        return sum(self.pages[tensor] for tensor in self.groups[group])

    def stripe_bytes(self, group: int) -> int:
        return self.block_bytes(group) * self.blocks_per_chunk

    def chunks(self, group: int) -> int:
        """How many chunks the transfer touches."""
        first = self.firsts[group] % self.blocks_per_chunk
        return -(-(first + self.sizes[group]) // self.blocks_per_chunk) if self.sizes[group] else 0

    def tensors(self, seed: int | None) -> list[Bytes]:
        """Random pages, or empty ones."""
        if seed is None:
            return [np.zeros((BLOCKS, page), np.uint8) for page in self.pages]
        random = np.random.default_rng(seed)
        return [random.integers(1, 256, (BLOCKS, page), np.uint8) for page in self.pages]

    def blocks(self, seed: int) -> GPULoadStoreSpec:
        """Blocks for the transfer, in no order, none twice."""
        order = np.random.default_rng(seed).permutation(BLOCKS)[: sum(self.sizes)]
        return GPULoadStoreSpec(order.tolist(), self.sizes, self.firsts)

    def lease(self, daemon: Daemon, ranks: int = 1) -> list[list[Slot]]:
        """Slots for the transfer's chunks, by group."""
        return [
            daemon.slots(self.chunks(group), ranks * self.stripe_bytes(group))
            for group in range(len(self.groups))
        ]

    def expected(self, tensors: Sequence[Bytes], spec: GPULoadStoreSpec) -> list[list[bytes]]:
        """What the slots must hold after a store, said differently than the code says it."""
        blocks = iter(spec.block_ids.tolist())
        found: list[list[bytes]] = []
        for group, (size, first) in enumerate(zip(self.sizes, self.firsts, strict=True)):
            skipped = first % self.blocks_per_chunk * self.block_bytes(group)
            stored = b"".join(
                tensors[tensor][block].tobytes()
                for block in itertools.islice(blocks, size)
                for tensor in self.groups[group]
            )
            length = self.stripe_bytes(group)
            filled = (bytes(skipped) + stored).ljust(self.chunks(group) * length, b"\0")
            found.append([filled[at : at + length] for at in range(0, len(filled), length)])
        return found


ONE_BLOCK = Shape([64], [[0]], 1, [1], [0])
"""The smallest transfer: one block, one chunk, one tensor."""


class Watched:
    """`PageAccess` that calls `during` before the end of each job's copies."""

    def __init__(self, pages: PageAccess, during: During) -> None:
        self._pages = pages
        self._during = during

    @property
    def concurrent(self) -> bool:
        return self._pages.concurrent

    def block_bytes(self, group: int) -> int:
        return self._pages.block_bytes(group)

    def attach(self, memory: Bytes) -> None:
        self._pages.attach(memory)

    def fence(self) -> object:
        return self._pages.fence()

    def gather(self, plans: Sequence[CopyPlan], after: object = None) -> int:
        self._during()
        return self._pages.gather(plans, after)

    def scatter(self, plans: Sequence[CopyPlan], after: object = None) -> int:
        copied = self._pages.scatter(plans, after)
        self._during()
        return copied

    def close(self) -> None:
        self._pages.close()


class Gate:
    """Holds the first copy that comes by until it is opened; later ones pass."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._opened = threading.Event()

    def __call__(self) -> None:
        self._entered.set()
        assert self._opened.wait(WAIT_S), "the test never opened its gate"

    def wait_for_copy(self) -> None:
        assert self._entered.wait(WAIT_S), "no copy began"

    def open(self) -> None:
        self._opened.set()


def pages_of(shape: Shape, tensors: Sequence[Bytes]) -> HostPages:
    return HostPages(tensors, shape.groups)


def describe(
    daemon: Daemon,
    slots: Sequence[Sequence[Slot]],
    *,
    transfer: int = 1,
    request: str = "request",
    rank_offsets: Sequence[Sequence[int]] | None = None,
) -> ArenaSlots:
    """A job's slots as the scheduler half tells them."""
    flat = [(group, slot) for group, each in enumerate(slots) for slot in each]
    return ArenaSlots(
        transfer=transfer,
        request=request,
        epoch=daemon.arena.epoch,
        session=daemon.session,
        offsets=[slot.offset for _, slot in flat],
        generations=[slot.generation for _, slot in flat],
        groups=[group for group, _ in flat],
        lengths=[each[0].length if each else 0 for each in slots],
        rank_offsets=[list(each) for each in rank_offsets or [[0]] * len(slots)],
    )


def ended(worker: KvbmWorker, *numbers: int) -> dict[int, TransferResult]:
    """Results of these jobs and of all that ended meanwhile, as vLLM polls for them."""
    results: dict[int, TransferResult] = {}
    end = time.monotonic() + WAIT_S
    while not results.keys() >= set(numbers):
        assert time.monotonic() < end, f"jobs {set(numbers) - results.keys()} did not end"
        for result in worker.get_finished():
            assert result.job_id not in results, "one job has one result"
            results[result.job_id] = result
        time.sleep(0.001)
    return results


def no_hello() -> Hello:
    raise AssertionError("nobody listens, so nobody is greeted")


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Background:
    """A call on another thread; `ended` waits for it, bounded."""

    call: Callable[[], None]
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.call, daemon=True)
        self.thread.start()

    def ended(self, timeout_s: float = WAIT_S) -> bool:
        self.thread.join(timeout_s)
        return not self.thread.is_alive()
