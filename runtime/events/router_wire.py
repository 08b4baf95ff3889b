"""The reference router's events on the wire: JSON, and msgpack as Rust's rmp-serde writes it.

Verified: the JSON form, against an event dumped from the reference. Derived, from the reference's
documents and source and rmp-serde's rules, and not compared with bytes of a running one:
- a struct is an array of its fields in order (positional), or a map of them (named); the
  reference's decoder takes both, and so does `decode_msgpack`;
- an enum's unit variant is its name, another is a map of one entry, name to content; the struct
  inside is again an array, so removed is `{"removed": [[hash, ...]]}`;
- an absent `Option` is nil and keeps its place, but for `residency_domain` and `state_source`,
  which are left out: a positional event without domain has its event one place earlier, and
  `state_source` is last, so nothing follows it.

Blocks that all take the same number of bytes, which is nearly all there are, are read and written
by numpy without an object for each (`msgpack_rows.py`); others take the slow way, to the same end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Final, assert_never

import msgspec
from msgspec import Meta, Raw

from runtime.events.envelope import U64, U64_MAX, WireError, is_msgpack_array
from runtime.events.msgpack_rows import Rows, array_header
from runtime.events.router_event import (
    Cleared,
    KvCacheEvent,
    KvCacheEventData,
    MmObject,
    MmObjects,
    Removed,
    RouterEvent,
    StorageTier,
    Stored,
    hashes,
)

U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]

# -- what msgspec decodes: each struct as an array and as a map ----------------------------------


class _EventArray(msgspec.Struct, array_like=True, gc=False):
    event_id: U64
    data: dict[str, Raw] | str
    dp_rank: U32 = 0


class _EventMap(msgspec.Struct, gc=False):
    event_id: U64
    data: dict[str, Raw] | str
    dp_rank: U32 = 0


class _RouterArray(msgspec.Struct, array_like=True, gc=False):
    worker_id: U64
    storage_tier: StorageTier
    domain_or_event: str | _EventArray | None
    event_or_source: Raw = Raw()
    state_source: Any = None


class _RouterMap(msgspec.Struct, gc=False):
    worker_id: U64
    event: _EventMap
    storage_tier: StorageTier = StorageTier.DEVICE
    residency_domain: str | None = None
    state_source: Any = None


class _StoredArray(msgspec.Struct, array_like=True, gc=False):
    parent_hash: U64 | None
    start_position: U32 | None
    blocks: Raw


class _StoredMap(msgspec.Struct, gc=False):
    blocks: Raw
    parent_hash: U64 | None = None
    start_position: U32 | None = None


class _RemovedArray(msgspec.Struct, array_like=True, gc=False):
    block_hashes: Raw


class _RemovedMap(msgspec.Struct, gc=False):
    block_hashes: Raw


class _MmObjectArray(msgspec.Struct, array_like=True, gc=False):
    mm_hash: U64
    offsets: list[tuple[U64, U64]]


class _MmInfoArray(msgspec.Struct, array_like=True, gc=False):
    mm_objects: list[_MmObjectArray]


class _BlockArray(msgspec.Struct, array_like=True, gc=False):
    block_hash: U64
    tokens_hash: U64
    mm_extra_info: _MmInfoArray | None = None


class _MmObjectMap(msgspec.Struct, gc=False):
    mm_hash: U64
    offsets: list[tuple[U64, U64]]


class _MmInfoMap(msgspec.Struct, gc=False):
    mm_objects: list[_MmObjectMap]


class _BlockMap(msgspec.Struct, gc=False):
    block_hash: U64
    tokens_hash: U64
    mm_extra_info: _MmInfoMap | None = None


_BLOCKS: Final = Rows(b"\x93", b"", b"\xc0")
_NAMED_BLOCKS: Final = Rows(b"\x83\xaablock_hash", b"\xabtokens_hash", b"\xadmm_extra_info\xc0")
_HASHES: Final = Rows(b"", b"")


# -- decoding --------------------------------------------------------------------------------


def decode_msgpack(data: bytes | memoryview) -> RouterEvent:
    """Fields after those known are skipped. Raises WireError."""
    try:
        if len(data) and is_msgpack_array(data[0]):
            return _from_array(_router_array.decode(data))
        return _from_map(_router_map.decode(data), _msgpack_data)
    except _REFUSED as error:
        raise WireError(f"no router event: {error}") from error


def decode_json(data: bytes | str) -> RouterEvent:
    """Fields that are not known are skipped. Raises WireError."""
    try:
        return _from_map(_router_json.decode(data), _json_data)
    except _REFUSED as error:
        raise WireError(f"no router event: {error}") from error


def _from_array(found: _RouterArray) -> RouterEvent:
    source: object
    if isinstance(found.domain_or_event, _EventArray):
        domain, event = None, found.domain_or_event
        source = _any.decode(found.event_or_source) if len(found.event_or_source) else None
    else:
        domain, source = found.domain_or_event, found.state_source
        event = _event_array.decode(found.event_or_source)
    return RouterEvent(
        found.worker_id,
        KvCacheEvent(event.event_id, _msgpack_data(event.data), event.dp_rank),
        found.storage_tier,
        domain,
        source,
    )


def _from_map(
    found: _RouterMap, read: Callable[[dict[str, Raw] | str], KvCacheEventData]
) -> RouterEvent:
    event = found.event
    if max(found.worker_id, event.event_id) > U64_MAX:  # JSON knows no end
        raise WireError("a number of more than 64 bits")
    return RouterEvent(
        found.worker_id,
        KvCacheEvent(event.event_id, read(event.data), event.dp_rank),
        found.storage_tier,
        found.residency_domain,
        found.state_source,
    )


def _variant(data: dict[str, Raw] | str) -> tuple[str, Raw]:
    if isinstance(data, str):
        if data != "cleared":
            raise WireError(f"no kind of event without content: {data[:32]!r}")
        return data, Raw()
    if len(data) != 1:
        raise WireError(f"an event of {len(data)} kinds")
    return next(iter(data.items()))


def _msgpack_data(data: dict[str, Raw] | str) -> KvCacheEventData:
    kind, content = _variant(data)
    positional = len(content) > 0 and is_msgpack_array(memoryview(content)[0])
    match kind:
        case "stored":
            stored = (_stored_array if positional else _stored_map).decode(content)
            return _read_blocks(stored.parent_hash, stored.start_position, stored.blocks)
        case "removed":
            removed = (_removed_array if positional else _removed_map).decode(content)
            columns = _HASHES.read(memoryview(removed.block_hashes))
            return Removed(columns[0] if columns else hashes(_u64s.decode(removed.block_hashes)))
        case "cleared":
            return Cleared()
    raise WireError(f"an unknown kind of event: {kind[:32]!r}")


def _read_blocks(parent_hash: int | None, start_position: int | None, blocks: Raw) -> Stored:
    view = memoryview(blocks)
    columns = _BLOCKS.read(view) or _NAMED_BLOCKS.read(view)
    if columns:
        return Stored(parent_hash, columns[0], columns[1], start_position)
    _, start = array_header(view)
    named = len(view) > start and not is_msgpack_array(view[start])
    found: Sequence[_BlockArray | _BlockMap] = (
        _block_maps.decode(blocks) if named else _block_arrays.decode(blocks)
    )
    return _stored(parent_hash, start_position, found)


def _json_data(data: dict[str, Raw] | str) -> KvCacheEventData:
    kind, content = _variant(data)
    match kind:
        case "stored":
            stored = _stored_json.decode(content)
            if stored.parent_hash is not None and stored.parent_hash > U64_MAX:
                raise WireError("a number of more than 64 bits")
            found = _blocks_json.decode(stored.blocks)
            return _stored(stored.parent_hash, stored.start_position, found)
        case "removed":
            return Removed(hashes(_u64s_json.decode(_removed_json.decode(content).block_hashes)))
        case "cleared":
            return Cleared()
    raise WireError(f"an unknown kind of event: {kind[:32]!r}")


def _stored(
    parent_hash: int | None,
    start_position: int | None,
    blocks: Sequence[_BlockArray | _BlockMap],
) -> Stored:
    return Stored(
        parent_hash,
        hashes([block.block_hash for block in blocks]),
        hashes([block.tokens_hash for block in blocks]),
        start_position,
        {
            index: tuple(
                MmObject(found.mm_hash, tuple(found.offsets))
                for found in block.mm_extra_info.mm_objects
            )
            for index, block in enumerate(blocks)
            if block.mm_extra_info is not None
        },
    )


# -- encoding --------------------------------------------------------------------------------


def encode_msgpack(event: RouterEvent) -> bytes:
    """Positional: structs as arrays."""
    inner = event.event
    fields: list[object] = [event.worker_id, event.storage_tier]
    if event.residency_domain is not None:
        fields.append(event.residency_domain)
    fields.append([inner.event_id, _positional(inner.data), inner.dp_rank])
    if event.state_source is not None:
        fields.append(event.state_source)
    return _msgpack.encode(fields)


def encode_msgpack_named(event: RouterEvent) -> bytes:
    """Structs as maps of their fields' names."""
    return _msgpack.encode(_named(event, raw=True))


def encode_json(event: RouterEvent) -> bytes:
    return _json.encode(_named(event, raw=False))


def _positional(data: KvCacheEventData) -> object:
    match data:
        case Cleared():
            return "cleared"
        case Removed(block_hashes):
            return {"removed": [_HASHES.write(block_hashes) or block_hashes.tolist()]}
        case Stored():
            blocks: object = None if data.mm_objects else _write(_BLOCKS, data)
            if blocks is None:
                blocks = [
                    [block_hash, tokens_hash, None if found is None else [_mm_arrays(found)]]
                    for block_hash, tokens_hash, found in _each(data)
                ]
            return {"stored": [data.parent_hash, data.start_position, blocks]}
        case _:
            assert_never(data)


def _named(event: RouterEvent, *, raw: bool) -> dict[str, object]:
    fields: dict[str, object] = {
        "worker_id": event.worker_id,
        "storage_tier": event.storage_tier,
    }
    if event.residency_domain is not None:
        fields["residency_domain"] = event.residency_domain
    fields["event"] = {
        "event_id": event.event.event_id,
        "data": _named_data(event.event.data, raw=raw),
        "dp_rank": event.event.dp_rank,
    }
    if event.state_source is not None:
        fields["state_source"] = event.state_source
    return fields


def _named_data(data: KvCacheEventData, *, raw: bool) -> object:
    match data:
        case Cleared():
            return "cleared"
        case Removed(block_hashes):
            written = _HASHES.write(block_hashes) if raw else None
            return {"removed": {"block_hashes": written or block_hashes.tolist()}}
        case Stored():
            blocks: object = _write(_NAMED_BLOCKS, data) if raw and not data.mm_objects else None
            if blocks is None:
                blocks = [
                    {
                        "block_hash": block_hash,
                        "tokens_hash": tokens_hash,
                        "mm_extra_info": None if found is None else _mm_maps(found),
                    }
                    for block_hash, tokens_hash, found in _each(data)
                ]
            return {
                "stored": {
                    "parent_hash": data.parent_hash,
                    "start_position": data.start_position,
                    "blocks": blocks,
                }
            }
        case _:
            assert_never(data)


def _write(rows: Rows, data: Stored) -> Raw | None:
    return rows.write(data.block_hashes, data.tokens_hashes)


def _each(data: Stored) -> Iterator[tuple[int, int, MmObjects | None]]:
    pairs = zip(data.block_hashes.tolist(), data.tokens_hashes.tolist(), strict=True)
    for index, (block_hash, tokens_hash) in enumerate(pairs):
        yield block_hash, tokens_hash, data.mm_objects.get(index)


def _mm_arrays(found: MmObjects) -> list[object]:
    return [[item.mm_hash, item.offsets] for item in found]


def _mm_maps(found: MmObjects) -> dict[str, object]:
    return {"mm_objects": [{"mm_hash": i.mm_hash, "offsets": i.offsets} for i in found]}


_REFUSED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError)
_msgpack = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()
_any = msgspec.msgpack.Decoder()
_router_array = msgspec.msgpack.Decoder(_RouterArray)
_router_map = msgspec.msgpack.Decoder(_RouterMap)
_router_json = msgspec.json.Decoder(_RouterMap)
_event_array = msgspec.msgpack.Decoder(_EventArray)
_stored_array = msgspec.msgpack.Decoder(_StoredArray)
_stored_map = msgspec.msgpack.Decoder(_StoredMap)
_stored_json = msgspec.json.Decoder(_StoredMap)
_removed_array = msgspec.msgpack.Decoder(_RemovedArray)
_removed_map = msgspec.msgpack.Decoder(_RemovedMap)
_removed_json = msgspec.json.Decoder(_RemovedMap)
_block_arrays = msgspec.msgpack.Decoder(list[_BlockArray])
_block_maps = msgspec.msgpack.Decoder(list[_BlockMap])
_blocks_json = msgspec.json.Decoder(list[_BlockMap])
_u64s = msgspec.msgpack.Decoder(list[U64])
_u64s_json = msgspec.json.Decoder(list[U64])
