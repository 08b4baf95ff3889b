"""What the SSD tier does with its directory when it opens: lock, catalogue, extents, checks.

`open_directory` returns the parts the tier runs on. It takes into the allocator every recorded
chunk that is consistent and names the rest by reason; reading back and comparing every chunk is
`strict`'s business. Nothing found inconsistent is ever served or silently kept.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from storage_tiers.base import Key, SetAside, TierError
from storage_tiers.catalogue import (
    FORMAT_VERSION,
    Catalogue,
    CatalogueError,
    Changes,
    Entry,
    Meta,
)
from storage_tiers.codec import checksum
from storage_tiers.files import BlockFile, FileMover, Moved, Piece, padded
from storage_tiers.slabs import SlabAllocator

RecoverMode = Literal["none", "quiet", "strict"]
MakeMover = Callable[[BlockFile], FileMover]

SHRUNK: Final = "beyond the smaller capacity"
_GRANULE_BYTES: Final = 2 << 20
_MAP_BASE_BYTES: Final = 64 << 20
_MAP_MAX_BYTES: Final = 1 << 40  # address space only; the file grows with its entries
_VERIFY_BATCH: Final = 8
_NAMED_MAX: Final = 8


@dataclass(slots=True)
class Directory:
    """An open, locked directory: what `SsdTier` works with until it closes it."""

    catalogue: Catalogue
    file: BlockFile
    mover: FileMover
    slots: SlabAllocator
    meta: Meta
    entries: list[Entry]
    aside: list[SetAside]
    dropped: Counter[str]
    lock_fd: int

    async def close(self) -> None:
        """Give everything up."""
        await self.mover.close()
        await self.catalogue.close()
        self.file.close()
        os.close(self.lock_fd)


async def open_directory(
    path: Path, capacity_bytes: int, mode: RecoverMode, make_mover: MakeMover
) -> Directory:
    """Open or create the directory. Raises TierError; then nothing stays open."""
    if mode not in {"none", "quiet", "strict"}:
        raise TierError(f"unknown recover mode {mode!r}: use none, quiet or strict")
    lock_fd = _lock(path)
    map_bytes = min(_MAP_BASE_BYTES + capacity_bytes // 8, _MAP_MAX_BYTES)
    catalogue = Catalogue(path / "catalogue", map_bytes, _MAP_MAX_BYTES)
    file: BlockFile | None = None
    mover: FileMover | None = None
    try:
        if mode == "none":
            await asyncio.to_thread(_wipe, path)
        before = await catalogue.open()
        granule_bytes = before.granule_bytes if before is not None else _GRANULE_BYTES
        _check_version(path, before)
        slots = SlabAllocator(capacity_bytes, granule_bytes=granule_bytes)
        extents = path / "extents"
        written_bytes = extents.stat().st_size if extents.exists() else 0
        file = await asyncio.to_thread(BlockFile.open, extents, capacity_bytes)
        mover = await asyncio.to_thread(make_mover, file)
        entries, unreadable = await catalogue.entries()
        # A much smaller capacity has smaller slabs, which some old extents do not line up with.
        misfit = "overlaps another chunk" if slots.granule_bytes == granule_bytes else SHRUNK
        kept, dropped, causes = _place(entries, slots, written_bytes, misfit)
        dropped["unreadable record"] += len(unreadable)
        doomed = [Key(key) for key in unreadable] + [entry.chunk.key for entry in causes]
        if mode == "strict":
            await _verify(path, kept, causes, mover, unreadable_count=len(unreadable))
        aside = _place_aside(await catalogue.aside(), slots)
        meta = Meta(FORMAT_VERSION, capacity_bytes, slots.granule_bytes, clean=False)
        await catalogue.commit(Changes(delete=doomed, meta=meta, aside=aside))
        file.shrink(capacity_bytes)
        return Directory(catalogue, file, mover, slots, meta, kept, aside, +dropped, lock_fd)
    except BaseException as error:
        if mover is not None:
            await mover.close()
        await catalogue.close()
        if file is not None:
            file.close()
        os.close(lock_fd)
        if isinstance(error, CatalogueError | OSError):
            raise TierError(f"cannot recover {path}: {error}") from error
        raise


def _lock(path: Path) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TierError(f"cannot use {path} for the SSD tier: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise TierError(
            f"{path} is in use by another daemon; stop it or configure another directory"
        ) from error
    return fd


def _wipe(path: Path) -> None:
    if (path / "catalogue").exists():
        shutil.rmtree(path / "catalogue")
    (path / "extents").unlink(missing_ok=True)


def _check_version(path: Path, meta: Meta | None) -> None:
    if meta is not None and meta.version != FORMAT_VERSION:
        raise TierError(
            f"{path} has format {meta.version}, this program format {FORMAT_VERSION}; use "
            "another directory or start with recover=none, which empties it"
        )


def _place(
    entries: Sequence[Entry], slots: SlabAllocator, written_bytes: int, misfit: str
) -> tuple[list[Entry], Counter[str], dict[Entry, str]]:
    """Take consistent entries into the allocator, the most recent first."""
    kept: list[Entry] = []
    causes: dict[Entry, str] = {}
    for entry in sorted(entries, key=lambda entry: -entry.stamp):
        end = entry.offset + padded(entry.chunk.length)
        if entry.chunk.length <= 0 or end > written_bytes:
            causes[entry] = "outside the extents file"
        elif end > slots.capacity_bytes:
            causes[entry] = SHRUNK
        else:
            try:
                slots.place(entry.offset, entry.chunk.length)
                kept.append(entry)
            except ValueError:
                causes[entry] = misfit
    return kept, Counter(causes.values()), causes


def _place_aside(extents: Sequence[SetAside], slots: SlabAllocator) -> list[SetAside]:
    """Keep these out of use, where no chunk lies by now and the capacity still reaches."""
    kept: list[SetAside] = []
    for extent in extents:
        try:
            slots.place(extent.at, extent.length)
            kept.append(extent)
        except ValueError:
            continue  # the place is another one's: there is nothing left to keep
    return kept


async def _verify(
    path: Path,
    kept: Sequence[Entry],
    causes: dict[Entry, str],
    mover: FileMover,
    *,
    unreadable_count: int,
) -> None:
    """Read and compare every chunk. Raises TierError naming what is inconsistent."""
    wrong = [
        f"{entry.chunk.key.hex()} {cause}" for entry, cause in causes.items() if cause != SHRUNK
    ]
    if unreadable_count:
        wrong.append(f"{unreadable_count} records cannot be read")
    in_order = sorted(kept, key=lambda entry: entry.offset)
    for start in range(0, len(in_order), _VERIFY_BATCH):
        batch = in_order[start : start + _VERIFY_BATCH]
        pieces = [
            Piece(memoryview(mmap.mmap(-1, padded(entry.chunk.length))), entry.offset)
            for entry in batch
        ]
        for entry, piece, moved in zip(batch, pieces, await mover.read(pieces), strict=True):
            data = piece.data[: entry.chunk.length]
            if not isinstance(moved, Moved):
                wrong.append(f"{entry.chunk.key.hex()} cannot be read: {moved.reason}")
            elif await asyncio.to_thread(checksum, data) != entry.chunk.checksum:
                wrong.append(f"{entry.chunk.key.hex()} does not match its checksum")
    if wrong:
        raise TierError(
            f"{path} is inconsistent in {len(wrong)} places: {'; '.join(wrong[:_NAMED_MAX])}; "
            "start with recover=quiet to drop these, or recover=none to start empty"
        )
