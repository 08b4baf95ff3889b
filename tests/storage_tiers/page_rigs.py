"""Engines' KV memory in every layout and place that pages are copied from and to, for one suite."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest

from storage_tiers.cupy_gpu import CupyGpu
from storage_tiers.device_batches import Way
from storage_tiers.device_pages import DevicePages
from storage_tiers.gpu import GpuUnavailableError
from storage_tiers.hbm import Bytes, HostPages, KvTensor, PageAccess, address_of
from tests.storage_tiers.numpy_gpu import NumpyGpu

BLOCKS = 40
STAGING_BYTES = 1 << 14  # small, so that transfers take many batches
EXTENT_BYTES = 1 << 14
WAIT_S = 20.0


class View(NamedTuple):
    """A tensor of (blocks, page bytes) within a piece of the engine's memory."""

    storage: int
    offset: int
    page_bytes: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """How an engine lays out its KV: its pieces of memory, the tensors in them, and the groups."""

    storages: Sequence[int]  # bytes
    views: Sequence[View]
    groups: Sequence[Sequence[int]]

    def block_bytes(self, group: int) -> int:
        return sum(self.views[view].page_bytes for view in self.groups[group])

    def random(self, seed: int) -> list[Bytes]:
        generator = np.random.default_rng(seed)
        return [generator.integers(0, 256, size, dtype=np.uint8) for size in self.storages]

    def page(self, storages: Sequence[Bytes], view: int, block: int) -> Bytes:
        """One page, said differently than the code says it."""
        place = self.views[view]
        start = place.offset + block * place.stride
        return storages[place.storage][start : start + place.page_bytes]


def layers_apart(layers: int, page: int) -> Layout:
    """LBHNC, MLA: a tensor a layer, K and V of a block together."""
    views = [View(layer, 0, page, page) for layer in range(layers)]
    return Layout([BLOCKS * page] * layers, views, [list(range(layers))])


def keys_and_values_apart(layers: int, page: int) -> Layout:
    """(2, blocks, ...): two tensors a layer, one after the other."""
    views = [
        View(layer, half * BLOCKS * page, page, page) for layer in range(layers) for half in (0, 1)
    ]
    return Layout([2 * BLOCKS * page] * layers, views, [list(range(2 * layers))])


def layers_in_blocks(layers: int, page: int) -> Layout:
    """BLHNC: a layer's pages are as far apart as blocks are long."""
    views = [View(0, layer * page, page, layers * page) for layer in range(layers)]
    return Layout([BLOCKS * layers * page], views, [list(range(layers))])


def packed(page: int) -> Layout:
    """BLHNC as vLLM hands it over: one tensor whose page is the whole block."""
    return Layout([BLOCKS * page], [View(0, 0, page, page)], [[0]])


def groups_apart(first: int, second: int) -> Layout:
    """Two groups with tensors of their own."""
    views = [View(0, 0, first, first), View(1, 0, second, second), View(2, 0, first, first)]
    return Layout([BLOCKS * first, BLOCKS * second, BLOCKS * first], views, [[0, 2], [1]])


LAYOUTS = {
    "LBHNC": layers_apart(6, 2048),
    "K and V apart": keys_and_values_apart(3, 1024),
    "BLHNC": layers_in_blocks(5, 512),
    "BLHNC, packed": packed(5120),
    "MLA, fp8": layers_apart(3, 16 * 576),
    "two groups": groups_apart(1536, 512),
    "overlaid groups": Layout([BLOCKS * 256] * 2, [View(0, 0, 256, 256), View(1, 0, 256, 256)],
                              [[0, 1], [1]]),
    "padded pages": Layout([BLOCKS * 1024], [View(0, 0, 768, 1024)], [[0]]),
    "unaligned": layers_apart(3, 100),
    "one byte": layers_apart(2, 1),
    "a block larger than a buffer": layers_apart(20, STAGING_BYTES // 16),
}  # fmt: skip


class Rig(Protocol):
    """A kind of engine memory, and the `PageAccess` to it."""

    @abstractmethod
    def place(self, storages: Sequence[Bytes]) -> Any:
        """The engine's memory, holding these bytes."""

    @abstractmethod
    def read(self, placed: Any) -> list[Bytes]:
        """What it holds now."""

    @abstractmethod
    def pages(self, layout: Layout, placed: Any) -> PageAccess: ...

    def settle(self, pages: PageAccess) -> None:
        """Until the slots' memory is as it stays."""


class HostRig(Rig):
    def place(self, storages: Sequence[Bytes]) -> Any:
        return [storage.copy() for storage in storages]

    def read(self, placed: Any) -> list[Bytes]:
        return [np.array(storage) for storage in placed]

    def pages(self, layout: Layout, placed: Any) -> PageAccess:
        tensors = [
            np.lib.stride_tricks.as_strided(
                placed[storage][offset:], (BLOCKS, page), (stride, 1), writeable=True
            )
            for storage, offset, page, stride in layout.views
        ]
        return HostPages(tensors, layout.groups)


def until_pinned(pages: PageAccess) -> None:
    assert isinstance(pages, DevicePages) and pages._memory is not None
    pages.fence()  # the engine runs
    pages._memory.wait(WAIT_S)


class NumpyRig(HostRig):
    """The GPU of NumPy arrays; copies go in one way."""

    def __init__(self, way: Way, seed: int = 0) -> None:
        self.gpu = NumpyGpu(seed)
        self._way = way
        self.engine = self.gpu.stream()

    def place(self, storages: Sequence[Bytes]) -> Any:
        placed = super().place(storages)
        for storage in placed:
            self.gpu.own(storage)
        return placed

    def pages(self, layout: Layout, placed: Any) -> DevicePages:
        return DevicePages(
            self.gpu,
            kv_tensors(layout, [address_of(storage) for storage in placed]),
            layout.groups,
            engine_stream=lambda: self.engine,
            owner=placed,
            ways=(self._way, self._way),
            staging_bytes=STAGING_BYTES,
            extent_bytes=EXTENT_BYTES,
        )

    def settle(self, pages: PageAccess) -> None:
        until_pinned(pages)


class CupyRig(Rig):
    """A real GPU."""

    def __init__(self, way: Way) -> None:
        self.gpu = gpu_or_skip()
        self._way = way

    def place(self, storages: Sequence[Bytes]) -> Any:
        import cupy

        return [cupy.asarray(storage) for storage in storages]

    def read(self, placed: Any) -> list[Bytes]:
        return [storage.get() for storage in placed]

    def pages(self, layout: Layout, placed: Any) -> DevicePages:
        return DevicePages(
            self.gpu,
            kv_tensors(layout, [storage.data.ptr for storage in placed]),
            layout.groups,
            engine_stream=lambda: 0,
            owner=placed,
            ways=(self._way, self._way),
            staging_bytes=STAGING_BYTES,
        )

    def settle(self, pages: PageAccess) -> None:
        until_pinned(pages)


def kv_tensors(layout: Layout, addresses: Sequence[int]) -> list[KvTensor]:
    return [
        KvTensor(addresses[storage] + offset, BLOCKS, page, stride)
        for storage, offset, page, stride in layout.views
    ]


def gpu_or_skip() -> CupyGpu:
    try:
        return CupyGpu(0)
    except GpuUnavailableError as error:
        pytest.skip(f"no GPU is seen: {error}")


RIGS = [
    pytest.param(HostRig, id="host"),
    *(pytest.param(lambda way=way: NumpyRig(way), id=f"numpy-{way.value}") for way in Way),
    *(
        pytest.param(lambda way=way: CupyRig(way), id=f"gpu-{way.value}", marks=pytest.mark.gpu)
        for way in Way
    ),
]
