"""What makes bytes of two engines mean the same, and the keys made from it.

Everything that decides whether KV bytes are interchangeable goes into the fingerprint: model and
weights, dtypes, layout, parallel shape, tokens per block, engine version, tenant. Its digest is
the namespace that every key is hashed with, so engines that differ anywhere share nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from storage_tiers.base import KEY_BYTES, Key


def namespace_of(fingerprint: Mapping[str, str]) -> bytes:
    """32 bytes: SHA-256 of the fields as canonical JSON."""
    text = json.dumps(dict(fingerprint), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def key_of(
    namespace: bytes, block_hash: bytes, group: int, *, salt: bytes = b"", tag: int = 0
) -> Key:
    """The key of a chunk: BLAKE2b-120 of block hash and cache group, and the tenant's tag.

    The hash is keyed with the namespace and the tenant's salt, 64 bytes at most together.
    `block_hash` is the engine's chained hash of the chunk's last block; it covers all tokens
    before it.
    """
    digest = hashlib.blake2b(block_hash, digest_size=KEY_BYTES - 1, key=namespace + salt)
    digest.update(group.to_bytes(4, "big"))
    return Key(digest.digest() + bytes([tag]))
