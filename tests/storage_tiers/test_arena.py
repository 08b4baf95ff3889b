"""The shared-memory arena, mapped twice as the daemon and an engine do."""

from __future__ import annotations

import os

import pytest

from storage_tiers.arena import Arena, ArenaError


def test_both_mappings_see_the_same_bytes_and_generations() -> None:
    arena = Arena.create(8 << 20)
    engine = Arena.attach(os.dup(arena.fd))
    try:
        assert engine.epoch == arena.epoch
        assert engine.capacity_bytes == arena.capacity_bytes == 8 << 20
        arena.view(4096, 5)[:] = b"hello"
        assert bytes(engine.view(4096, 5)) == b"hello"
        before = engine.generation(4096)
        assert arena.advance(4096) == engine.generation(4096) == before + 1
        assert engine.generation(8192) == 0
    finally:
        engine.close()
        arena.close()


def test_epochs_differ() -> None:
    epochs = set()
    for _ in range(3):
        arena = Arena.create(1 << 20)
        epochs.add(arena.epoch)
        arena.close()
    assert len(epochs) == 3
    assert all(len(epoch) == 16 for epoch in epochs)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, (1 << 20) + 1), (1 << 20, 1)])
def test_a_view_outside_the_arena_is_refused(offset: int, length: int) -> None:
    arena = Arena.create(1 << 20)
    try:
        with pytest.raises(ValueError, match="outside"):
            arena.view(offset, length)
    finally:
        arena.close()


def test_memory_that_is_no_arena_is_refused() -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(ArenaError, match="no arena"):
        Arena.attach(fd)


def test_no_memory_is_a_clear_error() -> None:
    with pytest.raises(ArenaError, match=r"dram\.capacity"):
        Arena.create(0)
