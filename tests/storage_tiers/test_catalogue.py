"""The catalogue's transactions: what waits shares one, and fails together; a map that is full."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage_tiers.base import Chunk, Key
from storage_tiers.catalogue import Catalogue, CatalogueError, Changes, Entry

MAP_BYTES = 1 << 20
SMALL_BYTES = 256 << 10


def put(number: int) -> Changes:
    key = Key(number.to_bytes(16, "big"))
    return Changes(put=[Entry(Chunk(key, 4096, number, None, 0), 4096 * number, number)])


@contextmanager
def busy(catalogue: Catalogue) -> Iterator[None]:
    """The catalogue's thread is writing something else for as long as the block lasts."""
    done = threading.Event()
    catalogue._pool.submit(done.wait, 30)
    try:
        yield
    finally:
        done.set()


def last_transaction(catalogue: Catalogue) -> int:
    number: int = catalogue._opened().info()["last_txnid"]
    return number


async def test_commits_that_wait_share_a_transaction(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, MAP_BYTES, MAP_BYTES)
    await catalogue.open()
    await catalogue.commit(put(1))
    before = last_transaction(catalogue)
    with busy(catalogue):
        waiting = [asyncio.create_task(catalogue.commit(put(n))) for n in (2, 3, 4)]
        # Taken back in the same transaction it was put: the order of commits is kept.
        gone = Changes(delete=[Key((3).to_bytes(16, "big"))])
        waiting.append(asyncio.create_task(catalogue.commit(gone)))
        await asyncio.sleep(0)  # each has got to where it waits
    await asyncio.gather(*waiting)
    assert last_transaction(catalogue) == before + 1
    found, unreadable = await catalogue.entries()
    assert [entry.stamp for entry in found] == [1, 2, 4] and not unreadable
    await catalogue.close()


async def test_commits_that_share_a_transaction_fail_together(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, MAP_BYTES, MAP_BYTES)
    await catalogue.open()
    entries = [put(n).put[0] for n in range(1, 50_000)]  # more than the map holds
    with busy(catalogue):
        changes = (put(1), Changes(put=entries), put(2))
        waiting = [asyncio.create_task(catalogue.commit(part)) for part in changes]
        await asyncio.sleep(0)
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, CatalogueError), outcome
    assert await catalogue.entries() == ([], [])
    await catalogue.commit(put(7))  # and the next one is none the worse for it
    assert [entry.stamp for entry in (await catalogue.entries())[0]] == [7]
    await catalogue.close()


async def test_a_closed_catalogue_is_a_programmers_error(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, MAP_BYTES, MAP_BYTES)
    with pytest.raises(AssertionError):
        await catalogue.commit(put(1))


def entries(name: int, count: int) -> list[Entry]:
    keys = [Key(name.to_bytes(8, "big") + index.to_bytes(8, "big")) for index in range(count)]
    return [Entry(Chunk(key, 4096, 1, None, 0), 4096 * at, at) for at, key in enumerate(keys)]


async def test_a_full_map_grows_and_nothing_of_the_commit_is_lost(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, SMALL_BYTES, 64 << 20)
    await catalogue.open()
    for name in range(8):
        await catalogue.commit(Changes(put=entries(name, 1000)))
    assert catalogue.grown > 0
    assert len((await catalogue.entries())[0]) == 8000
    await catalogue.close()
    again = Catalogue(tmp_path, SMALL_BYTES, 64 << 20)  # smaller than what is in it by now
    await again.open()
    await again.commit(Changes(put=entries(8, 1000)))
    assert len((await again.entries())[0]) == 9000
    await again.close()


async def test_a_map_that_may_not_grow_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, SMALL_BYTES, SMALL_BYTES)
    await catalogue.open()
    await catalogue.commit(Changes(put=entries(0, 500)))
    with pytest.raises(CatalogueError, match="MDB_MAP_FULL"):
        await catalogue.commit(Changes(delete=[entries(0, 1)[0].chunk.key], put=entries(1, 50_000)))
    assert len((await catalogue.entries())[0]) == 500
    await catalogue.commit(Changes(put=entries(2, 10)))
    assert len((await catalogue.entries())[0]) == 510
    await catalogue.close()
