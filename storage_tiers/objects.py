"""Format and names of the S3 tier's objects; no I/O here.

An object is a run of equal-sized records, one a chunk: payload, zeros up to a multiple of 64, and a
64-byte trailer with the chunk's identity, so that any record verifies itself. The object's *name*
lists the keys it holds, so that one LIST tells a node everything others have written:

    {prefix}/v1/{created_ms}-{node}-{sequence}/{payload length}.{keys, base64url, "/" every 200}

Names sort by time of creation. The name is a hint; a record's trailer decides.

Where chunks have notes, a *tail* with all of them follows the records, to be read with one range,
and `{payload length}` is `{payload length}n{bytes of the tail}`. Tail, little-endian: u32 bytes of
each note in the order of the records, the notes, XXH3-64 of the object's keys and all before it.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from storage_tiers.base import KEY_BYTES, NOTE_BYTES_MAX, Chunk, Key, StoreItem, tenant_of
from storage_tiers.codec import checksum

CHUNKS_MAX: Final = 32  # an object; keeps names well below S3's 1024 bytes
PREFIX_LENGTH_MAX: Final = 180
NODE_PATTERN: Final = re.compile(r"[A-Za-z0-9_.-]{1,48}")
_SEGMENT_LENGTH: Final = 200  # some servers keep each part of a name in a 255-byte file name
_UNIT: Final = 64
_SUM_BYTES: Final = 8
_COUNT_BYTES: Final = 4
TAIL_BYTES_MAX: Final = CHUNKS_MAX * (_COUNT_BYTES + NOTE_BYTES_MAX) + _SUM_BYTES
_MAGIC: Final = b"KVB1"
# magic, seal, key, parent, position, has parent, length, checksum of the payload
_TRAILER: Final = struct.Struct("<4sI16s16sIIQQ")
_STEM: Final = re.compile(r"(\d{13})-(.+)-([0-9a-f]+)/(\d{1,12})(?:n(\d{1,7}))?\.(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What an object's name says."""

    created_ms: int
    node: str
    sequence: str  # hexadecimal, unique for the node
    length: int  # payload bytes of every chunk
    keys: tuple[Key, ...]
    tail_bytes: int = 0  # 0: its chunks have no notes

    def encode(self, prefix: str) -> str:
        packed = base64.urlsafe_b64encode(b"".join(self.keys)).decode().rstrip("=")
        parts = [packed[at : at + _SEGMENT_LENGTH] for at in range(0, len(packed), _SEGMENT_LENGTH)]
        stem = f"{self.created_ms:013d}-{self.node}-{self.sequence}"
        tail = f"n{self.tail_bytes}" if self.tail_bytes else ""
        return f"{root(prefix)}{stem}/{self.length}{tail}.{'/'.join(parts)}"

    @classmethod
    def parse(cls, prefix: str, name: str) -> ObjectName | None:
        """None if the name is not one of ours."""
        match = _STEM.fullmatch(name.removeprefix(root(prefix)))
        if match is None or not name.startswith(root(prefix)):
            return None
        created, node, sequence, length, tail, packed = match.groups()
        packed = packed.replace("/", "")
        try:
            keys = base64.b64decode(packed + "=" * (-len(packed) % 4), b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        count, rest = divmod(len(keys), KEY_BYTES)
        if rest or not 0 < count <= CHUNKS_MAX or int(length) == 0:
            return None
        if tail is not None and not 0 < int(tail) <= TAIL_BYTES_MAX:
            return None
        split = tuple(Key(keys[at : at + KEY_BYTES]) for at in range(0, len(keys), KEY_BYTES))
        return cls(int(created), node, sequence, int(length), split, int(tail or 0))

    @property
    def size_bytes(self) -> int:
        """How large the object must be."""
        return self.tail_at + self.tail_bytes

    @property
    def tail_at(self) -> int:
        return record_bytes(self.length) * len(self.keys)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is not the chunk that was asked for, or not whole."""

    reason: str


def root(prefix: str) -> str:
    """Where the names of this format's version begin."""
    return f"{prefix}/v1/" if prefix else "v1/"


def record_bytes(length: int) -> int:
    """Size of the record of a chunk with `length` bytes of payload."""
    return -(-length // _UNIT) * _UNIT + _TRAILER.size


def group(items: Sequence[StoreItem], object_bytes: int) -> list[list[StoreItem]]:
    """Which chunks share an object: equally long ones of one tenant, sequence after sequence.

    Each object is filled before the next is begun, because requests cost money; a sequence's chunks
    lie side by side in it, so that they are read with one range. `object_bytes` counts payload: a
    power of two of equal chunks fills it exactly, as it fills the batches in which they are read.
    """
    sequences: dict[Key, list[StoreItem]] = {}  # by the key of its last chunk so far
    for item in items:
        chunk = item.chunk
        sequence = sequences.pop(chunk.parent, []) if chunk.parent is not None else []
        sequence.append(item)
        sequences[chunk.key] = sequence
    groups: list[list[StoreItem]] = []
    filling: dict[tuple[int, int], list[StoreItem]] = {}  # by length and tenant
    for sequence in sequences.values():
        for item in sequence:
            kind = (item.chunk.length, tenant_of(item.chunk.key))
            most = min(object_bytes // item.chunk.length, CHUNKS_MAX)
            run = filling.get(kind)
            if run is None or len(run) >= most:
                run = filling[kind] = []
                groups.append(run)
            run.append(item)
    return groups


def build(items: Sequence[StoreItem]) -> bytearray:
    """The object of one group. Copies every payload once."""
    size = record_bytes(items[0].chunk.length)
    tail = _tail([item.chunk for item in items])
    body = bytearray(size * len(items) + len(tail))
    for index, item in enumerate(items):
        start = index * size
        body[start : start + item.chunk.length] = item.data
        body[start + size - _TRAILER.size : start + size] = _trailer(item.chunk)
    body[size * len(items) :] = tail
    return body


def tail_bytes(chunks: Sequence[Chunk]) -> int:
    """Of the object of these chunks; 0 if none of them has a note."""
    notes = sum(len(_note(chunk)) for chunk in chunks)
    return notes + _COUNT_BYTES * len(chunks) + _SUM_BYTES if notes else 0


def parse_tail(tail: bytes, keys: Sequence[Key]) -> list[bytes] | None:
    """The notes of an object's chunks, empty where there is none; None if the tail is damaged."""
    heads = _COUNT_BYTES * len(keys)
    body, digest = tail[:-_SUM_BYTES], tail[-_SUM_BYTES:]
    if len(body) < heads or _tail_sum(body, keys) != digest:
        return None
    sizes = struct.unpack_from(f"<{len(keys)}I", body)
    ends = [heads + end for end in itertools.accumulate(sizes)]
    if ends[-1] != len(body):
        return None
    return [body[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def parse_record(record: memoryview, key: Key) -> Chunk | BadRecord:
    """The chunk in a record, verified: the trailer, the key and the payload's checksum."""
    trailer = bytes(record[-_TRAILER.size :])
    magic, seal, found, parent, position, has_parent, length, digest = _TRAILER.unpack(trailer)
    if magic != _MAGIC or seal != _seal(trailer):
        return BadRecord("the record's trailer is damaged")
    if found != key:
        return BadRecord("the record holds another chunk")
    if record_bytes(length) != len(record):
        return BadRecord("the record has another length")
    if checksum(record[:length]) != digest:
        return BadRecord("the bytes do not match the checksum")
    return Chunk(key, length, digest, Key(parent) if has_parent else None, position)


def _note(chunk: Chunk) -> bytes:
    return chunk.note if len(chunk.note) <= NOTE_BYTES_MAX else b""


def _tail(chunks: Sequence[Chunk]) -> bytes:
    notes = [_note(chunk) for chunk in chunks]
    if not any(notes):
        return b""
    body = struct.pack(f"<{len(notes)}I", *map(len, notes)) + b"".join(notes)
    return body + _tail_sum(body, [chunk.key for chunk in chunks])


def _tail_sum(body: bytes, keys: Sequence[Key]) -> bytes:
    return checksum(b"".join(keys) + body).to_bytes(_SUM_BYTES, "little")


def _trailer(chunk: Chunk) -> bytes:
    fields = (
        chunk.key,
        chunk.parent or bytes(KEY_BYTES),
        chunk.position,
        int(chunk.parent is not None),
        chunk.length,
        chunk.checksum,
    )
    return _TRAILER.pack(_MAGIC, _seal(_TRAILER.pack(_MAGIC, 0, *fields)), *fields)


def _seal(trailer: bytes) -> int:
    """Covers everything in the trailer behind the seal."""
    return checksum(trailer[8:]) & 0xFFFFFFFF
