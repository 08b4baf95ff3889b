"""What `DevicePages` asks of a GPU: the seam between deciding copies and CUDA, which has one file.

Streams and addresses are numbers, CUDA's own handles. Work on a stream runs in its order; between
streams only `wait` orders it. A call that CUDA refuses raises GpuError, and so does the next call
after something that was under way went wrong.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from storage_tiers.streaming import Addresses

Descriptors = npt.NDArray[np.uint64]
Sizes = npt.NDArray[np.uint64]


class GpuError(Exception):
    """CUDA refused a call, or something under way failed."""


class GpuUnavailableError(Exception):
    """A GPU's memory cannot be reached from here; the message says why and what to do."""


class Copies(NamedTuple):
    """Contiguous copies between GPU and host, in no order."""

    device: Addresses
    host: Addresses
    sizes: Sizes


class Gpu(Protocol):
    """One CUDA device; any thread may call, and no call but `finish` waits for the GPU."""

    @property
    def has_kernel(self) -> bool:
        """Whether `copy_pieces` works here."""
        ...

    @property
    def maps_host(self) -> bool:
        """Whether kernels reach pinned host memory by its own addresses."""
        ...

    def stream(self) -> int:
        """A new stream that waits for no other."""
        ...

    def mark(self, stream: int) -> object:
        """A point in a stream: all that was queued there before."""
        ...

    def wait(self, stream: int, mark: object) -> None:
        """What is queued on the stream from now on runs after the mark."""
        ...

    def finish(self, mark: object) -> None:
        """Block until the mark is reached; other threads run meanwhile."""
        ...

    def copy(self, stream: int, copies: Copies, *, to_host: bool, pinned: bool) -> None:
        """Queue copies on the copy engines. `pinned`: all host memory of it is.

        Where it is not, the call may wait for the copies. The arrays may go when it returns.
        """
        ...

    def copy_pieces(self, stream: int, pieces: Descriptors, size: int) -> None:
        """Queue a kernel that copies `size` bytes for each row (target, source) of addresses.

        `pieces` comes from `descriptors` and stays as it is until the kernel has ended.
        """
        ...

    def descriptors(self, count: int) -> Descriptors:
        """Host memory for `count` rows that kernels can read."""
        ...

    def allocate(self, size: int) -> int:
        """Memory of the GPU, by its address; aligned to 256 bytes."""
        ...

    def free(self, address: int) -> None: ...

    def pin(self, address: int, size: int) -> None:
        """Lock host memory and map it into the GPU. Seconds for each GiB not in use yet."""
        ...

    def unpin(self, address: int) -> None:
        """Undo `pin`; no copy of this memory is under way."""
        ...
