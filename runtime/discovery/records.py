"""What the files of `FileStore` hold: a line of text that a person can read, then the bytes."""

from __future__ import annotations

import math
import re
from typing import Final
from zlib import crc32

from runtime.discovery.base import VALUE_BYTES_MAX

LEASE_BYTES_MAX: Final = 64
VALUE_FILE_BYTES_MAX: Final = VALUE_BYTES_MAX + 64

_LEASE = re.compile(rb"kvbm-lease 1 ttl_s=([0-9.]{1,20})\n")
_VALUE = re.compile(rb"kvbm-value 1 lease=([0-9a-f]{16}) crc32=([0-9a-f]{8})\n")


class RecordBroken(Exception):
    """Not what we write, or damaged; the message says which."""


def encode_lease(ttl_s: float) -> bytes:
    return b"kvbm-lease 1 ttl_s=%.3f\n" % ttl_s


def decode_lease(content: bytes) -> float:
    match = _LEASE.fullmatch(content)
    try:
        ttl_s = float(match[1]) if match is not None else math.nan
    except ValueError:
        ttl_s = math.nan
    if not ttl_s > 0:
        raise RecordBroken("not a lease of ours")
    return ttl_s


def encode_value(lease: str, value: bytes) -> bytes:
    return b"kvbm-value 1 lease=%s crc32=%08x\n%s" % (lease.encode(), crc32(value), value)


def decode_value(content: bytes) -> tuple[str, bytes]:
    """Lease and value."""
    match = _VALUE.match(content)
    if match is None:
        raise RecordBroken("not a value of ours")
    value = content[match.end() :]
    if crc32(value) != int(match[2], 16):
        raise RecordBroken("the checksum is wrong")
    return match[1].decode(), value
