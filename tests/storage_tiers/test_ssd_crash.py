"""The SSD tier killed at random moments: what it acknowledged is there, and all of it is right."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from storage_tiers.base import Chunk, Key, SilentListener
from storage_tiers.files import Piece, padded
from storage_tiers.ssd import SsdTier
from storage_tiers.testing import make_items

CAPACITY_BYTES = 2 << 20
KILLS = 10
ROOT = Path(__file__).parents[2]


def run_and_kill(path: Path, seed: int, after_s: float) -> list[str]:
    """Lines a child printed before it was killed, the last perhaps incomplete one left out."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.storage_tiers.crash_child",
            str(path),
            str(CAPACITY_BYTES),
            str(seed),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    lines: list[str] = []
    with child:
        try:
            for line in child.stdout:
                lines.append(line.strip())
                if line == "running\n":
                    break
            time.sleep(after_s)
        finally:
            child.kill()
        lines += [line.strip() for line in child.stdout if line.endswith("\n")]
    assert "running" in lines, "the child could not open what the last one left"
    return lines


async def test_nothing_acknowledged_is_lost_and_nothing_listed_is_wrong(tmp_path: Path) -> None:
    """Children share one directory; each opens it in strict mode, which verifies every byte."""
    seed = 20261121
    source = random.Random(seed)
    stored: set[bytes] = set()
    evictions = 0
    for kill in range(KILLS):
        lines = run_and_kill(tmp_path, seed + kill, source.uniform(0, 0.25))
        for line in lines:
            if line.startswith("+"):
                stored.add(bytes.fromhex(line[1:]))
            elif line.startswith("-"):
                stored.discard(bytes.fromhex(line[1:]))
                evictions += 1
    assert evictions > 100, "extents were not used again; the test is too short"
    tier = SsdTier(tmp_path, CAPACITY_BYTES, SilentListener(), recover="strict", mover="plain")
    report = await tier.open()
    tier.check_integrity()
    assert report.dropped == {}
    missing = [key for key in stored if tier.find([Key(key)]) == [None]]
    assert not missing, f"seed {seed}: {len(missing)} of {len(stored)} are lost"
    await tier.close()


async def test_no_extent_is_written_while_the_catalogue_points_to_it(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path, CAPACITY_BYTES, SilentListener(), mover="plain")
    await tier.open()
    directory = tier._directory
    write, commit = directory.mover.write, directory.catalogue.commit
    written: dict[int, bool] = {}  # offset -> synced
    checks = 0

    async def checked_write(pieces: list[Piece]) -> object:
        nonlocal checks
        entries, _ = await directory.catalogue.entries()
        for piece in pieces:
            end = piece.offset + padded(len(piece.data))
            for entry in entries:
                assert entry.offset >= end or entry.offset + entry.chunk.length <= piece.offset
                checks += 1
            written[piece.offset] = False
        return await write(pieces)

    async def checked_sync() -> object:
        written.update(dict.fromkeys(written, True))
        return await sync()

    async def checked_commit(changes: object) -> None:
        for entry in changes.put:  # type: ignore[attr-defined]
            assert written[entry.offset], "catalogued before it was on the disk"
        await commit(changes)  # type: ignore[arg-type]

    sync = directory.mover.sync
    directory.mover.write = checked_write  # type: ignore[method-assign,assignment]
    directory.mover.sync = checked_sync  # type: ignore[method-assign,assignment]
    directory.catalogue.commit = checked_commit  # type: ignore[method-assign]
    source = random.Random(5)
    found: list[Chunk | None] = []
    for index in range(60):
        items = make_items(str(index), source.randint(1, 8), source.choice([3000, 60_000, 200_000]))
        await tier.store(items)
        found += tier.find([items[0].chunk.key])
        if index % 7 == 0:
            await tier.remove([items[-1].chunk.key])
    assert checks > 1000
    tier.check_integrity()
    await tier.close()
