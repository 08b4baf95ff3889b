"""Hashes of blocks against the reference's vectors, and XXH3 against its library."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.hashing import SEED, block_hashes, media_hash, seed_for, sequence_hashes, xxh3_64

SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("tokens", "block_tokens", "seed", "expected"),
    [
        (range(16), 16, seed_for(), [15310707395893867146]),
        (range(32), 16, seed_for(), [15310707395893867146, 15292316782987903195]),
        (range(16), 16, seed_for(lora="my-lora"), [7774427462321301335]),
        (range(16), 16, seed_for(cache_namespace="tenantA"), [1736323509688105881]),
        (range(16), 16, seed_for("my-lora", "tenantA"), [4987558542395039106]),
        (range(1, 9), 4, seed_for(), [14643705804678351452, 16777012769546811212]),
    ],
)
def test_hashes_are_those_of_the_reference(
    tokens: range, block_tokens: int, seed: int, expected: list[int]
) -> None:
    assert block_hashes(list(tokens), block_tokens, seed=seed).tolist() == expected


def test_empty_names_leave_the_seed_as_it_is() -> None:
    assert seed_for("", "") == seed_for(None, None) == SEED


def test_a_seed_wraps_at_64_bits() -> None:
    names = [f"adapter-{n}" for n in range(64)]
    sums = [SEED + xxhash.xxh3_64_intdigest(name.encode(), seed=0) for name in names]
    sums = [s + xxhash.xxh3_64_intdigest(b"space", seed=1) for s in sums]
    assert max(sums) >= 2**64
    assert [seed_for(name, "space") for name in names] == [s % 2**64 for s in sums]


@given(st.integers(0, 4096), SEEDS, st.randoms(use_true_random=False))
@settings(max_examples=400, deadline=None)
def test_any_bytes_hash_as_by_the_library(length: int, seed: int, random: object) -> None:
    data = random.randbytes(length)  # type: ignore[attr-defined]
    assert xxh3_64(data, seed) == xxhash.xxh3_64_intdigest(data, seed=seed)


@pytest.mark.parametrize("seed", [0, SEED, 2**63, 2**64 - 1])
def test_every_length_hashes_as_by_the_library(seed: int) -> None:
    data = np.random.default_rng(seed % 1000).bytes(4096)
    wrong = [
        length
        for length in range(4097)
        if xxh3_64(data[:length], seed) != xxhash.xxh3_64_intdigest(data[:length], seed=seed)
    ]
    assert wrong == []


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=200),
    st.sampled_from([1, 2, 3, 4, 5, 16, 17, 31, 64]),
    SEEDS,
    st.booleans(),
    st.dictionaries(st.integers(0, 12), st.lists(SEEDS, max_size=3), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_blocks_hash_as_their_bytes_do(
    tokens: list[int], block_tokens: int, seed: int, eagle: bool, media: dict[int, list[int]]
) -> None:
    """Windows of one token more with eagle; media behind a block's tokens; no incomplete block."""
    window = block_tokens + eagle
    expected = []
    for block, first in enumerate(range(0, len(tokens) - window + 1, block_tokens)):
        words = b"".join(n.to_bytes(4, "little") for n in tokens[first : first + window])
        words += b"".join(n.to_bytes(8, "little") for n in sorted(media.get(block, ())))
        expected.append(xxhash.xxh3_64_intdigest(words, seed=seed))
    hashes = block_hashes(tokens, block_tokens, seed=seed, media=media, eagle=eagle)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == expected


@given(st.lists(SEEDS, max_size=20))
@settings(deadline=None)
def test_sequence_hashes_chain_local_ones(local: list[int]) -> None:
    expected = local[:1]
    for h in local[1:]:
        pair = expected[-1].to_bytes(8, "little") + h.to_bytes(8, "little")
        expected.append(xxhash.xxh3_64_intdigest(pair, seed=SEED))
    assert sequence_hashes(np.array(local, dtype=np.uint64)).tolist() == expected


def test_media_are_named_by_their_digest_or_hashed() -> None:
    digest = "00ff" * 16
    assert media_hash(digest) == 0x00FF00FF00FF00FF
    for name in ("picture.png", "z" * 64, ""):
        assert media_hash(name) == xxhash.xxh3_64_intdigest(name.encode(), seed=0)


def test_tokens_may_be_read_only_or_strided() -> None:
    tokens = np.arange(64, dtype=np.uint32)
    frozen = np.frombuffer(tokens.tobytes(), dtype=np.uint32)
    assert (block_hashes(frozen, 16) == block_hashes(tokens, 16)).all()
    assert (block_hashes(tokens[::2], 16) == block_hashes(tokens[::2].copy(), 16)).all()


def test_importing_the_router_does_not_import_the_compiler() -> None:
    code = (
        "import sys; import runtime.hashing, router.index; "
        "sys.exit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
