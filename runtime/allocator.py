"""How the C library gives memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

_M_MMAP_THRESHOLD: Final = -3  # of <malloc.h>
_MAPPED_FROM_BYTES: Final = 1 << 20


def map_large_blocks() -> None:
    """Have every block of a mebibyte or more mapped by itself, so that freeing it gives it back.

    glibc raises that size up to 32 MiB by what it has seen freed. A table that grows by copying
    then leaves holes in the heap: a fifth of the daemon's memory at a million chunks. Does nothing
    with another C library.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
