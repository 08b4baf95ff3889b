"""The events vLLM publishes of its own cache, as they come off its ZMQ publisher.

A batch is `[timestamp, [events], dp rank]` in msgpack. An event is a map with its `type` (vLLM
0.32, read from its source and tested with its publisher) or an array that begins with it (earlier
releases, as the reference documents them). Fields may be missing at the end, or be more than are
known here. Of an array's tail, which differed between releases, what is told by type is taken:
the first number is the cache group, the second the sliding window, text is the kind of cache.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw

from runtime.events.envelope import WireError, is_msgpack_array

BlockHash = int | bytes  # a number of 64 bits, or the whole digest
_LOW_BYTES: Final = 8


class BlockStored(msgspec.Struct, frozen=True, gc=False):
    """Blocks that follow each other; `token_ids` are those of all of them."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None  # for each block, what else its hash covers
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, gc=False):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False):
    """The engine forgot all its blocks."""


EngineEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EngineBatch(msgspec.Struct, frozen=True):
    timestamp_s: float
    events: list[EngineEvent]
    dp_rank: int | None
    unknown_count: int  # events of types that are not known here


class _Batch(msgspec.Struct, array_like=True):
    timestamp_s: float
    events: list[Raw]
    dp_rank: int | None = None


class _Type(msgspec.Struct):
    type: str


class _StoredPrefix(msgspec.Struct, array_like=True, gc=False):
    type: str
    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None


class _RemovedPrefix(msgspec.Struct, array_like=True, gc=False):
    type: str
    block_hashes: list[BlockHash]
    medium: str | None = None


_STORED_PREFIX: Final = len(_StoredPrefix.__struct_fields__)
_REMOVED_PREFIX: Final = len(_RemovedPrefix.__struct_fields__)


def decode_engine_batch(payload: bytes) -> EngineBatch:
    """Raises WireError; an event of an unknown type is left out and counted."""
    try:
        batch = _batch.decode(payload)
        found = [_event(raw) for raw in batch.events]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise WireError(f"no batch of engine events: {error}") from error
    events = [event for event in found if event is not None]
    return EngineBatch(batch.timestamp_s, events, batch.dp_rank, len(found) - len(events))


def number_of(block_hash: BlockHash) -> int:
    """The 64 bits a block goes by; of a digest its last 8 bytes, as vLLM itself shortens it."""
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-_LOW_BYTES:], "big")
    return block_hash & 0xFFFF_FFFF_FFFF_FFFF


def _event(raw: Raw) -> EngineEvent | None:
    view = memoryview(raw)
    positional = is_msgpack_array(view[0])
    kind = _positional_type(raw) if positional else _type.decode(raw).type
    match kind:
        case "BlockStored":
            return _positional_stored(raw) if positional else _stored.decode(raw)
        case "BlockRemoved":
            return _positional_removed(raw) if positional else _removed.decode(raw)
        case "AllBlocksCleared":
            return AllBlocksCleared()
    return None


def _positional_type(raw: Raw) -> str:
    fields = _fields.decode(raw)
    if not fields:
        raise WireError("an event without a type")
    return _text.decode(fields[0])


def _positional_stored(raw: Raw) -> BlockStored:
    prefix = _stored_prefix.decode(raw)
    numbers, texts = _tail(raw, _STORED_PREFIX)
    return BlockStored(
        prefix.block_hashes,
        prefix.parent_block_hash,
        prefix.token_ids,
        prefix.block_size,
        prefix.lora_id,
        prefix.medium,
        prefix.lora_name,
        prefix.extra_keys,
        numbers[0] if numbers else None,
        texts[0] if texts else None,
        numbers[1] if len(numbers) > 1 else None,
    )


def _positional_removed(raw: Raw) -> BlockRemoved:
    prefix = _removed_prefix.decode(raw)
    numbers, _ = _tail(raw, _REMOVED_PREFIX)
    return BlockRemoved(prefix.block_hashes, prefix.medium, numbers[0] if numbers else None)


def _tail(raw: Raw, known: int) -> tuple[list[int], list[str]]:
    values = [_any.decode(field) for field in _fields.decode(raw)[known:]]
    numbers = [value for value in values if type(value) is int]
    return numbers, [value for value in values if isinstance(value, str)]


_any = msgspec.msgpack.Decoder()
_text = msgspec.msgpack.Decoder(str)
_fields = msgspec.msgpack.Decoder(list[Raw])
_batch = msgspec.msgpack.Decoder(_Batch)
_type = msgspec.msgpack.Decoder(_Type)
_stored = msgspec.msgpack.Decoder(BlockStored)
_removed = msgspec.msgpack.Decoder(BlockRemoved)
_stored_prefix = msgspec.msgpack.Decoder(_StoredPrefix)
_removed_prefix = msgspec.msgpack.Decoder(_RemovedPrefix)
