"""The catalogue's own limits: a map that is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage_tiers.base import Chunk, Key
from storage_tiers.catalogue import Catalogue, CatalogueError, Changes, Entry

SMALL = 256 << 10


def entries(name: int, count: int) -> list[Entry]:
    keys = [Key(name.to_bytes(8, "big") + index.to_bytes(8, "big")) for index in range(count)]
    return [Entry(Chunk(key, 4096, 1, None, 0), 4096 * at, at) for at, key in enumerate(keys)]


async def test_a_full_map_grows_and_nothing_of_the_commit_is_lost(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, SMALL, 64 << 20)
    await catalogue.open()
    for name in range(8):
        await catalogue.commit(Changes(put=entries(name, 1000)))
    assert catalogue.grown > 0
    assert len((await catalogue.entries())[0]) == 8000
    await catalogue.close()
    again = Catalogue(tmp_path, SMALL, 64 << 20)  # smaller than what is in it by now
    await again.open()
    await again.commit(Changes(put=entries(8, 1000)))
    assert len((await again.entries())[0]) == 9000
    await again.close()


async def test_a_map_that_may_not_grow_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, SMALL, SMALL)
    await catalogue.open()
    await catalogue.commit(Changes(put=entries(0, 500)))
    with pytest.raises(CatalogueError, match="MDB_MAP_FULL"):
        await catalogue.commit(Changes(delete=[entries(0, 1)[0].chunk.key], put=entries(1, 50_000)))
    assert len((await catalogue.entries())[0]) == 500
    await catalogue.commit(Changes(put=entries(2, 10)))
    assert len((await catalogue.entries())[0]) == 510
    await catalogue.close()
