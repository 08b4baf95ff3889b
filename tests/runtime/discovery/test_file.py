"""Discovery in a directory: everything that every kind does, killed writers, foreign files."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.discovery import Discovery, DiscoverySettings, DiscoveryUnavailable, Pending, Written
from runtime.discovery import leased as leased_module
from runtime.discovery.file import FileStore, default_directory
from runtime.discovery.liveness import Liveness
from tests.runtime.discovery.conformance import Conformance, Surviving
from tests.runtime.discovery.world import Members, take_until_synced, until

TTL_S = 2.0


class FileWorld(Members):
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        super().__init__(
            DiscoverySettings(discovery="file", ttl=TTL_S, file_directory=directory, file_poll=0.02)
        )

    async def end_lease(self, member: Discovery) -> None:
        lease = member.status().lease
        assert lease is not None
        (self.directory / "leases" / lease).unlink()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[FileWorld]:
    world = FileWorld(tmp_path / "discovery")
    yield world
    await world.close()


class TestFile(Conformance, Surviving):
    pass


async def test_corrupt_and_foreign_files_are_skipped_and_left(world: FileWorld) -> None:
    member = await world.join()
    await member.put("v1/good", b"good")
    await member.put("v1/torn", b"torn in the middle")
    values = world.directory / "values" / "v1"
    torn = values / "=torn"
    torn.write_bytes(torn.read_bytes()[:-3])
    (values / "README").write_text("foreign")
    (values / "=foreign").write_text("foreign")
    (values / "=empty").touch()
    (values / "=odd name").write_bytes((values / "=good").read_bytes())
    (values / "=huge").write_bytes(bytes(1 << 20))
    (values / "=link").symlink_to(values / "=good")
    os.mkfifo(values / "=fifo")
    (world.directory / "leases" / "notes.txt").write_text("foreign")
    before = sorted(path.name for path in values.iterdir())
    for _ in range(3):
        assert await member.list("v1/") == {"v1/good": b"good"}
    assert member.status().skipped_total == 9
    assert await take_until_synced(member.watch("v1/")) == {"v1/good": b"good"}
    await member.close()
    assert sorted(path.name for path in values.iterdir()) == [
        name for name in before if name not in {"=good", "=odd name"}
    ]


async def test_what_the_dead_left_is_swept_by_the_living(tmp_path: Path) -> None:
    directory = tmp_path / "discovery"
    dead = FileStore(directory, 0.02)
    lease = await dead.grant(0.2)
    await dead.put(lease, "v1/dead", b"")
    await dead.close()
    left = directory / "values" / "v1" / "=dead"
    (left.parent / ".half").write_bytes(b"a writer was killed before it renamed this")
    os.utime(left.parent / ".half", (0, 0))
    living = FileStore(directory, 0.02)
    mine = await living.grant(30)
    assert left.exists()
    async with asyncio.timeout(60):
        while left.exists():
            await living.renew(mine)
            await asyncio.sleep(0.05)
    assert [path.name for path in (directory / "leases").iterdir()] == [mine]
    assert list((directory / "values" / "v1").iterdir()) == []
    await living.close()


async def test_a_lost_directory_is_made_again(world: FileWorld) -> None:
    member = await world.join()
    await member.put("v1/a", b"1")
    moved = world.directory.with_name("moved")
    world.directory.rename(moved)
    await until(lambda: member.status().lease_losses_total == 1)
    await until(lambda: member.status().lease is not None and not member.status().pending)
    assert await member.list("v1/") == {"v1/a": b"1"}


async def test_a_directory_that_others_can_write_is_refused(world: FileWorld) -> None:
    world.directory.mkdir()
    world.directory.chmod(0o777)
    member = await world.join()
    await until(lambda: "writable by nobody else" in (member.status().error or ""))
    with pytest.raises(DiscoveryUnavailable, match="777"):
        await member.list("v1/")
    world.directory.chmod(0o700)
    assert await member.put("v1/a", b"") == Written()


async def test_a_writer_that_holds_the_lock_delays_others_and_no_longer(
    world: FileWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leased_module, "WRITE_WAIT_S", 0.2)
    member = await world.join()
    assert await member.put("v1/a", b"1") == Written()
    with (world.directory / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert isinstance(await member.put("v1/a", b"2"), Pending)
        assert await member.list("v1/") == {"v1/a": b"1"}
    await until(lambda: member.status().pending == 0)
    assert await member.list("v1/") == {"v1/a": b"2"}


async def test_a_clock_that_jumps_ends_no_lease_for_watchers(tmp_path: Path) -> None:
    now_s = [100.0]
    liveness = Liveness(lambda: now_s[0])
    assert liveness.silence_s("a", 1, 2.0) == 2.0
    assert liveness.silence_s("new", 1, -7200.0) == 0.0
    assert liveness.silence_s("a", 2, 7200.0) == 0.0  # it moved; its age is the clock's doing
    now_s[0] += 3
    assert liveness.silence_s("a", 2, 0.0) == 3.0
    liveness.keep({"new"})
    assert liveness.silence_s("a", 2, 50.0) == 50.0


async def test_an_owner_whose_clock_jumped_registers_again(world: FileWorld) -> None:
    member = await world.join()
    await member.put("v1/a", b"1")
    lease = member.status().lease
    assert lease is not None
    past_s = time.time() - 3600
    os.utime(world.directory / "leases" / lease, (past_s, past_s))
    await until(lambda: member.status().lease_losses_total == 1)
    await until(lambda: member.status().lease is not None and not member.status().pending)
    assert await member.list("v1/") == {"v1/a": b"1"}


def test_the_default_directory_is_the_users_own() -> None:
    assert default_directory(4711) == Path("/tmp/kvbm-4711/discovery")
