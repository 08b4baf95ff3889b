"""The kernel's source without a GPU: NVIDIA's compiler takes it, and its threads, run one after the
other on the CPU, copy what they should and nothing else.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage_tiers.cupy_gpu import SOURCE, MemcpyAttributes
from storage_tiers.hbm import Bytes, address_of

COMPILE_TIMEOUT_S = 120
GUARD = 64

# What CUDA gives a kernel, for one thread after the other.
ON_CPU = """
#define __global__
#define __device__
struct uint4 { unsigned x, y, z, w; };
static struct { unsigned x; } threadIdx, blockIdx, blockDim, gridDim;
template <typename T> static T __ldcs(const T* at) { return *at; }
template <typename T> static void __stcs(T* at, T value) { *at = value; }
#include KERNEL
extern "C" void run(unsigned unit, unsigned blocks, unsigned threads, const Piece* pieces,
                    unsigned count, unsigned size) {
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
      (unit == 16 ? copy_pieces_16 : copy_pieces_1)(pieces, count, size);
}
"""

LAYOUT_OF_ATTRIBUTES = """
#include <cstddef>
#include <cuda.h>
static_assert(sizeof(CUmemcpyAttributes) == SIZE, "size");
static_assert(offsetof(CUmemcpyAttributes, srcAccessOrder) == 0, "order");
static_assert(offsetof(CUmemcpyAttributes, flags) == FLAGS, "flags");
static_assert(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM == 1 && CU_MEMCPY_SRC_ACCESS_ORDER_ANY == 3, "");
static_assert(CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE == 1, "flag");
"""

Run = Callable[[int, int, int, int, int, int], None]


def program(*names: str) -> str:
    for name in names:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip(f"there is no {' or '.join(names)} here")


def compiled(*command: str) -> None:
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S
    )
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    compiler = program("g++", "clang++", "c++")
    folder = tmp_path_factory.mktemp("kernel")
    source, library = folder / "on_cpu.cpp", folder / "on_cpu.so"
    source.write_text(ON_CPU)
    options = ("-std=c++17", "-O1", "-shared", "-fPIC", f'-DKERNEL="{SOURCE}"')
    compiled(compiler, *options, "-o", str(library), str(source))
    function = ctypes.CDLL(str(library)).run
    number = ctypes.c_uint
    function.argtypes = [number, number, number, ctypes.c_void_p, number, number]
    function.restype = None
    return function


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvidias_compiler_takes_it(arch: str, tmp_path: Path) -> None:
    binary = tmp_path / "kernel.cubin"
    compiled(
        program("nvcc"), "-cubin", "-std=c++17", f"-arch={arch}", "-Werror", "all-warnings",
        "-o", str(binary), str(SOURCE),
    )  # fmt: skip
    found = binary.read_bytes()
    assert b"copy_pieces_16\0" in found and b"copy_pieces_1\0" in found


def test_the_drivers_attributes_are_laid_out_as_we_say(tmp_path: Path) -> None:
    source = tmp_path / "attributes.cu"
    source.write_text(LAYOUT_OF_ATTRIBUTES)
    sizes = f"-DSIZE={ctypes.sizeof(MemcpyAttributes)}", f"-DFLAGS={MemcpyAttributes.flags.offset}"
    compiled(program("nvcc"), "-c", *sizes, "-o", str(tmp_path / "attributes.o"), str(source))


@pytest.mark.parametrize("unit", [16, 1])
@pytest.mark.parametrize("grid", [(1, 32), (3, 64), (16, 512)], ids=str)
@pytest.mark.parametrize("units", [1, 31, 32, 127, 129, 512, 513, 1500])
def test_random_pieces_are_bit_exact_and_all_else_is_untouched(
    run: Run, unit: int, grid: tuple[int, int], units: int
) -> None:
    """Also where a piece has fewer units than a warp has lanes, and more than a part."""
    random = np.random.default_rng(units)
    for count in (1, 2, 7, 40):
        size = units * unit
        step = size + GUARD
        sources, targets = aligned(count * step), aligned(count * step)
        sources[:] = random.integers(0, 256, count * step, dtype=np.uint8)
        targets[:] = 0xA5
        expected = targets.copy()
        pieces = np.empty((count, 2), dtype=np.uint64)
        places = random.permutation(count) * step
        for index, (target, source) in enumerate(zip(places, np.sort(places), strict=True)):
            pieces[index] = address_of(targets) + target, address_of(sources) + source
            expected[target : target + size] = sources[source : source + size]
        before = sources.copy()
        run(unit, *grid, address_of(pieces), count, units)
        np.testing.assert_array_equal(targets, expected)
        np.testing.assert_array_equal(sources, before)


def aligned(size: int) -> Bytes:
    """Random bytes' place, on a multiple of 16."""
    whole = np.empty(size + 16, dtype=np.uint8)
    start = -address_of(whole) % 16
    return whole[start : start + size]
