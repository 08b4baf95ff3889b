"""What `CupyGpu` asks of CuPy and the driver, where neither is here; `test_gpu` has both."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from storage_tiers import cupy_gpu
from storage_tiers.cupy_gpu import CupyGpu
from storage_tiers.gpu import Copies, GpuError
from storage_tiers.hbm import address_of

NOT_CURRENT = 201  # CUDA_ERROR_INVALID_CONTEXT
WAIT_S = 20.0


class Cuda:
    """CuPy and the driver's library as far as they are called, and what each thread has done."""

    def __init__(self, *, maps_host: bool = True, has_batch: bool = True) -> None:
        self.thread = threading.local()
        self.calls: list[tuple[Any, ...]] = []
        self.stream = 0  # that kernels go to
        self.runtime = SimpleNamespace(
            cudaDevAttrCanUseHostPointerForRegisteredMem=91,
            deviceGetAttribute=lambda attribute, device: int(maps_host),
            setDevice=lambda device: setattr(self.thread, "device", device),
            memcpyAsync=lambda *arguments: self.calls.append(("memcpyAsync", *arguments)),
            hostRegister=self._host_register,
        )
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(
                runtime=self.runtime,
                compiler=SimpleNamespace(CompileException=KeyError),
                Device=lambda number: Device(),
                Stream=lambda non_blocking: Stream(self),
            ),
            RawModule=lambda code: SimpleNamespace(get_function=self._kernel),
        )
        self.driver = SimpleNamespace(cuThreadExchangeStreamCaptureMode=self._exchange)
        if has_batch:
            self.driver.cuMemcpyBatchAsync = Function(self._batch)

    def _host_register(self, address: int, size: int, flags: int) -> None:
        if getattr(self.thread, "mode", 0) == 0:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported")
        self.calls.append(("hostRegister", address, size, flags))

    def _kernel(self, name: str) -> Callable[..., None]:
        def launch(grid: Any, block: Any, arguments: tuple[Any, ...]) -> None:
            kinds = [type(each) for each in arguments]
            assert kinds == [np.uint64, np.uint32, np.uint32], "what the kernel takes"
            self.calls.append((name, self.stream, *map(int, arguments)))

        return launch

    def _exchange(self, mode: Any) -> int:
        self.thread.mode = mode._obj.value
        return 0

    def _batch(self, *arguments: Any) -> int:
        if not hasattr(self.thread, "device"):
            return NOT_CURRENT
        target, source, sizes, count, attributes, first, kinds, failed, stream = arguments
        rows = [np.ctypeslib.as_array(ctypes.cast(each, ctypes.POINTER(ctypes.c_uint64)), (count,))
                for each in (target, source, sizes)]  # fmt: skip
        self.calls.append(
            ("batch", *(row.tolist() for row in rows), attributes._obj.source_order, stream)
        )
        assert (kinds, first._obj.value) == (1, 0) and failed._obj.value == 0
        return 0


class Stream:
    """CuPy's, which is the current one as long as it is entered."""

    ptr = 77

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def __enter__(self) -> None:
        self._cuda.stream = self.ptr

    def __exit__(self, *error: object) -> None:
        self._cuda.stream = 0


class Device:
    """CuPy's leaves a device alone that the thread has by default, and makes it current after."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class Function:
    """A library's, of which argument types can be said."""

    def __init__(self, body: Callable[..., int]) -> None:
        self._body = body

    def __call__(self, *arguments: Any) -> int:
        return self._body(*arguments)


def gpu_of(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> CupyGpu:
    monkeypatch.setitem(sys.modules, "cupy", cuda.cupy)
    monkeypatch.setattr(cupy_gpu, "_driver", lambda: cuda.driver)
    return CupyGpu(0)


def in_a_thread(call: Callable[[], None]) -> list[GpuError]:
    failed: list[GpuError] = []

    def run() -> None:
        try:
            call()
        except GpuError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WAIT_S)
    return failed


def copies(*rows: tuple[int, int, int]) -> Copies:
    return Copies(*(np.array(each, dtype=np.uint64) for each in zip(*rows, strict=True)))


def test_a_threads_first_call_may_be_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver needs the context current; CuPy does not see to that for device 0."""
    cuda = Cuda()
    gpu = gpu_of(cuda, monkeypatch)
    rows = copies((1, 10, 100), (2, 20, 200))
    assert not in_a_thread(lambda: gpu.copy(7, rows, to_host=True, pinned=True))
    assert not in_a_thread(lambda: gpu.copy(8, rows, to_host=False, pinned=True))
    assert cuda.calls == [
        ("batch", [10, 20], [1, 2], [100, 200], 1, 7),  # in stream order
        ("batch", [1, 2], [10, 20], [100, 200], 3, 8),  # in any order
    ]


@pytest.mark.parametrize(
    ("cuda", "pinned"),
    [(Cuda(), False), (Cuda(maps_host=False), True), (Cuda(has_batch=False), True)],
    ids=["not pinned", "other addresses", "an old driver"],
)
def test_where_a_batch_cannot_be_it_is_a_copy_each(
    cuda: Cuda, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = gpu_of(cuda, monkeypatch)
    gpu.copy(7, copies((1, 10, 100), (2, 20, 200)), to_host=False, pinned=pinned)
    gpu.copy(7, copies((3, 30, 300)), to_host=True, pinned=pinned)
    assert cuda.calls == [
        ("memcpyAsync", 1, 10, 100, 1, 7),
        ("memcpyAsync", 2, 20, 200, 1, 7),
        ("memcpyAsync", 30, 3, 300, 2, 7),
    ]


def test_other_threads_captures_do_not_stop_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    gpu = gpu_of(cuda, monkeypatch)
    assert not in_a_thread(lambda: gpu.pin(4096, 8192))
    assert cuda.calls == [("hostRegister", 4096, 8192, 3)]


@pytest.mark.parametrize(
    ("target", "source", "size", "kernel"),
    [
        (256, 512, 64, ("copy_pieces_16", 4)),
        (256, 512, 72, ("copy_pieces_1", 72)),
        (264, 512, 64, ("copy_pieces_1", 64)),
        (256, 513, 64, ("copy_pieces_1", 64)),
    ],
)
def test_pieces_go_in_units_that_all_of_them_are_aligned_to(
    target: int, source: int, size: int, kernel: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda()
    gpu = gpu_of(cuda, monkeypatch)
    pieces = np.array([[1024, 2048], [target, source], [4096, 8192]], dtype=np.uint64)
    stream = gpu.stream()
    gpu.copy_pieces(stream, pieces, size)
    name, units = kernel
    assert cuda.calls == [(name, stream, address_of(pieces), 3, units)]
