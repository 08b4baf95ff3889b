"""`Gpu` through CuPy: the one file that imports it, and only when a GPU's memory is to be copied.

CuPy has no call for a batch of copies, so that one is the driver's own: one call instead of one for
each page, in drivers since CUDA 12.8. Every call makes the device current on its thread first; a
thread's first call also makes the device's context current there, which CuPy leaves to the runtime
and the driver's call needs, and takes the thread out of what captures of others forbid.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from storage_tiers.gpu import Copies, Descriptors, GpuError, GpuUnavailableError
from storage_tiers.hbm import address_of

logger = logging.getLogger("kvbm.gpu")

SOURCE: Final = Path(__file__).with_name("copy_pieces.cu")

# Enough warps to keep more than PCIe's bandwidth x delay on the way, on few multiprocessors: the
# engine needs the rest. Chosen by that arithmetic, not measured yet.
_BLOCKS: Final = 16
_THREADS: Final = 512
_UNIT: Final = 16

_PORTABLE, _MAPPED = 1, 2  # cudaHostRegisterPortable, cudaHostRegisterMapped
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost


class MemcpyAttributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h; the location hints matter for managed memory only."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_IN_STREAM_ORDER, _IN_ANY_ORDER = 1, 3  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM, _ANY
_BESIDE_COMPUTE = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE


class CupyGpu:
    """A CUDA device by its index among those the process sees. Raises GpuUnavailableError."""

    def __init__(self, device: int) -> None:
        try:
            import cupy
        except (ImportError, OSError) as error:
            raise GpuUnavailableError(
                f"CuPy is needed to copy KV in the memory of cuda:{device}, and does not import "
                f"({error}): install kvbm-daemon[cuda] for CUDA 12, kvbm-daemon[cuda13] for CUDA 13"
            ) from error
        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        self._device = device
        self._failures: tuple[type[Exception], ...] = (
            RuntimeError,  # what those of the runtime, the driver and the compiler are
            cupy.cuda.compiler.CompileException,
            MemoryError,  # the GPU's, or no more host memory can be locked
            OSError,  # a library of CUDA's that is loaded at its first use
        )
        self._streams: dict[int, Any] = {}
        self._threads = threading.local()  # those that have called
        self._driver = _driver()
        self._batch: _Batch | None = None
        try:
            with self._calls():
                mapped = self._runtime.cudaDevAttrCanUseHostPointerForRegisteredMem
                self.maps_host = bool(self._runtime.deviceGetAttribute(mapped, device))
            # Where the GPU has other addresses for host memory, the driver's call would fault.
            if self.maps_host and self._driver is not None:
                self._batch = _Batch.of(self._driver)
            if self._batch is None:
                logger.warning("no batches of copies (a driver before CUDA 12.8?): one call each")
        except GpuError as error:
            raise GpuUnavailableError(f"CUDA does not work here: {error}") from error
        self._kernels: dict[int, Any] = self._compiled()

    @property
    def has_kernel(self) -> bool:
        return bool(self._kernels)

    def owns(self, address: int) -> bool:
        """Whether this is the device's own memory."""
        with self._calls():
            found = self._runtime.pointerGetAttributes(address)
            is_device = found.type == self._runtime.memoryTypeDevice
            return bool(is_device and found.device == self._device)

    def stream(self) -> int:
        with self._calls():
            stream = self._cupy.cuda.Stream(non_blocking=True)
        self._streams[stream.ptr] = stream
        return int(stream.ptr)

    def mark(self, stream: int) -> object:
        with self._calls():
            # A thread that waits for it sleeps rather than spins.
            event = self._cupy.cuda.Event(block=True, disable_timing=True)
            self._runtime.eventRecord(event.ptr, stream)
        return event

    def wait(self, stream: int, mark: Any) -> None:
        with self._calls():
            self._runtime.streamWaitEvent(stream, mark.ptr)

    def finish(self, mark: Any) -> None:
        with self._calls():
            mark.synchronize()

    def copy(self, stream: int, copies: Copies, *, to_host: bool, pinned: bool) -> None:
        if not len(copies.sizes):
            return
        source, target = (copies.device, copies.host) if to_host else (copies.host, copies.device)
        with self._calls():
            if self._batch is not None and pinned:
                # A slot's bytes stay as they are while it is claimed; the engine's pages are
                # written until the fence that the stream waits for.
                order = _IN_STREAM_ORDER if to_host else _IN_ANY_ORDER
                attributes = MemcpyAttributes(source_order=order, flags=_BESIDE_COMPUTE)
                self._batch.copy(stream, target, source, copies.sizes, attributes)
                return
            kind = _TO_HOST if to_host else _TO_DEVICE
            for each in zip(target.tolist(), source.tolist(), copies.sizes.tolist(), strict=True):
                self._runtime.memcpyAsync(*each, kind, stream)

    def copy_pieces(self, stream: int, pieces: Descriptors, size: int) -> None:
        if not len(pieces) or not size:
            return
        aligned = not (int(np.bitwise_or.reduce(pieces, axis=None)) | size) % _UNIT
        unit = _UNIT if aligned else 1
        arguments = (np.uint64(address_of(pieces)), np.uint32(len(pieces)), np.uint32(size // unit))
        with self._calls(), self._streams[stream]:
            self._kernels[unit]((_BLOCKS,), (_THREADS,), arguments)

    def descriptors(self, count: int) -> Descriptors:
        # CuPy keeps what is given back by size, and to lock new memory can stop the GPU: few sizes.
        size = 1 << max(12, (count * 16 - 1).bit_length())
        with self._calls():
            memory = self._cupy.cuda.alloc_pinned_memory(size)
        return np.frombuffer(memory, dtype=np.uint64, count=2 * count).reshape(count, 2)

    def allocate(self, size: int) -> int:
        with self._calls():
            return int(self._runtime.malloc(size))

    def free(self, address: int) -> None:
        with self._calls():
            self._runtime.free(address)

    def pin(self, address: int, size: int) -> None:
        with self._calls():
            self._runtime.hostRegister(address, size, _PORTABLE | _MAPPED)

    def unpin(self, address: int) -> None:
        with self._calls():
            self._runtime.hostUnregister(address)

    @contextlib.contextmanager
    def _calls(self) -> Iterator[None]:
        try:
            with self._cupy.cuda.Device(self._device):
                if not hasattr(self._threads, "entered"):
                    self._enter()
                yield
        except self._failures as error:
            raise GpuError(f"cuda:{self._device}: {error}") from error

    def _enter(self) -> None:
        """Once on each thread."""
        self._runtime.setDevice(self._device)
        # While a thread captures a graph, as engines do at their start, calls of other threads such
        # as `pin` are refused, and the capture fails too, unless those threads say that they have
        # nothing to do with it. It changes nothing for what this thread captures itself.
        if self._driver is not None:
            mode = ctypes.c_int(_THREAD_LOCAL)
            self._driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        self._threads.entered = True

    def _compiled(self) -> dict[int, Any]:
        """The kernels by the bytes of their unit; none, with a warning, if they don't compile."""
        try:
            with self._calls():
                module = self._cupy.RawModule(code=SOURCE.read_text())
                return {unit: module.get_function(f"copy_pieces_{unit}") for unit in (_UNIT, 1)}
        except GpuError as error:
            logger.warning("no copy kernel, small pages are copied one by one: %s", error)
            return {}


class _Batch:
    """cuMemcpyBatchAsync: many copies in one call of the driver."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        # The plain symbol keeps CUDA 12.8's signature, with `failIdx`, in later drivers as well.
        self._call = driver.cuMemcpyBatchAsync
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._call.argtypes = [pointer] * 3 + [size] + [pointer] * 2 + [size] + [pointer] * 2
        self._call.restype = ctypes.c_int

    @classmethod
    def of(cls, driver: ctypes.CDLL) -> _Batch | None:
        return cls(driver) if hasattr(driver, "cuMemcpyBatchAsync") else None

    def copy(
        self, stream: int, target: Any, source: Any, sizes: Any, attributes: MemcpyAttributes
    ) -> None:
        arrays = [np.ascontiguousarray(each, dtype=np.uint64) for each in (target, source, sizes)]
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        status = self._call(
            *(address_of(each) for each in arrays),
            len(arrays[0]),
            ctypes.byref(attributes),
            ctypes.byref(first),
            1,
            ctypes.byref(failed),
            stream,
        )
        if status:
            raise GpuError(f"cuMemcpyBatchAsync failed with error {status}, copy {failed.value}")


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
