"""Arrays in msgpack whose elements all have one size: read and written at once, by numpy.

Hashes of 33 bits and more take 9 bytes each, a marker and the number, so that a list of blocks is
a matrix of bytes: columns that are the same in each row, and columns that are a hash.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Raw

from runtime.events.envelope import WireError

Hashes = npt.NDArray[np.uint64]

_NUMBER: Final = b"\xcf" + bytes(8)


class Rows:
    """Elements of one size: the parts of a template, and a hash between each two of them."""

    def __init__(self, *parts: bytes) -> None:
        self._template = _NUMBER.join(parts)
        ends = list(accumulate(len(part) + len(_NUMBER) for part in parts[:-1]))
        self._columns = [f"hash{number}" for number in range(len(ends))]
        self._row = np.dtype(
            {
                "names": self._columns,
                "formats": [">u8"] * len(ends),
                "offsets": [end - 8 for end in ends],
                "itemsize": len(self._template),
            }
        )

    def read(self, data: memoryview) -> list[Hashes] | None:
        """A column for each hash; None if the array holds anything else."""
        count, start = array_header(data)
        width = len(self._template)
        if not count or count * width != len(data) - start:
            return None
        rest = bytearray(data[start:])
        rows = np.frombuffer(rest, self._row)
        columns = [rows[name].astype(np.uint64) for name in self._columns]
        for name in self._columns:
            rows[name] = 0
        return columns if rest == self._template * count else None

    def write(self, *columns: Hashes) -> Raw | None:
        """None if a hash is so small that msgpack writes it shorter."""
        count = len(columns[0])
        if any(count and int(column.min()) < 1 << 32 for column in columns):
            return None
        written = bytearray(self._template * count)
        rows = np.frombuffer(written, self._row)
        for name, column in zip(self._columns, columns, strict=True):
            rows[name] = column
        return Raw(_header_of(count) + written)


def array_header(data: memoryview) -> tuple[int, int]:
    """How many elements, and where the first begins. Raises WireError."""
    first = data[0] if len(data) else 0
    if first == 0xDC:
        return int.from_bytes(data[1:3], "big"), 3
    if first == 0xDD:
        return int.from_bytes(data[1:5], "big"), 5
    if 0x90 <= first <= 0x9F:
        return first & 0x0F, 1
    raise WireError("no array where blocks or hashes are expected")


def _header_of(count: int) -> bytes:
    if count < 16:
        return bytes((0x90 | count,))
    if count < 1 << 16:
        return b"\xdc" + count.to_bytes(2, "big")
    return b"\xdd" + count.to_bytes(4, "big")
