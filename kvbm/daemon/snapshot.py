"""What one daemon tells the next of host memory: which chunk lies in which slot of the arena.

Written to a memfd at an orderly stop, when nothing changes the arena any more. It names the epoch
of the arena, and who adopts an arena gives it a new one: so a snapshot can be believed once, and
none that is older than the arena's last use ever is.

Format: magic with version, XXH3-64 of all that follows, header, chunks coldest first, slots that
are kept aside, the chunks' notes one after the other. Little-endian, packed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage_tiers.arena import Slot
from storage_tiers.base import KEY_BYTES, Chunk, Key
from storage_tiers.codec import checksum

_MAGIC: Final = b"kvbm-index-2\0\0\0\0"
_SUM_BYTES: Final = 8
_HEADER: Final = np.dtype(
    [
        ("epoch", "V16"),
        ("capacity", "<u8"),
        ("huge_pages", "u1"),
        ("chunks", "<u8"),
        ("aside", "<u8"),
    ]
)
_SLOT: Final = [("offset", "<u8"), ("length", "<u8"), ("generation", "<u8")]
_CHUNK: Final = np.dtype(
    [
        *_SLOT,
        ("key", f"V{KEY_BYTES}"),
        ("has_parent", "u1"),
        ("parent", f"V{KEY_BYTES}"),
        ("position", "<u8"),
        ("checksum", "<u8"),
        ("note_bytes", "<u4"),
    ]
)
_ASIDE: Final = np.dtype(_SLOT)
_BODY_AT: Final = len(_MAGIC) + _SUM_BYTES


class SnapshotError(Exception):
    """The bytes are no snapshot that can be believed; the message says why."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    epoch: bytes  # of the arena
    capacity_bytes: int  # of the arena's data
    huge_pages: bool
    chunks: Sequence[tuple[Chunk, Slot]]  # coldest first, every checksum known, with their notes
    aside: Sequence[Slot]  # somebody may still write to these


def write_snapshot(snapshot: Snapshot) -> int:
    """A new memfd that holds it; the caller closes it. Raises OSError. Cost: linear."""
    header = np.zeros(1, _HEADER)
    header["epoch"] = np.void(snapshot.epoch)
    header["capacity"] = snapshot.capacity_bytes
    header["huge_pages"] = snapshot.huge_pages
    header["chunks"] = len(snapshot.chunks)
    header["aside"] = len(snapshot.aside)
    notes = b"".join(chunk.note for chunk, _ in snapshot.chunks)
    body = (
        header.tobytes() + _packed_chunks(snapshot.chunks) + _packed_slots(snapshot.aside) + notes
    )
    fd = os.memfd_create("kvbm-index", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(_MAGIC + checksum(body).to_bytes(_SUM_BYTES, "little") + body)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_snapshot(fd: int) -> Snapshot:
    """What the memfd holds. Raises SnapshotError, and OSError where it cannot be read."""
    size = os.fstat(fd).st_size
    if size < _BODY_AT + _HEADER.itemsize:
        raise SnapshotError(f"the snapshot is cut off: {size} bytes")
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapping:
        data = mapping[:]
    if data[: len(_MAGIC)] != _MAGIC:
        raise SnapshotError("the snapshot is of another version")
    if checksum(memoryview(data)[_BODY_AT:]) != int.from_bytes(
        data[len(_MAGIC) : _BODY_AT], "little"
    ):
        raise SnapshotError("the snapshot does not match its checksum")
    header = np.frombuffer(data, _HEADER, 1, _BODY_AT)[0]
    chunks, aside = int(header["chunks"]), int(header["aside"])
    chunks_at = _BODY_AT + _HEADER.itemsize
    aside_at = chunks_at + chunks * _CHUNK.itemsize
    notes_at = aside_at + aside * _ASIDE.itemsize
    if size < notes_at:
        raise SnapshotError("the snapshot has another length than it says")
    records = np.frombuffer(data, _CHUNK, chunks, chunks_at)
    if size != notes_at + int(records["note_bytes"].sum(dtype=np.uint64)):
        raise SnapshotError("the snapshot has another length than it says")
    return Snapshot(
        epoch=header["epoch"].tobytes(),
        capacity_bytes=int(header["capacity"]),
        huge_pages=bool(header["huge_pages"]),
        chunks=_chunks(records, data[notes_at:]),
        aside=_slots(np.frombuffer(data, _ASIDE, aside, aside_at)),
    )


def _packed_chunks(chunks: Sequence[tuple[Chunk, Slot]]) -> bytes:
    records = np.zeros(len(chunks), _CHUNK)
    _fill_slots(records, [slot for _, slot in chunks])
    none = bytes(KEY_BYTES)
    records["key"] = np.frombuffer(b"".join(c.key for c, _ in chunks), f"V{KEY_BYTES}")
    records["has_parent"] = [c.parent is not None for c, _ in chunks]
    parents = b"".join(c.parent or none for c, _ in chunks)
    records["parent"] = np.frombuffer(parents, f"V{KEY_BYTES}")
    records["position"] = [c.position for c, _ in chunks]
    records["checksum"] = np.array([c.checksum for c, _ in chunks], dtype=np.uint64)
    records["note_bytes"] = [len(c.note) for c, _ in chunks]
    return records.tobytes()


def _packed_slots(slots: Sequence[Slot]) -> bytes:
    records = np.zeros(len(slots), _ASIDE)
    _fill_slots(records, slots)
    return records.tobytes()


def _fill_slots(records: npt.NDArray[Any], slots: Sequence[Slot]) -> None:
    records["offset"] = [slot.offset for slot in slots]
    records["length"] = [slot.length for slot in slots]
    records["generation"] = np.array([slot.generation for slot in slots], dtype=np.uint64)


def _chunks(records: npt.NDArray[Any], notes: bytes) -> list[tuple[Chunk, Slot]]:
    columns = (records[name].tolist() for name in ("key", "has_parent", "parent"))
    numbers = (records[name].tolist() for name in ("position", "checksum", "note_bytes"))
    ends = np.cumsum(records["note_bytes"], dtype=np.int64).tolist()
    return [
        (
            Chunk(
                Key(key),
                slot.length,
                digest,
                Key(parent) if has_parent else None,
                position,
                notes[end - size : end],
            ),
            slot,
        )
        for slot, key, has_parent, parent, position, digest, size, end in zip(
            _slots(records), *columns, *numbers, ends, strict=True
        )
    ]


def _slots(records: npt.NDArray[Any]) -> list[Slot]:
    columns = (records[name].tolist() for name in ("offset", "length", "generation"))
    return [Slot(*values) for values in zip(*columns, strict=True)]
