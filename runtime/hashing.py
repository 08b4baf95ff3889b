"""How tokens become the hashes that name blocks of KV, the same in every router and engine.

A complete block's *local* hash is XXH3-64 of its tokens, each as four little-endian bytes; an
incomplete last block has none. A *sequence* hash chains the local hashes, so that equal sequence
hashes mean equal tokens from the start on. What else decides the KV goes into the seed (LoRA
adapter, cache namespace) or behind the tokens of a block (images and other media).

Hashing is compiled on first use, not on import; a call costs about a microsecond and then less
than a nanosecond a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

if TYPE_CHECKING:
    from types import ModuleType

SEED: Final = 1337
_NAMESPACE_SEED: Final = 1
_WORD: Final = (1 << 64) - 1
_DIGEST_DIGITS: Final = 64

Hashes = NDArray[np.uint64]


def seed_for(lora: str | None = None, cache_namespace: str | None = None) -> int:
    """The seed of local hashes; an empty name is none."""
    seed = SEED
    if lora:
        seed += xxhash.xxh3_64_intdigest(lora.encode(), seed=0)
    if cache_namespace:
        seed += xxhash.xxh3_64_intdigest(cache_namespace.encode(), seed=_NAMESPACE_SEED)
    return seed & _WORD


def media_hash(identifier: str) -> int:
    """Of an image or other medium: the start of a hexadecimal digest, else the name's own hash."""
    if len(identifier) == _DIGEST_DIGITS:
        try:
            return int.from_bytes(bytes.fromhex(identifier)[:8], "big")
        except ValueError:
            pass  # 64 characters, but no digest
    return xxhash.xxh3_64_intdigest(identifier.encode(), seed=0)


def block_hashes(
    tokens: Sequence[int] | NDArray[np.uint32],
    block_tokens: int,
    *,
    seed: int = SEED,
    media: Mapping[int, Sequence[int]] | None = None,
    eagle: bool = False,
) -> Hashes:
    """Local hashes of the complete blocks.

    `media` names, by block, the hashes of what is embedded in it. With `eagle` (speculative heads
    that look one token ahead) a block includes the first token of the next.
    """
    assert block_tokens > 0
    given = np.ascontiguousarray(tokens, dtype="<u4")
    window = block_tokens + 1 if eagle else block_tokens
    count = max(0, (len(given) - window) // block_tokens + 1)
    hashes = _windows(given.view(np.uint8), count, 4 * window, 4 * block_tokens, seed)
    for block, embedded in (media or {}).items():
        if embedded and 0 <= block < count:
            first = block * block_tokens
            tail = np.sort(np.asarray(embedded, dtype="<u8")).tobytes()
            hashed = given[first : first + window].tobytes() + tail
            hashes[block] = xxhash.xxh3_64_intdigest(hashed, seed=seed)
    return hashes


def sequence_hashes(local: Hashes) -> Hashes:
    """Each block's hash together with all before it."""
    given = np.ascontiguousarray(local, dtype=np.uint64)
    hashes = np.empty(len(given), dtype=np.uint64)
    _kernels().chain(given, SEED, hashes.ctypes.data)
    return hashes


def xxh3_64(data: bytes, seed: int = 0) -> int:
    """Of any bytes, by the same code as blocks."""
    whole = np.frombuffer(data, dtype=np.uint8)
    return int(_windows(whole, 1, len(data), len(data), seed)[0])


def _windows(
    data: NDArray[np.uint8], count: int, length: int, stride: int, seed: int
) -> NDArray[np.uint64]:
    assert count == 0 or (count - 1) * stride + length <= len(data)
    hashes = np.empty(count, dtype=np.uint64)
    compiled = _kernels()
    if length >= compiled.COMPILED_BYTES_MIN:
        compiled.hash_windows(
            data.ctypes.data,
            count,
            length,
            stride,
            seed,
            compiled.SECRET_ADDRESS,
            hashes.ctypes.data,
        )
        return hashes
    for n in range(count):
        window = data[n * stride : n * stride + length].tobytes()
        hashes[n] = xxhash.xxh3_64_intdigest(window, seed=seed)
    return hashes


def _kernels() -> ModuleType:
    from runtime import xxh3

    return xxh3
