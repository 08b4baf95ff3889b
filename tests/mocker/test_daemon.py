"""Mock engines over a real daemon: its process, its SSD, and every byte that comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm.cli.temporary import TemporaryDaemon
from mocker.content import Chain, TokenContent
from mocker.daemon import DaemonTiers
from mocker.realtime import RealtimeEngine, answer_to
from mocker.timing import PS_PER_MS, StepTiming
from tests.mocker.builders import BLOCK, settings
from tests.waiting import wait_until

CHUNK = 16 << 10
TIMING = StepTiming(PS_PER_MS, PS_PER_MS, 1000, 0, 0)
PROMPT = list(range(100, 100 + 24 * BLOCK + 1))
WAIT_S = 60.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[TemporaryDaemon]:
    given = {
        "node": "mocker",
        "dram.capacity": "16MiB",
        "ssd.path": tmp_path / "ssd",
        "ssd.capacity": "128MiB",
        "governor.mode": "always_load",
    }
    with TemporaryDaemon(tmp_path, given) as running:
        yield running


async def answered(daemon: TemporaryDaemon, index: int) -> tuple[int, DaemonTiers]:
    """The prompt on an engine of its own: how many of its tokens were computed."""
    async with DaemonTiers(daemon.socket, CHUNK, node=0) as tiers:
        given = settings(timing=TIMING, num_blocks=256)
        async with RealtimeEngine(given, speedup=1000, index=index, tiers=tiers) as engine:
            chain = Chain(TokenContent(PROMPT, BLOCK))
            chain.extend(len(PROMPT) // BLOCK)
            await tiers.fetch(chain.hashes)
            assert [t async for t in engine.generate(PROMPT, 5)] == answer_to(PROMPT, 5)
            await tiers.drained()
            computed = engine.engine.tokens_computed_total
        assert (tiers.failed_total, tiers.wrong_total, tiers.dropped_total) == (0, 0, 0)
        tiers.check_integrity()
    return computed, tiers


async def test_an_engine_finds_what_another_stored_in_host_memory_and_on_the_ssd(
    daemon: TemporaryDaemon,
) -> None:
    blocks = len(PROMPT) // BLOCK

    def held_by(name: str) -> int:
        held = {tier["tier"]: tier for tier in daemon.client.get("/v1/tiers")["tiers"]}
        return int(held[name]["chunks"])

    computed, tiers = await answered(daemon, 0)
    assert (computed, tiers.loaded_total) == (len(PROMPT) + 4, 0)
    assert tiers.stored_total == blocks + 1  # and one that the answer filled
    # It takes what it was handed, which is not yet when the hand is empty.
    wait_until(lambda: held_by("G2") > blocks, WAIT_S, "all is in host memory")
    computed, tiers = await answered(daemon, 1)
    assert (computed, tiers.loaded_total) == (1 + 4, blocks)
    wait_until(lambda: held_by("G3") >= blocks, WAIT_S, "the prompt is on the SSD")
    daemon.restart()
    computed, tiers = await answered(daemon, 2)
    assert (computed, tiers.loaded_total) == (1 + 4, blocks)
