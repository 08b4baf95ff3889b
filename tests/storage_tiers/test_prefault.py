"""Prefaulting takes the arena's memory, changes no byte, ends when told and knows its bounds."""

from __future__ import annotations

import os

import pytest

from storage_tiers import prefault
from storage_tiers.arena import Arena
from storage_tiers.prefault import Prefault, available_bytes
from tests.waiting import wait_until

BYTES = 24 << 20
FAR_TOO_MANY_BYTES = 64 << 30  # of address space; few are touched
WAIT_S = 60.0


def taken_bytes(arena: Arena) -> int:
    """Memory the kernel has given to the arena so far."""
    return os.fstat(arena.fd).st_blocks * 512


def test_all_memory_is_taken_and_what_it_holds_stays() -> None:
    arena = Arena.create(BYTES)
    assert taken_bytes(arena) < BYTES // 2
    arena.data[5 << 20 : (5 << 20) + 9] = b"contents!"
    running = Prefault(arena.data)
    running.start()
    wait_until(lambda: taken_bytes(arena) >= BYTES, WAIT_S, "every page is there")
    running.close()
    assert bytes(arena.data[5 << 20 : (5 << 20) + 9]) == b"contents!"
    assert not any(arena.data[6 << 20 : 7 << 20])
    arena.close()


def test_it_ends_before_the_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "available_bytes", lambda: None)
    arena = Arena.create(FAR_TOO_MANY_BYTES)
    running = Prefault(arena.data)
    running.start()
    wait_until(lambda: taken_bytes(arena) > 1 << 20, WAIT_S, "it has begun")
    running.close()
    here = taken_bytes(arena)
    assert here < FAR_TOO_MANY_BYTES
    assert taken_bytes(arena) == here
    arena.close()


def test_memory_the_system_has_not_got_is_left_to_be_taken_when_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefault, "available_bytes", lambda: BYTES)
    arena = Arena.create(BYTES)
    running = Prefault(arena.data)
    before = taken_bytes(arena)
    running.start()
    running.close()
    assert taken_bytes(arena) == before
    arena.close()


def test_the_kernel_says_what_is_available() -> None:
    available = available_bytes()
    assert available is not None and available > 1 << 20
