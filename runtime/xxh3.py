"""XXH3-64 with a seed, compiled: many equal windows of one token array in one call.

The hash is defined by its published specification; lengths up to 8 bytes are left out, because no
block is that short in practice. Importing this module compiles (seconds, once a machine).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import types, uint64

from runtime.native import (
    READ_U64,
    address,
    fold_product,
    inlined,
    kernel,
    load64,
    store64,
    swapped,
)

COMPILED_BYTES_MIN: Final = 9

_SECRET: Final = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    dtype=np.uint64,
)
_P32: Final = [uint64(p) for p in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)]
_P64_1: Final = uint64(0x9E3779B185EBCA87)
_P64_2: Final = uint64(0xC2B2AE3D27D4EB4F)
_P64_3: Final = uint64(0x165667B19E3779F9)
_P64_4: Final = uint64(0x85EBCA77C2B2AE63)
_P64_5: Final = uint64(0x27D4EB2F165667C5)
_LANES: Final = np.array(
    [_P32[2], _P64_1, _P64_2, _P64_3, _P64_4, _P32[1], _P64_5, _P32[0]], dtype=np.uint64
)
_PRIME32_1: Final = _P32[0]
_AVALANCHE: Final = uint64(0x165667919E3779F9)
_LOW_HALF: Final = uint64(0xFFFFFFFF)
_FLIP_LOW: Final = uint64(int(_SECRET[3]) ^ int(_SECRET[4]))
_FLIP_HIGH: Final = uint64(int(_SECRET[5]) ^ int(_SECRET[6]))
_STRIPES: Final = 16  # between two scrambles


@inlined
def _avalanched(h):  # type: ignore[no-untyped-def]
    h ^= h >> uint64(37)
    h *= _AVALANCHE
    return h ^ (h >> uint64(32))


@inlined
def of_two_words(first, second, length, seed):  # type: ignore[no-untyped-def]
    """Of 9 to 16 bytes: their first 8 and their last 8."""
    low = first ^ (_FLIP_LOW + seed)
    high = second ^ (_FLIP_HIGH - seed)
    return _avalanched(uint64(length) + swapped(low) + high + fold_product(low, high))


@inlined
def _mixed(data, secret, seed):  # type: ignore[no-untyped-def]
    return fold_product(
        load64(data, 0) ^ (load64(secret, 0) + seed), load64(data, 1) ^ (load64(secret, 1) - seed)
    )


@inlined
def _of_a_few(data, length, secret, seed):  # type: ignore[no-untyped-def]
    """17 to 128 bytes: pairs of 16 from both ends to the middle."""
    h = uint64(length) * _P64_1
    end = data + length
    for pair in range((length - 1) // 32, -1, -1):
        h += _mixed(data + 16 * pair, secret + 32 * pair, seed)
        h += _mixed(end - 16 * (pair + 1), secret + 32 * pair + 16, seed)
    return _avalanched(h)


@inlined
def _of_some(data, length, secret, seed):  # type: ignore[no-untyped-def]
    """129 to 240 bytes."""
    h = uint64(length) * _P64_1
    for i in range(8):
        h += _mixed(data + 16 * i, secret + 16 * i, seed)
    h = _avalanched(h)
    for i in range(8, length // 16):
        h += _mixed(data + 16 * i, secret + 16 * (i - 8) + 3, seed)
    return _avalanched(h + _mixed(data + length - 16, secret + 119, seed))


@inlined
def _accumulate(lanes, data, secret):  # type: ignore[no-untyped-def]
    for i in range(8):
        value = load64(data, i)
        keyed = value ^ load64(secret, i)
        lanes[i ^ 1] += value
        lanes[i] += (keyed & _LOW_HALF) * (keyed >> uint64(32))


@inlined
def _of_many(data, length, secret, lanes):  # type: ignore[no-untyped-def]
    """More than 240 bytes; the seed is in the secret already."""
    lanes[:] = _LANES
    stripes = (length - 1) // 64
    for stripe in range(stripes):
        at = stripe % _STRIPES
        _accumulate(lanes, data + 64 * stripe, secret + 8 * at)
        if at == _STRIPES - 1:
            for i in range(8):
                lane = lanes[i]
                lane ^= lane >> uint64(47)
                lanes[i] = (lane ^ load64(secret, 16 + i)) * _PRIME32_1
    _accumulate(lanes, data + length - 64, secret + 121)
    h = uint64(length) * _P64_1
    for i in range(4):
        left = lanes[2 * i] ^ load64(secret + 11, 2 * i)
        right = lanes[2 * i + 1] ^ load64(secret + 11, 2 * i + 1)
        h += fold_product(left, right)
    return _avalanched(h)


@kernel(
    types.void(
        types.int64, types.int64, types.int64, types.int64, types.uint64, types.int64, types.int64
    )
)
def hash_windows(data, count, length, stride, seed, secret, out):  # type: ignore[no-untyped-def]
    """Hash `count` windows of `length` bytes (9 or more), `stride` bytes apart, from `data` on.

    `secret` and `out` are addresses too: the 192 bytes and `count` words.
    """
    if length <= 16:
        for n in range(count):
            at = data + n * stride
            first, last = load64(at, 0), load64(at + length - 8, 0)
            store64(out, n, of_two_words(first, last, length, seed))
    elif length <= 128:
        for n in range(count):
            store64(out, n, _of_a_few(data + n * stride, length, secret, seed))
    elif length <= 240:
        for n in range(count):
            store64(out, n, _of_some(data + n * stride, length, secret, seed))
    else:
        own = np.empty(24, dtype=np.uint64)
        for i in range(12):
            own[2 * i] = load64(secret, 2 * i) + seed
            own[2 * i + 1] = load64(secret, 2 * i + 1) - seed
        lanes = np.empty(8, dtype=np.uint64)
        for n in range(count):
            store64(out, n, _of_many(data + n * stride, length, own.ctypes.data, lanes))


@kernel(types.void(READ_U64, types.uint64, types.int64))
def chain(local, seed, out):  # type: ignore[no-untyped-def]
    """Each block's hash chained to all before it, written to the address `out`."""
    if len(local):
        h = local[0]
        store64(out, 0, h)
        for n in range(1, len(local)):
            h = of_two_words(h, local[n], 16, seed)
            store64(out, n, h)


SECRET_ADDRESS: Final = address(_SECRET)
