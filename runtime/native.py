"""What compiled kernels need and numba does not offer: loads, stores, prefetch, wide products.

Kernels work on memory that Python owns and name it by address, because unboxing a dozen arrays
would cost a call more than the work it does. Whoever passes an address guarantees that the memory
outlives the call. Importing this module imports numba, so it is imported only by kernels.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic
from numpy.typing import NDArray

HUGE_BYTES: Final = 2 << 20
"""From this size on memory is mapped by itself: it goes back at once, and may use huge pages."""

COMPILING_S: Final = 60.0  # no kernel takes another program longer, unless that hangs
LOCK_POLL_S: Final = 0.02

READ_U32: Final = types.Array(types.uint32, 1, "C", readonly=True)
READ_U64: Final = types.Array(types.uint64, 1, "C", readonly=True)
WORDS: Final = types.Array(types.int64, 1, "C")


def kernel(signature: Any, *, keep: bool = True) -> Callable[[Any], Any]:
    """Compile for one signature now; the result is kept on disk where there is a place for it.

    What is kept is used for as long as the kernel's module, and those whose parts it is made of,
    are what they were.
    """

    def compiled(function: Any) -> Any:
        dispatcher = _kept(function) if keep else None
        if dispatcher is None:
            dispatcher = njit(nogil=True)(function)
        with _one_at_a_time(dispatcher):
            dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compiled


def _kept(function: Any) -> Any:
    """None if nothing can be kept."""
    dispatcher: Any = njit(nogil=True)(function)
    try:
        dispatcher.enable_caching()
        # numba looks at the kernel's own file alone: a constant changed in another would be seen
        # by some kernels and not by others, and they write to addresses.
        cache_file = dispatcher._cache._cache_file  # noqa: SLF001 (it has no public way)
        cache_file._source_stamp = _digest(_sources(function))  # noqa: SLF001
    except RuntimeError as error:
        # numba found no folder it may write to: an install that is read-only, without a home.
        if "cannot cache" not in str(error):
            raise
        return None
    except AttributeError:  # another numba, that keeps its stamp elsewhere
        return None
    return dispatcher


@contextmanager
def _one_at_a_time(dispatcher: Any) -> Iterator[None]:
    """Of several programs that start on a machine at once one compiles, the others read it."""
    try:
        folder = os.open(dispatcher._cache.cache_path, os.O_RDONLY | os.O_DIRECTORY)  # noqa: SLF001
    except (AttributeError, TypeError, OSError):  # nothing is kept, or not in a folder
        yield
        return
    end_s = time.monotonic() + COMPILING_S
    try:
        while not _locked(folder) and time.monotonic() < end_s:
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(folder)


def _locked(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _sources(function: Any) -> tuple[str, ...]:
    """Files of all modules whose compiled parts or constants a kernel's module takes."""
    modules: dict[str, ModuleType] = {}
    wanted = [sys.modules[function.__module__]]
    while wanted:
        module = wanted.pop()
        if module.__name__ in modules:
            continue
        modules[module.__name__] = module
        for value in vars(module).values():
            if isinstance(value, Dispatcher):
                wanted.append(sys.modules[value.py_func.__module__])
            elif isinstance(value, ModuleType) and "inlined" in vars(value):
                wanted.append(value)
    files = {m.__file__ for m in modules.values() if m.__file__ is not None}
    return tuple(sorted(files | {__file__}))


@cache
def _digest(files: tuple[str, ...]) -> str:
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def inlined(function: Any) -> Any:
    """A part of kernels, compiled into each of them."""
    return njit(nogil=True)(function)


def zeros(count: int, dtype: Any) -> NDArray[Any]:
    """An array for good; `Growing` is for one that changes its size."""
    size_bytes = count * np.dtype(dtype).itemsize
    if size_bytes < HUGE_BYTES:
        return np.zeros(count, dtype=dtype)
    return np.frombuffer(_mapped(size_bytes), dtype=dtype)


class Growing:
    """Zeros that become more or fewer in place: once they are big nothing is copied.

    Nothing else may refer to `array` while it is resized, or BufferError is raised.
    """

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._mapping: mmap.mmap | None = None
        self.array: NDArray[Any] = np.zeros(0, dtype=dtype)

    def resize(self, count: int) -> None:
        """The first ones are kept, new ones are zeros."""
        size_bytes = count * self._dtype.itemsize
        if size_bytes < HUGE_BYTES:
            small = np.zeros(count, dtype=self._dtype)
            kept = min(count, len(self.array))
            small[:kept] = self.array[:kept]
            self.array, self._mapping = small, None
        elif self._mapping is None:
            self._mapping = _mapped(size_bytes)
            big = np.frombuffer(self._mapping, dtype=self._dtype, count=count)
            big[: len(self.array)] = self.array
            self.array = big
        else:
            self.array[count : count + mmap.PAGESIZE] = 0  # the last page stays as it is
            self.array = np.zeros(0, dtype=self._dtype)
            self._mapping.resize(size_bytes)
            self.array = np.frombuffer(self._mapping, dtype=self._dtype, count=count)


def _mapped(size_bytes: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them: small pages do as well
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _pointer(builder: Any, base: Any, index: Any, bits: int) -> Any:
    kind = ir.IntType(bits).as_pointer()
    return builder.gep(builder.inttoptr(base, kind), [index])


def _loading(bits: int) -> Any:
    def load(typing: Any, base: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args[0], args[1], bits))
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        kind = types.uint64 if bits == 64 else types.int64
        return kind(types.int64, types.int64), generate

    return intrinsic(load)


def _storing(bits: int) -> Any:
    def store(typing: Any, base: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            stored = args[2] if bits == 64 else builder.trunc(args[2], ir.IntType(bits))
            builder.store(stored, _pointer(builder, args[0], args[1], bits))
            return context.get_dummy_value()

        kind = types.uint64 if bits == 64 else types.int64
        return types.void(types.int64, types.int64, kind), generate

    return intrinsic(store)


load64: Final = _loading(64)
"""The n-th uint64 from an address."""
load32: Final = _loading(32)
"""The n-th uint32 from an address, as int64."""
store64: Final = _storing(64)
store32: Final = _storing(32)


@intrinsic
def prefetch(typing: Any, place: Any) -> Any:
    """Ask for the cache line at an address; never faults."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        pointer = builder.inttoptr(args[0], byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def fold_product(typing: Any, a: Any, b: Any) -> Any:
    """Both halves of the 128-bit product, xored."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide, word = ir.IntType(128), ir.IntType(64)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        high = builder.trunc(builder.lshr(product, wide(64)), word)
        return builder.xor(builder.trunc(product, word), high)

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def swapped(typing: Any, value: Any) -> Any:
    """The bytes of a word in reverse."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bswap(args[0])

    return types.uint64(types.uint64), generate


@intrinsic
def trailing_zeros(typing: Any, value: Any) -> Any:
    """Of a word that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate
