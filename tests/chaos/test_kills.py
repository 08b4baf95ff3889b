"""kill -9 of the daemon at random points of a mixed load, again and again.

Whatever a daemon gives out, during the load or after its restart, is what was stored under that
key, and everything its SSD lists is readable. `make chaos` kills 200 times; a test run fewer times.
The seed is printed with a failure; KVBM_CHAOS_SEED repeats its choices, not its timing.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from kvbm.stand_in import StandIn
from runtime.embedded import EmbeddedS3
from storage_tiers.base import StoreItem
from storage_tiers.testing import make_items

KILLS = int(os.environ.get("KVBM_CHAOS_KILLS", "4"))
CHUNK = 64 << 10
CHAINS, CHAIN_CHUNKS = 60, 12
BUCKET = "chaos"
WAIT_S = 120.0

Chains = list[list[StoreItem]]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with ExitStack() as cleanup:
        s3 = cleanup.enter_context(EmbeddedS3(tmp_path / "s3", buckets=[BUCKET]))
        runtime = Path(tempfile.mkdtemp(prefix="kvbm-chaos-"))
        cleanup.callback(shutil.rmtree, runtime, ignore_errors=True)
        section = {
            **s3.settings(BUCKET),
            "linger": "50ms",
            "object_bytes": "1MiB",
        }
        folder = tmp_path / "daemon"
        daemon = Daemon(
            DaemonConfig(
                folder=folder,
                socket=runtime / "s",
                logs=folder,
                records=folder,
                s3=section,
                dram="16MiB",  # holds a third of the chains, the SSD all but a few
                ssd="64MiB",
            )
        )
        cleanup.callback(daemon.process.stop)
        yield daemon


class Load:
    """One engine that stores and fetches random chains until it is told to end."""

    def __init__(self, daemon: Daemon, chains: Chains, seed: int) -> None:
        self._daemon = daemon
        self._chains = chains
        self._dice = random.Random(seed)
        self._ended = threading.Event()
        self.began = threading.Event()
        self.fetched = 0

    def end(self) -> None:
        self._ended.set()

    def run(self) -> None:
        with StandIn(self._daemon.socket, CHUNK) as engine:
            self.began.set()
            while not self._ended.is_set():
                chain = self._dice.choice(self._chains)
                if self._dice.random() < 0.5:
                    engine.offer(chain)
                else:
                    self.fetched += checked(engine, chain)


def checked(engine: StandIn, chain: list[StoreItem]) -> int:
    """Fetch a chain; how many chunks came. Fails if one of them is not what was stored."""
    found = engine.fetch([item.chunk.key for item in chain])
    for got, item in zip(found, chain, strict=True):
        assert got is None or got == bytes(item.data), f"wrong bytes for {item.chunk.key.hex()}"
    return sum(got is not None for got in found)


@pytest.mark.timeout(60 + 30 * KILLS)
def test_nothing_wrong_is_given_out_however_often_the_daemon_is_killed(daemon: Daemon) -> None:
    seed = int(os.environ.get("KVBM_CHAOS_SEED", random.randrange(1 << 32)))
    logging.getLogger(__name__).warning("KVBM_CHAOS_SEED=%d", seed)
    dice = random.Random(seed)
    chains = [make_items(f"{seed} {number}", CHAIN_CHUNKS, CHUNK) for number in range(CHAINS)]
    fetched = 0
    for _ in range(KILLS):
        daemon.start()
        loads = [Load(daemon, chains, dice.randrange(1 << 32)) for _ in range(2)]
        with ThreadPoolExecutor(len(loads)) as pool:
            running = [pool.submit(load.run) for load in loads]
            assert all(load.began.wait(WAIT_S) for load in loads)
            time.sleep(dice.uniform(0.0, 1.5))
            daemon.process.kill()
            for load in loads:
                load.end()
            for result in running:
                result.result()
        fetched += sum(load.fetched for load in loads)
    daemon.start()
    listed = {tier["tier"]: tier["chunks"] for tier in daemon.tiers()}
    assert listed["G2"] == 0 and listed["G3"] > 0
    with StandIn(daemon.socket, CHUNK) as engine:
        readable = sum(checked(engine, [item]) for chain in chains for item in chain)
    assert readable >= listed["G3"]
    assert fetched > 0, "the load never got anything back"
    assert all(tier["corrupt"] == 0 for tier in daemon.tiers())
