"""Leaving host memory and taking it over, below the processes: order, places, doubt."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvbm.daemon.handover import ARENA, INDEX, Handover, inherit
from kvbm.daemon.settings import DramSettings
from kvbm.daemon.snapshot import Snapshot, SnapshotError, read_snapshot, write_snapshot
from kvbm.manager import BlockManager, Catalogue
from kvbm.meter import CountingMeter
from kvbm.note import Note
from kvbm.note_dict import NoteDict
from kvbm.offload import LaneSettings
from runtime.systemd import Notifier
from storage_tiers.arena import Arena, Slot
from storage_tiers.base import Chunk, StoreItem, TierName
from storage_tiers.codec import checksum
from storage_tiers.dram import DramTier
from storage_tiers.memory import MemoryTier
from tests.kvbm.builders import (
    CHUNK_BYTES,
    WAIT_S,
    RecordingEvents,
    background,
    chunks_of,
    keys_of,
)

CAPACITY = 16 << 20
SETTINGS = DramSettings(capacity=CAPACITY)
NOBODY = Notifier(None, None)


class NodeMemory:
    """One daemon's host memory and what is about it; the first one's, or one taken over."""

    def __init__(self, left: dict[str, int] | None = None, *, lower: bool = False) -> None:
        self.events, self.meter = RecordingEvents(), CountingMeter()
        self.notes = NoteDict(self.events)
        catalogue = Catalogue(self.notes, self.notes)
        found = inherit(left or {}, NOBODY, SETTINGS)
        self.arena = Arena.create(CAPACITY) if found is None else found.arena
        self.is_heir = found is not None
        self.dram = DramTier(self.arena, catalogue)
        self.below = MemoryTier(CAPACITY, catalogue, name=TierName.SSD)
        manager = BlockManager(
            self.dram,
            [(self.below, LaneSettings())] if lower else [],
            self.notes,
            self.meter,
            notes=self.notes,
            lease_bytes_max=1,
        )
        self.manager = manager
        self.handover = Handover(NOBODY, SETTINGS, manager, catalogue, self.meter, found)

    async def store(self, items: Sequence[StoreItem]) -> None:
        await self.dram.store(items)

    def left(self, aside: Sequence[Slot] = ()) -> dict[str, int]:
        """What it leaves, as the next daemon is given it."""
        snapshot = Snapshot(self.arena.epoch, CAPACITY, False, self.dram.snapshot(), aside)
        return {ARENA: os.dup(self.arena.fd), INDEX: write_snapshot(snapshot)}


MakeMemory = Callable[..., NodeMemory]


@pytest.fixture
def memory() -> Iterator[MakeMemory]:
    made: list[NodeMemory] = []

    def make(left: dict[str, int] | None = None, *, lower: bool = False) -> NodeMemory:
        made.append(NodeMemory(left, lower=lower))
        return made[-1]

    yield make
    made[-1].dram.check_integrity()
    for each in made:
        each.arena.close()


async def test_what_was_left_is_taken_over_and_announced(memory: MakeMemory) -> None:
    old, items = memory(), chunks_of("left", 8)
    await old.store(items)
    heir = memory(old.left())
    assert not len(heir.dram), "nothing is seen before it was checked"
    assert heir.handover.status().waiting_chunks == 8
    report = await heir.handover.run()
    assert (report.chunks, report.bytes, report.dropped) == (8, 8 * CHUNK_BYTES, {})
    assert heir.dram.find(keys_of(items)) == [item.chunk for item in items]
    assert heir.events.replay() == {(TierName.DRAM, key) for key in keys_of(items)}
    assert heir.dram.leased_bytes == 0
    before = {chunk.key: slot for chunk, slot in old.dram.snapshot()}
    assert {chunk.key: slot for chunk, slot in heir.dram.snapshot()} == before, "generations too"


async def test_the_order_of_use_is_kept_and_parents_come_first(
    memory: MakeMemory,
) -> None:
    now_s = [1e9]
    old = memory()
    old.dram._index._clock = lambda: now_s[0]
    chains = [chunks_of(f"chain {number}", 3) for number in range(4)]
    for chain in chains:
        await old.store(chain)
        now_s[0] += 10
    old.dram.touch(keys_of(chains[1])[::-1])
    heir = memory(old.left())
    shown = [chunk.key for chunk, _ in reversed(heir.handover._waiting)]
    assert shown == keys_of([*chains[1], *chains[3], *chains[2], *chains[0]])
    await heir.handover.run()
    room = CAPACITY // CHUNK_BYTES
    await heir.store(chunks_of("new", room - 12 + 3, chained=False))
    left = {key for chain in chains for key in keys_of(chain) if key in heir.dram}
    assert left == set(keys_of([*chains[1], *chains[3], *chains[2]]))


async def test_what_the_daemon_before_did_not_write_down_is_written_by_this_one(
    memory: MakeMemory,
) -> None:
    old, items = memory(), chunks_of("down", 6)
    await old.store(items)
    heir = memory(old.left(), lower=True)
    await heir.below.store(items[:2])
    await heir.handover.run()
    await heir.handover.offer()
    offloader = heir.manager.offloader
    assert offloader.depth["G3"] == 4
    async with background(offloader.run):
        assert await offloader.drain(WAIT_S) == 0
    assert heir.below.contents.keys() == set(keys_of(items))


async def test_what_is_left_is_believed_once(memory: MakeMemory) -> None:
    old = memory()
    await old.store(chunks_of("once", 4))
    left = old.left()
    stale = {name: os.dup(fd) for name, fd in left.items()}
    heir = memory(left)
    assert heir.is_heir
    again = memory(stale)
    assert not again.is_heir and not again.handover.status().waiting_chunks


async def test_slots_kept_aside_are_nobodys(memory: MakeMemory) -> None:
    old = memory()
    slot = old.dram.reserve(CHUNK_BYTES)
    assert slot is not None
    await old.store(chunks_of("beside", 4))
    heir = memory(old.left([slot]))
    await heir.handover.run()
    assert heir.handover.status().aside_bytes == CHUNK_BYTES
    assert heir.arena.generation(slot.offset) > slot.generation
    await heir.store(chunks_of("more than fits", 2 * CAPACITY // CHUNK_BYTES, chained=False))
    assert heir.dram.usage().evictions_total["capacity"] > 0
    assert all(place.offset != slot.offset for _, place in heir.dram.snapshot())


async def test_a_slot_that_changed_hands_and_one_out_of_range_are_dropped(
    memory: MakeMemory,
) -> None:
    old, items = memory(), chunks_of("doubtful", 4)
    await old.store(items)
    placed = old.dram.snapshot()
    places = {chunk.key: slot for chunk, slot in placed}
    outside = Slot(1 << 40, CHUNK_BYTES, 0)
    chunks = [(c, outside if c == items[3].chunk else s) for c, s in placed]
    snapshot = Snapshot(old.arena.epoch, CAPACITY, False, chunks, [])
    old.arena.advance(places[items[2].chunk.key].offset)
    heir = memory({ARENA: os.dup(old.arena.fd), INDEX: write_snapshot(snapshot)})
    report = await heir.handover.run()
    assert (report.chunks, report.dropped) == (2, {"does_not_fit": 2})
    assert heir.meter.drops == {("handover", "does_not_fit"): 2}


async def test_a_chunk_that_came_anew_meanwhile_is_not_taken_twice(memory: MakeMemory) -> None:
    old, items = memory(), chunks_of("anew", 3)
    await old.store(items)
    heir = memory(old.left())
    await heir.store(items[:1])
    report = await heir.handover.run()
    assert (report.chunks, report.dropped) == (2, {"came_anew": 1})


async def test_what_time_did_not_reach_is_dropped(
    memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm.daemon.handover.VERIFY_S_MAX", -1.0)
    old = memory()
    await old.store(chunks_of("late", 3))
    heir = memory(old.left())
    report = await heir.handover.run()
    assert (report.chunks, report.dropped) == (0, {"late": 3})
    assert heir.dram.leased_bytes == heir.dram.usage().used_bytes == 0


async def test_notes_are_handed_over_seen_to_or_not(
    memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, items = memory(), chunks_of("noted", 4)
    keys = keys_of(items)
    notes = [Note(7, None, np.arange(4, dtype=np.uint64)).encode(), b""] * 2
    await old.store(items)
    old.notes.learn(keys, notes)
    left: list[dict[str, int]] = []

    async def store(fds: Mapping[str, int]) -> bool:
        left.append({name: os.dup(fd) for name, fd in fds.items()})
        return True

    monkeypatch.setattr(Notifier, "store", lambda _, fds: store(fds))
    monkeypatch.setattr(Notifier, "listens", True)
    await old.handover.leave([])
    idle = memory(left[-1])  # it does not get to look at any
    assert idle.is_heir and [idle.notes.note_of(key) for key in keys] == [b""] * 4
    await idle.handover.leave([])
    heir = memory(left[-1])
    await heir.handover.run()
    assert [heir.notes.note_of(key) for key in keys] == notes


# -- the snapshot -------------------------------------------------------------------------


def some_snapshot() -> Snapshot:
    items = chunks_of("snapshot", 3)
    placed = [(item.chunk, Slot(n * 8192, 8192, n + 1)) for n, item in enumerate(items)]
    top = Chunk(items[0].chunk.key, 1, (1 << 64) - 1, None, (1 << 31) - 1)
    placed.append((top, Slot(1 << 44, 1, (1 << 64) - 1)))
    notes = (b"first", b"", b"third of them", b"")
    placed = [(replace(c, note=note), s) for (c, s), note in zip(placed, notes, strict=True)]
    return Snapshot(bytes(range(1, 17)), CAPACITY, True, placed, [Slot(4096, 10, 7)])


def test_a_snapshot_is_read_as_it_was_written() -> None:
    for snapshot in (some_snapshot(), replace(some_snapshot(), chunks=[], aside=[])):
        fd = write_snapshot(snapshot)
        read = read_snapshot(fd)
        assert read == snapshot
        assert [c.note for c, _ in read.chunks] == [c.note for c, _ in snapshot.chunks]
        os.close(fd)


def test_no_other_bytes_are_read_as_one() -> None:
    fd = write_snapshot(some_snapshot())
    whole = os.pread(fd, 1 << 20, 0)
    for at in range(len(whole)):
        os.pwrite(fd, bytes([whole[at] ^ 0x10]), at)
        with pytest.raises(SnapshotError):
            read_snapshot(fd)
        os.pwrite(fd, whole[at : at + 1], at)
    assert read_snapshot(fd) == some_snapshot()
    for length in range(len(whole)):
        os.ftruncate(fd, 0)
        os.pwrite(fd, whole[:length], 0)
        with pytest.raises(SnapshotError):
            read_snapshot(fd)
    os.close(fd)


def test_a_length_that_the_checksum_covers_must_agree_with_the_bytes() -> None:
    fd = write_snapshot(some_snapshot())
    body = os.pread(fd, 1 << 20, 24) + bytes(8)
    os.pwrite(fd, checksum(body).to_bytes(8, "little") + body, 16)
    with pytest.raises(SnapshotError, match="another length"):
        read_snapshot(fd)
    os.close(fd)


# -- who does not keep it -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "settings", "reason"),
    [
        ({}, SETTINGS, "neither systemd nor"),
        ({"NOTIFY_SOCKET": "/x", "FDSTORE": "1"}, SETTINGS, "FileDescriptorStoreMax"),
        ({"NOTIFY_SOCKET": "/x"}, DramSettings(handover=False), "dram.handover"),
        ({"NOTIFY_SOCKET": "/x", "FDSTORE": "2"}, SETTINGS, None),
        ({"NOTIFY_SOCKET": "/x"}, SETTINGS, None),  # a systemd that does not tell
    ],
)
def test_whether_it_will_be_kept_is_known(
    memory: MakeMemory, environ: dict[str, str], settings: DramSettings, reason: str | None
) -> None:
    notifier, node = Notifier.from_environ(environ), memory()
    catalogue = Catalogue(node.notes, node.notes)
    status = Handover(notifier, settings, node.manager, catalogue, node.meter, None).status()
    assert status.available == (reason is None)
    assert (status.reason or "") == "" if reason is None else reason in (status.reason or "")


def test_with_the_setting_off_nothing_is_taken_over_and_its_memory_is_let_go(
    tmp_path: Path,
) -> None:
    first, second = os.memfd_create("a"), os.memfd_create("b")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        notifier = Notifier(str(tmp_path / "notify"), None)
        off = DramSettings(handover=False)
        assert inherit({ARENA: first, INDEX: second}, notifier, off) is None
        said = {systemd.recv(100), systemd.recv(100)}
    assert said == {f"FDSTOREREMOVE=1\nFDNAME={name}".encode() for name in (ARENA, INDEX)}
    for fd in (first, second):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
