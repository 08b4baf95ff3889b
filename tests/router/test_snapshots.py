"""The index over restarts: what is read is young and whole, or nothing is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router.index import Index, Tier, WorkerId
from router.snapshots import Snapshots
from runtime.hashing import sequence_hashes

LOCAL = np.arange(1, 50, dtype=np.uint64)
WORKER = WorkerId(7, 1)


def full() -> Index:
    index = Index(1000)
    index.stored(WORKER, Tier.G2, None, sequence_hashes(LOCAL), LOCAL)
    return index


def reach(index: Index) -> int:
    return int(index.find(LOCAL).reach.max(initial=0))


class Wall:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_young_snapshot_is_read_and_an_old_one_is_not(tmp_path: Path) -> None:
    wall = Wall()
    snapshots = Snapshots(tmp_path / "deep" / "index", 60, wall=wall)
    assert snapshots.read(Index(1000)) == "absent"
    assert snapshots.write(snapshots.pack(full())) == "written"
    wall.now += 59
    index = Index(1000)
    assert snapshots.read(index) == "read" and reach(index) == len(LOCAL)
    for now in (1061.0, 999.0):  # too old; and of a clock that was set back
        wall.now = now
        index = Index(1000)
        assert snapshots.read(index) == "old" and reach(index) == 0
    assert snapshots.status.read == "old" and snapshots.status.written_total == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["index"]


@pytest.mark.parametrize("damage", ["short", "head", "body", "capacity", "directory"])
def test_what_cannot_be_used_changes_nothing(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index"
    snapshots = Snapshots(path, 1e9)
    packed = bytearray(snapshots.pack(full()))
    match damage:
        case "short":
            del packed[5:]
        case "head":
            packed[0] ^= 1
        case "body":
            packed[-1] ^= 1
    if damage == "directory":
        path.mkdir()
    else:
        path.write_bytes(packed)
    index = Index(8 if damage == "capacity" else 1000)
    assert snapshots.read(index) == "refused"
    assert len(index) == 0
    index.check_integrity()


def test_a_snapshot_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "index", 1e9)
    snapshots.write(snapshots.pack(full()))
    blocked = Snapshots(tmp_path / "index" / "below-a-file", 1e9)
    assert blocked.write(b"x") == "not-written" and blocked.status.failed_total == 1
    assert snapshots.read(Index(1000)) == "read"
