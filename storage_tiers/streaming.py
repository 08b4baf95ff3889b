"""Copying many pieces of memory past the CPU's caches, in one native call.

A chunk's pages are far apart and larger together than any cache. memcpy of one page reads the
target's cache lines only to overwrite them, because it stores past the cache ("non-temporal") only
from a size on that a page never has; and the processor's prefetcher begins anew at each page. So
this copies whole lines with non-temporal stores, and asks for the next page's lines before it is
reached. A piece costs two transfers of memory instead of three, and the engine keeps its cache.

The loop is in LLVM's assembly language, compiled by llvmlite, which comes with vLLM. Where there is
none, pieces are copied by memmove.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from string import Template
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.uint64]

LINE: Final = 64
_STEP: Final = 4 * LINE  # a turn of the loop
_AHEAD: Final = 2048  # bytes from a load to its prefetch; 1 to 16 KiB were equally fast

# copy(targets, sources, count, size): `size` is a multiple of _STEP, targets of LINE. The fence
# at the end orders the stores before whatever tells others of them.
_SOURCE = Template("""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define void @copy(ptr %targets, ptr %sources, i64 %count, i64 %size) {
entry:
  %last = sub i64 %count, 1
  br label %piece

piece:
  %index = phi i64 [ 0, %entry ], [ %index.next, %piece.end ]
  %index.next = add i64 %index, 1
  %is.last = icmp eq i64 %index, %last
  %index.following = select i1 %is.last, i64 %last, i64 %index.next
  %target.at = getelementptr ptr, ptr %targets, i64 %index
  %target = load ptr, ptr %target.at
  %source.at = getelementptr ptr, ptr %sources, i64 %index
  %source = load ptr, ptr %source.at
  %following.at = getelementptr ptr, ptr %sources, i64 %index.following
  %following = load ptr, ptr %following.at
  br label %lines

lines:
  %at = phi i64 [ 0, %piece ], [ %at.next, %lines ]
  %ahead = add i64 %at, $ahead
  %beyond = sub i64 %ahead, %size
  %inside = icmp ult i64 %ahead, %size
  %soon.of = select i1 %inside, ptr %source, ptr %following
  %soon.at = select i1 %inside, i64 %ahead, i64 %beyond
  %soon = getelementptr i8, ptr %soon.of, i64 %soon.at
  %from = getelementptr i8, ptr %source, i64 %at
  %to = getelementptr i8, ptr %target, i64 %at$lines
  %at.next = add i64 %at, $step
  %more = icmp ult i64 %at.next, %size
  br i1 %more, label %lines, label %piece.end

piece.end:
  %done = icmp eq i64 %index, %last
  br i1 %done, label %end, label %piece

end:
  fence seq_cst
  ret void
}

!0 = !{i32 1}
""")
_ONE_LINE = Template("""
  %soon.$number = getelementptr i8, ptr %soon, i64 $offset
  call void @llvm.prefetch.p0(ptr %soon.$number, i32 0, i32 0, i32 1)
  %from.$number = getelementptr i8, ptr %from, i64 $offset
  %to.$number = getelementptr i8, ptr %to, i64 $offset
  %line.$number = load <8 x i64>, ptr %from.$number, align 1
  store <8 x i64> %line.$number, ptr %to.$number, align 64, !nontemporal !0
""")


def copy_pieces(targets: Addresses, sources: Addresses, size: int) -> None:
    """Copy `size` bytes from each source address to the target address at its place.

    Other threads run meanwhile (the GIL is released). The caller vouches for the memory: nothing
    is checked. No target may overlap a source.
    """
    assert targets.shape == sources.shape and targets.dtype == sources.dtype == np.uint64
    if not len(targets) or not size:
        return
    compiled = _compiled()
    if compiled is None or size % _STEP or np.any(targets % LINE):
        for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
            ctypes.memmove(target, source, size)
        return
    targets, sources = np.ascontiguousarray(targets), np.ascontiguousarray(sources)
    compiled.copy(targets.ctypes.data, sources.ctypes.data, len(targets), size)


def prepare() -> None:
    """Compile now, which takes up to half a second, rather than at the first copy."""
    _compiled()


class _Compiled(NamedTuple):
    copy: Callable[[int, int, int, int], None]
    engine: Any  # owns the code


@cache
def _compiled() -> _Compiled | None:
    """The loop, or None where llvmlite is missing."""
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    lines = "".join(
        _ONE_LINE.substitute(number=number, offset=number * LINE) for number in range(_STEP // LINE)
    )
    module = llvm.parse_assembly(_SOURCE.substitute(lines=lines, ahead=_AHEAD, step=_STEP))
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    engine: Any = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return _Compiled(kind(engine.get_function_address("copy")), engine)
