"""`PageAccess` to an engine's pages in a GPU's memory: copies beside the engine, never before it.

`fence` marks the engine's own stream on the engine's thread; a copy waits for its mark on the GPU,
so that it reads what the engine has computed and overwrites nothing that the engine still clears.
The thread that calls `gather` or `scatter` sleeps until the copy has ended: only then is a load
told of, and the engine's step that reads it is queued after that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from storage_tiers.device_batches import Part, Way
from storage_tiers.device_copies import STAGING_BYTES, Direction, measured_ways
from storage_tiers.gpu import Gpu, GpuError, GpuUnavailableError
from storage_tiers.hbm import Blocks, Bytes, CopyError, CopyPlan, KvTensor, PageMap
from storage_tiers.pinned import EXTENT_BYTES, PinnedMemory

logger = logging.getLogger("kvbm.gpu")

_CLOSE_TIMEOUT_S: Final = 10.0


class DevicePages:
    """`PageAccess` over tensors in the memory of one GPU."""

    concurrent = True

    def __init__(
        self,
        gpu: Gpu,
        tensors: Sequence[KvTensor],
        groups: Sequence[Sequence[int]],
        *,
        engine_stream: Callable[[], int],
        owner: object = None,
        ways: tuple[Way, Way] | None = None,
        staging_bytes: int = STAGING_BYTES,
        extent_bytes: int = EXTENT_BYTES,
    ) -> None:
        """`engine_stream()` is the stream that the calling thread computes on; `owner` is kept as
        long as this, so that the tensors' memory is. `ways`, out and in, instead of measured ones.

        Raises GpuUnavailableError.
        """
        self._gpu = gpu
        self._owner: Any = owner
        self._engine_stream = engine_stream
        self._map = PageMap(tensors, groups)
        self._extent_bytes = extent_bytes
        self._lock = threading.Lock()
        self._memory: PinnedMemory | None = None
        self._engine_runs = False
        try:
            self._out = Direction(gpu, to_host=True, staging_bytes=staging_bytes)
            self._in = Direction(gpu, to_host=False, staging_bytes=staging_bytes)
            self._ways = [ways or self._measured(group) for group in range(len(groups))]
        except (GpuError, CopyError, TimeoutError) as error:
            raise GpuUnavailableError(f"copies of the KV cache do not work: {error}") from error
        for group, (out, back) in enumerate(self._ways):
            logger.info(
                "cache group %d, %d bytes a page: %s to the host, %s back",
                group,
                self._page_bytes(group),
                out.value,
                back.value,
            )

    def block_bytes(self, group: int) -> int:
        return self._map.block_bytes(group)

    def attach(self, memory: Bytes) -> None:
        with self._lock:
            earlier = self._memory
            self._memory = PinnedMemory(self._gpu, memory, extent_bytes=self._extent_bytes)
            if self._engine_runs:
                self._memory.begin()
        if earlier is not None:
            earlier.close()

    def fence(self) -> object:
        if not self._engine_runs:
            self._begin()
        try:
            return self._gpu.mark(self._engine_stream())
        except GpuError as error:
            return error  # the copy's failure, not the engine's

    def gather(self, plans: Sequence[CopyPlan], after: object = None) -> int:
        blocks = self._map.blocks(plans)
        parts = [Part(each, self._ways[each.group][0]) for each in blocks]
        return self._copy(self._out, blocks, parts, after)

    def scatter(self, plans: Sequence[CopyPlan], after: object = None) -> int:
        blocks = self._map.blocks(plans)
        parts = [Part(each, self._ways[each.group][1]) for each in blocks]
        return self._copy(self._in, blocks, parts, after)

    def close(self) -> None:
        if (memory := self._memory) is not None:
            memory.close()
            memory.join(_CLOSE_TIMEOUT_S)
        with contextlib.suppress(GpuError):  # the device may be gone already
            self._out.close()
            self._in.close()

    def _begin(self) -> None:
        """With the engine's first transfer it has captured its graphs, which pinning would break:
        https://github.com/vllm-project/vllm/issues/46933
        """
        with self._lock:
            self._engine_runs = True
            if self._memory is not None:
                self._memory.begin()

    def _copy(
        self, direction: Direction, blocks: list[Blocks], parts: list[Part], after: object
    ) -> int:
        if isinstance(after, GpuError):
            raise CopyError(f"the engine's stream could not be marked: {after}")
        with self._memory_of(blocks) as memory:
            direction.copy(self._map, parts, after, memory)
        return sum(len(each.indexes) * self._map.block_bytes(each.group) for each in blocks)

    @contextlib.contextmanager
    def _memory_of(self, blocks: list[Blocks]) -> Iterator[PinnedMemory | None]:
        """The memory that these slots lie in, kept pinned meanwhile; None for an earlier one."""
        memory = self._memory
        starts = [int(start) for each in blocks for start in each.starts[:1]]
        if memory is None or not all(memory.holds(start) for start in starts):
            yield None
            return
        with memory.used() as usable:
            yield memory if usable else None

    def _measured(self, group: int) -> tuple[Way, Way]:
        out, back = measured_ways(self._gpu, (self._out, self._in), self._page_bytes(group))
        return out, back

    def _page_bytes(self, group: int) -> int:
        return self._map.block_bytes(group) // self._map.pages_per_block[group]
