"""An engine's events as the router's: hash vectors, salts, block sizes, what is left out."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from runtime import ledger
from runtime.events.engine_router import EngineRouter
from runtime.events.engine_wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EngineBatch,
    EngineEvent,
    decode_engine_batch,
    number_of,
)
from runtime.events.envelope import WireError
from runtime.events.router_event import Cleared, KvCacheEventData, Removed, Stored
from runtime.hashing import block_hashes, media_hash, sequence_hashes

PLAIN = 15310707395893867146
SALTED = 1736323509688105881


def test_images_are_hashed_by_their_names_in_order_of_their_hashes() -> None:
    digest = "ff" * 8 + "0" * 48
    keys = [[[digest, 0], ["cat", 3]]]
    (data,) = translated(EngineRouter(16), stored([5], extra_keys=keys))
    assert isinstance(data, Stored)
    numbers = sorted([media_hash("cat"), media_hash(digest)])
    wanted = np.arange(16, dtype="<u4").tobytes() + np.array(numbers, "<u8").tobytes()
    assert data.tokens_hashes.tolist() == [xxhash.xxh3_64_intdigest(wanted, 1337)]


def stored(block_hashes: list[Any], parent: Any = None, **other: Any) -> BlockStored:
    size = other.pop("block_size", 16)
    first = other.pop("first_token", 0)
    tokens = list(range(first, first + size * len(block_hashes)))
    return BlockStored(block_hashes, parent, tokens, size, **{"medium": "GPU", **other})


def translated(router: EngineRouter, *events: EngineEvent) -> list[KvCacheEventData]:
    return router.translate(EngineBatch(0.0, list(events), 0, 0))


def test_blocks_are_named_by_their_place_whatever_the_engine_calls_them() -> None:
    router = EngineRouter(16)
    digest = bytes(range(32))
    first, second, gone, cleared = translated(
        router,
        stored([digest, 6]),
        stored([-3], 6, first_token=32),
        BlockRemoved([-3, digest, 99], "GPU"),
        AllBlocksCleared(),
    )
    names = sequence_hashes(block_hashes(range(48), 16))
    assert isinstance(first, Stored)
    assert first.parent_hash is None
    assert first.tokens_hashes.tolist() == [PLAIN, 15292316782987903195]
    assert first.block_hashes.tolist() == names[:2].tolist()
    assert isinstance(second, Stored)
    assert (second.parent_hash, second.block_hashes.tolist()) == (names[1], [names[2]])
    assert isinstance(gone, Removed)
    assert gone.block_hashes.tolist() == [names[2], names[0]]
    assert cleared == Cleared()
    assert router.status().blocks == 0
    router.ledger.check_integrity()


def test_what_is_told_again_comes_to_nothing_and_a_prefix_that_was_lost_comes_back() -> None:
    router = EngineRouter(16)
    names = sequence_hashes(block_hashes(range(64), 16)).tolist()
    assert len(translated(router, stored([1, 2]))) == 1
    assert not translated(router, stored([1, 2]))
    (grown,) = translated(router, stored([1, 2, 3]))
    assert isinstance(grown, Stored)
    assert (grown.parent_hash, grown.block_hashes.tolist()) == (names[1], names[2:3])
    translated(router, BlockRemoved([2]))
    (back,) = translated(router, stored([1, 2, 3]))
    assert isinstance(back, Stored)
    assert (back.parent_hash, back.block_hashes.tolist()) == (names[0], names[1:2])

    router.cleared()  # events were lost
    assert not translated(router, stored([4], 3, first_token=48))
    assert router.status().orphaned_total == 1
    (all_of_it,) = translated(router, stored([1, 2, 3, 4]))
    assert isinstance(all_of_it, Stored)
    assert all_of_it.block_hashes.tolist() == names
    router.ledger.check_integrity()


def test_a_salt_named_at_the_first_block_goes_on_to_the_blocks_after_it() -> None:
    events = translated(
        EngineRouter(16),
        stored([1], extra_keys=[["tenantA"]]),
        stored([2], 1),
        stored([3], 2, extra_keys=[None]),
        stored([4]),
        stored([5], lora_name="my-lora", extra_keys=[["my-lora", "tenantA"]]),
        stored([6], lora_name="my-lora", extra_keys=[["my-lora"]]),
    )
    found = [data.tokens_hashes[0] for data in events]  # type: ignore[union-attr]
    lora, both = 7774427462321301335, 4987558542395039106
    assert found == [SALTED, SALTED, SALTED, PLAIN, both, lora]


def test_salts_beyond_what_is_kept_apart_make_it_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger, "DOMAINS_MAX", 3)
    router = EngineRouter(16)
    for number in range(3):
        (data,) = translated(router, stored([number], extra_keys=[[f"tenant {number}"]]))
        assert isinstance(data, Stored)
    cleared, data = translated(router, stored([9], extra_keys=[["tenantA"]]))
    assert cleared == Cleared()
    assert isinstance(data, Stored)
    assert data.tokens_hashes.tolist() == [SALTED]
    assert router.status().blocks == 1


def test_larger_blocks_are_several_of_the_routers_and_go_as_they_came() -> None:
    router = EngineRouter(16)
    first, second, removed = translated(
        router,
        stored([10, 11], block_size=48),
        stored([12], 11, block_size=48, first_token=96),
        BlockRemoved([11]),
    )
    names = sequence_hashes(block_hashes(range(144), 16)).tolist()
    assert isinstance(first, Stored)
    assert first.block_hashes.tolist() == names[:6]
    assert isinstance(second, Stored)
    assert (second.parent_hash, second.block_hashes.tolist()) == (names[5], names[6:])
    assert isinstance(removed, Removed)
    assert removed.block_hashes.tolist() == names[3:6]


def test_what_is_not_for_the_index_is_skipped_and_what_contradicts_itself_refused() -> None:
    router = EngineRouter(16, blocks_max=4)
    assert not translated(
        router,
        stored([1], group_idx=1),
        stored([1], medium="TAPE"),
        stored([1], medium="CPU"),
        stored([1], locality="REMOTE"),
        BlockRemoved([1], "GPU", 1),
    )
    assert router.status().skipped_total == 5
    assert not translated(
        router,
        stored([1], block_size=24),
        stored([1], block_size=8),
        stored([1, 1]),
        stored([1], 1),
        BlockStored([1], None, [0] * 15, 16),
        BlockStored([1], None, [2**32] * 16, 16),
        BlockStored([1], None, [-1] * 16, 16),
        stored([1], block_size=32, extra_keys=[[["cat", 0]]]),
    )
    assert router.status().refused_total == 8
    assert not translated(router, stored([1, 2, 3, 4, 5]))
    assert router.status().full_total == 5


# -- what comes off the wire ------------------------------------------------------------------


def test_events_of_earlier_releases_are_arrays() -> None:
    fields = ["BlockStored", [1, b"\x02" * 32], None, [1, 2], 1, None]
    tails: list[tuple[list[Any], BlockStored]] = [
        ([], BlockStored([1, b"\x02" * 32], None, [1, 2], 1)),
        (["CPU"], BlockStored([1, b"\x02" * 32], None, [1, 2], 1, None, "CPU")),
        (
            ["GPU", "lora", [["lora"], None], None, 2, "sliding_window", 128, {"new": 1}],
            BlockStored(
                [1, b"\x02" * 32],
                None,
                [1, 2],
                1,
                medium="GPU",
                lora_name="lora",
                extra_keys=[["lora"], None],
                group_idx=2,
                kv_cache_spec_kind="sliding_window",
                kv_cache_spec_sliding_window=128,
            ),
        ),
    ]
    for tail, expected in tails:
        payload = msgspec.msgpack.encode([1.5, [[*fields, *tail]], 3, "new"])
        batch = decode_engine_batch(payload)
        assert (batch.events, batch.dp_rank, batch.unknown_count) == ([expected], 3, 0)
    events = [["BlockRemoved", [5], "GPU", 1, "new"], ["AllBlocksCleared"], ["New", 5]]
    batch = decode_engine_batch(msgspec.msgpack.encode([1, events]))
    assert batch.events == [BlockRemoved([5], "GPU", 1), AllBlocksCleared()]
    assert batch.unknown_count == 1


def test_a_whole_digest_goes_by_the_number_that_vllm_shortens_it_to() -> None:
    digest = bytes(range(32))
    assert number_of(digest) == int.from_bytes(digest, "big") & (2**64 - 1)
    assert number_of(-1) == 2**64 - 1


@given(st.binary(max_size=100), st.data())
def test_whatever_comes_is_decoded_or_refused(noise: bytes, data: st.DataObject) -> None:
    as_map = {"type": "BlockStored", **msgspec.to_builtins(stored([1], extra_keys=[["a"]]))}
    as_array = ["BlockStored", [1], None, [1], 1, None, "GPU", None, [["a"]], 0]
    good = msgspec.msgpack.encode([1.0, [as_map, as_array, ["BlockRemoved", [1]]]])
    assert len(decode_engine_batch(good).events) == 3
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    for payload in (noise, bytes(changed), bytes(changed[: len(noise)])):
        try:
            decode_engine_batch(payload)
        except WireError:
            continue


@pytest.mark.parametrize(
    "payload",
    [
        [],
        [1.0],
        [1.0, [5]],
        [1.0, [[]]],
        [1.0, [[5]]],
        [1.0, [{"no": "type"}]],
        [1.0, [{"type": "BlockRemoved"}]],
        [1.0, [{"type": "BlockRemoved", "block_hashes": ["x"]}]],
        [1.0, [["BlockStored", [1], None, "x", 1]]],
        {"ts": 1.0},
    ],
)
def test_what_is_no_batch_is_refused(payload: Any) -> None:
    with pytest.raises(WireError):
        decode_engine_batch(msgspec.msgpack.encode(payload))
