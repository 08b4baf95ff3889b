"""A GPU of NumPy arrays that does what CUDA promises and no more, to test what is asked of it.

Nothing runs when it is queued, only when somebody waits; then streams take turns at random, so what
no event orders happens in every order sooner or later. Kernels read their descriptors when they
run. An address that is neither the GPU's nor pinned is an illegal access, after which every call
fails, and a copy over the border of two registrations is refused.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from storage_tiers.gpu import Copies, Descriptors, GpuError
from storage_tiers.hbm import Bytes, address_of

_HEAP_BYTES = 16 << 20
_ALIGNMENT = 4096
ILLEGAL = "an illegal memory access was encountered"


@dataclass(eq=False)
class Mark:
    """An event: reached when its stream has come to it."""

    reached: bool = False


@dataclass
class Costs:
    """What work takes, in seconds of the GPU's own clock."""

    copy_s: float = 1e-6  # each copy
    kernel_s: float = 5e-6  # each kernel
    bus_s: float = 1 / 50e9  # each byte
    direct_s: float = 1 / 50e9  # each byte that a kernel moves over the bus


@dataclass
class NumpyGpu:
    """`Gpu` for tests."""

    seed: int = 0
    has_kernel: bool = True
    maps_host: bool = True
    costs: Costs = field(default_factory=Costs)
    calls: Counter[str] = field(default_factory=Counter)
    pinned: dict[int, int] = field(default_factory=dict)  # address -> size
    now_s: float = 0.0
    fails: str = ""  # the call that fails next, and
    fails_after: int = 0  # how many of it pass before
    pin_limit: int | None = None  # bytes

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.RLock()
        self._streams: dict[int, deque[Callable[[], None] | Mark | tuple[Mark]]] = {}
        self._memory: dict[int, Bytes] = {}
        self._pending: Counter[tuple[int, int]] = Counter()  # host memory of queued copies
        # Small allocations lie next to each other, as CUDA's often do.
        heap = np.empty(_HEAP_BYTES, dtype=np.uint8)
        self._heap = heap[-address_of(heap) % _ALIGNMENT :]
        self._allocated = 0
        self._sticky = ""
        self._held = 0

    # -- what the engine does ------------------------------------------------------------

    def own(self, array: Bytes) -> int:
        """Make this the GPU's memory."""
        self._memory[address_of(array)] = array
        return address_of(array)

    def run(self, stream: int, work: Callable[[], None]) -> None:
        """Queue work of the engine's."""
        with self._lock:
            self._streams[stream].append(work)

    def hold(self, stream: int) -> None:
        """The stream stands still from now on."""
        self._held = stream

    def waiting(self) -> int:
        """Steps that are queued."""
        with self._lock:
            return sum(map(len, self._streams.values()))

    def drain(self) -> None:
        """Run all that is queued."""
        with self._lock:
            while any(self._streams.values()):
                self._turn()

    # -- Gpu -------------------------------------------------------------------------------

    def stream(self) -> int:
        with self._call("stream"):
            number = len(self._streams) + 1
            self._streams[number] = deque()
            return number

    def mark(self, stream: int) -> object:
        with self._call("mark"):
            mark = Mark()
            self._streams[stream].append(mark)
            return mark

    def wait(self, stream: int, mark: object) -> None:
        assert isinstance(mark, Mark)
        with self._call("wait"):
            self._streams[stream].append((mark,))

    def finish(self, mark: object) -> None:
        assert isinstance(mark, Mark)
        with self._call("finish"):
            while not mark.reached:
                self._turn()
                self._check()

    def copy(self, stream: int, copies: Copies, *, to_host: bool, pinned: bool) -> None:
        with self._call("copy"):
            rows = [tuple(map(int, row)) for row in zip(*copies, strict=True)]
            for device, host, size in rows:
                self._refuse(not self._is_own(device, size), f"{device:#x} is not the GPU's")
                self._refuse(self._is_own(host, size), f"{host:#x} is the GPU's")
                touched = [
                    at for at, of in self.pinned.items() if at < host + size and host < at + of
                ]
                inside = [
                    at for at in touched if at <= host and host + size <= at + self.pinned[at]
                ]
                self._refuse(bool(touched) and not inside, "a copy over a registration's border")
                self._refuse(pinned and not inside, "memory said to be pinned is not")

            self._pending.update((host, size) for _, host, size in rows)

            def work() -> None:
                self._pending.subtract((host, size) for _, host, size in rows)
                for device, host, size in self._random.sample(rows, len(rows)):
                    source, target = (device, host) if to_host else (host, device)
                    ctypes.memmove(target, source, size)
                    self.now_s += self.costs.copy_s + size * self.costs.bus_s

            self.calls["copied"] += len(rows)
            self.calls["copied, pinned"] += len(rows) * pinned
            self._streams[stream].append(work)

    def copy_pieces(self, stream: int, pieces: Descriptors, size: int) -> None:
        with self._call("copy_pieces"):
            self._refuse(not self.has_kernel, "there is no kernel")
            alive = weakref.ref(pieces)

            def work() -> None:
                rows = alive()
                assert rows is not None, "a kernel's descriptors went before it ran"
                for target, source in self._random.sample(rows.tolist(), len(rows)):
                    for address in (target, source):
                        if not self._is_own(address, size) and not self._is_mapped(address, size):
                            self._sticky = ILLEGAL
                            return
                    over_bus = not self._is_own(target, size) or not self._is_own(source, size)
                    self.now_s += size * self.costs.direct_s * over_bus
                    ctypes.memmove(target, source, size)
                self.now_s += self.costs.kernel_s

            self._streams[stream].append(work)

    def descriptors(self, count: int) -> Descriptors:
        with self._call("descriptors"):
            return np.full((count, 2), 2**64 - 1, dtype=np.uint64)

    def allocate(self, size: int) -> int:
        with self._call("allocate"):
            memory = self._heap[self._allocated : self._allocated + size]
            self._allocated += -(-size // _ALIGNMENT) * _ALIGNMENT
            if memory.nbytes < size:
                memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
                memory = memory[-address_of(memory) % _ALIGNMENT :][:size]
            memory[:] = 0xEE
            return self.own(memory)

    def free(self, address: int) -> None:
        with self._call("free"):
            del self._memory[address]

    def pin(self, address: int, size: int) -> None:
        with self._call("pin"):
            overlaps = any(
                at < address + size and address < at + of for at, of in self.pinned.items()
            )
            self._refuse(overlaps, "memory is registered already")
            total = sum(self.pinned.values()) + size
            self._refuse(self.pin_limit is not None and total > self.pin_limit, "out of memory")
            self.pinned[address] = size

    def unpin(self, address: int) -> None:
        with self._call("unpin"):
            size = self.pinned.pop(address)
            for (at, of), count in self._pending.items():
                is_other = at + of <= address or address + size <= at
                assert not count or is_other, "memory is given back before its copies ended"

    # -- how ---------------------------------------------------------------------------------

    def _call(self, name: str) -> threading.RLock:
        with self._lock:
            self.calls[name] += 1
            self._check()
            if self.fails == name:
                self.fails_after -= 1
                if self.fails_after < 0:
                    self.fails = ""
                    raise GpuError(f"{name} was refused")
        return self._lock

    def _check(self) -> None:
        if self._sticky:
            raise GpuError(self._sticky)

    def _refuse(self, wrong: bool, why: str) -> None:
        if wrong:
            raise GpuError(why)

    def _turn(self) -> None:
        """One stream takes one step."""
        ready = [
            queue
            for stream, queue in self._streams.items()
            if queue and stream != self._held and self._can_step(queue[0])
        ]
        assert ready, "streams wait for each other for ever"
        step = self._random.choice(ready).popleft()
        if isinstance(step, Mark):
            step.reached = True
        elif not isinstance(step, tuple):
            step()
        if self._sticky:  # the context has ended, and with it all that was queued
            self._pending.clear()
            for queue in self._streams.values():
                queue.clear()

    def _can_step(self, step: object) -> bool:
        return not isinstance(step, tuple) or step[0].reached

    def _is_own(self, address: int, size: int) -> bool:
        return any(
            at <= address and address + size <= at + m.nbytes for at, m in self._memory.items()
        )

    def _is_mapped(self, address: int, size: int) -> bool:
        """A kernel may read over the border of two registrations that touch."""
        end = address + size
        while self.maps_host and address < end:
            reach = [at + of for at, of in self.pinned.items() if at <= address < at + of]
            if not reach:
                return False
            address = max(reach)
        return self.maps_host
