"""Movers: every alignment arrives, nothing beside it changes, short transfers are failures."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage_tiers.base import TierError
from storage_tiers.files import (
    PAGE,
    BlockFile,
    FileMover,
    Moved,
    NotMoved,
    Piece,
    address_of,
    make_mover,
    split,
)
from storage_tiers.nixl import NixlUnavailableError, add_plugin, availability, new_agent

KINDS = ["plain"] + (["nixl"] if availability() is None else [])
FILE_BYTES = 4 << 20


@pytest.fixture(params=KINDS)
async def mover(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FileMover]:
    file = BlockFile.open(tmp_path / "file", FILE_BYTES)
    mover = make_mover(file, request.param)
    yield mover
    await mover.close()
    file.close()


async def test_any_memory_and_length_is_moved_and_nothing_else(mover: FileMover) -> None:
    source = random.Random(1)
    memory = memoryview(mmap.mmap(-1, FILE_BYTES))
    pieces: list[Piece] = []
    at = 0
    while at < FILE_BYTES - (1 << 19):
        length = source.choice([1, 100, PAGE, PAGE + 1, 50_000, 300_000, 16 * PAGE])
        start = at + source.choice([0, 0, 1, 512])
        pieces.append(Piece(memory[start : start + length], at))
        at += -(-(length + 512) // PAGE) * PAGE
    memory[:] = source.randbytes(FILE_BYTES)
    wanted = [bytes(piece.data) for piece in pieces]
    assert await mover.write(pieces) == [Moved()] * len(pieces)
    assert await mover.sync() == Moved()
    memory[:] = b"\xee" * FILE_BYTES
    assert await mover.read(pieces) == [Moved()] * len(pieces)
    assert [bytes(piece.data) for piece in pieces] == wanted
    for piece in pieces:
        piece.data[:] = b"\xee" * len(piece.data)
    assert memory == b"\xee" * FILE_BYTES


async def test_read_only_memory_can_be_written_out(mover: FileMover) -> None:
    data = os.urandom(3 * PAGE + 7)
    assert await mover.write([Piece(memoryview(data), PAGE)]) == [Moved()]
    back = bytearray(len(data))
    assert await mover.read([Piece(memoryview(back), PAGE)]) == [Moved()]
    assert back == data


async def test_a_short_read_fails_only_its_piece(mover: FileMover, tmp_path: Path) -> None:
    os.truncate(tmp_path / "file", FILE_BYTES - PAGE)
    room = memoryview(mmap.mmap(-1, 4 * PAGE))
    pieces = [Piece(room[: 2 * PAGE], 0), Piece(room[2 * PAGE :], FILE_BYTES - 2 * PAGE)]
    first, second = await mover.read(pieces)
    assert first == Moved()
    assert isinstance(second, NotMoved)
    assert second.reason


async def test_many_calls_at_once_do_not_mix(mover: FileMover) -> None:
    import asyncio

    blocks = [memoryview(os.urandom(40_000)) for _ in range(60)]
    places = [Piece(block, index * 12 * PAGE) for index, block in enumerate(blocks)]
    await asyncio.gather(*(mover.write([piece]) for piece in places))
    room = [memoryview(bytearray(40_000)) for _ in blocks]
    await asyncio.gather(
        *(mover.read([Piece(r, p.offset)]) for r, p in zip(room, places, strict=True))
    )
    assert room == blocks


def test_aligned_memory_is_not_copied() -> None:
    memory = memoryview(mmap.mmap(-1, 4 * PAGE))
    assert address_of(memory) % PAGE == 0
    piece = Piece(memory[: 3 * PAGE], 0)
    assert split(piece, direct=True) == (piece, None)
    whole, rest = split(Piece(memory[: 3 * PAGE + 5], PAGE), direct=True)
    assert whole is not None and len(whole.data) == 3 * PAGE
    assert rest is not None and (len(rest.data), rest.offset) == (5, 4 * PAGE)
    assert split(Piece(memory[1:], 0), direct=True)[0] is None
    assert split(Piece(memory[1:], 0), direct=False)[1] is None


async def test_a_filesystem_without_direct_io_is_used_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse_direct(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse_direct)
    file = BlockFile.open(tmp_path / "file", FILE_BYTES)
    mover = make_mover(file, "plain")
    assert mover.name == "preadv-buffered"
    assert await mover.write([Piece(memoryview(b"abc"), 0)]) == [Moved()]
    assert await mover.sync() == Moved()
    assert (tmp_path / "file").read_bytes()[:4] == b"abc\0"
    await mover.close()
    file.close()


def test_a_full_disk_is_told_and_the_file_left_as_it_was(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    too_much = 2 * disk.f_blocks * disk.f_frsize // PAGE * PAGE
    with pytest.raises(TierError, match=r"cannot reserve \d+ bytes in .*No space left"):
        BlockFile.open(tmp_path / "file", too_much)
    assert (tmp_path / "file").stat().st_blocks == 0


def test_an_unknown_mover_is_refused(tmp_path: Path) -> None:
    file = BlockFile.open(tmp_path / "file", PAGE)
    with pytest.raises(TierError, match="use auto, nixl or plain"):
        make_mover(file, "fast")
    file.close()


@pytest.mark.skipif("nixl" not in KINDS, reason=f"NIXL: {availability()}")
@pytest.mark.parametrize("plugin", ["POSIX", "GDS", "GDS_MT", "none such"])
def test_a_plugin_is_said_to_be_there_only_if_it_loads(plugin: str) -> None:
    """NIXL lists those of GPUs' storage where their libraries are missing."""
    agent, errors = new_agent("test")
    why_not = availability(plugin)
    if why_not is None:
        add_plugin(agent, errors, plugin, {})
    else:
        assert plugin in why_not
        with pytest.raises(NixlUnavailableError, match=plugin):
            add_plugin(agent, errors, plugin, {})
