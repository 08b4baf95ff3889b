"""A daemon as its operator runs it, and what it says of itself when something goes wrong."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from examples.demo.daemon import Daemon, DaemonConfig
from kvbm.stand_in import StandIn
from runtime.embedded import EmbeddedS3
from storage_tiers.base import Key, StoreItem
from tests.plain_http import PLAIN
from tests.waiting import wait_until

CHUNK = 64 << 10
WAIT_S = 60.0
BUCKET = "faults"


class Watched(Daemon):
    """A daemon with its counters and log lines at hand."""

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        text = httpx2.get(f"{self.url}/metrics", timeout=WAIT_S, trust_env=False, verify=PLAIN).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def said(self, event: str, **facts: object) -> list[dict[str, Any]]:
        """Lines of its log with this event and these facts."""
        lines = []
        for text in self.process.log.read_text(errors="replace").splitlines():
            if text.startswith("{"):
                line = json.loads(text)
                if line["event"] == event and facts.items() <= line.items():
                    lines.append(line)
        return lines

    def await_counted(self, name: str, least: float = 1, **labels: str) -> None:
        what = f"{name}{labels} >= {least:g}\n{self.process.tail()}"
        wait_until(lambda: self.counted(name, **labels) >= least, WAIT_S, what)

    def await_kept(self, tier: str, count: int) -> None:
        wait_until(lambda: self.kept_chunks()[tier] >= count, WAIT_S, f"{count} chunks in {tier}")

    def waiting(self) -> int:
        """Chunks in queues to lower tiers."""
        return sum(queue["depth"] for queue in self._get("/v1/tiers")["queues"])

    def restart(self) -> None:
        """A clean end and a new start: host memory is empty then."""
        self.stop()
        self.start()


MakeWatched = Callable[..., Watched]


@contextmanager
def making_daemons(folder: Path) -> Iterator[MakeWatched]:
    """Makes daemons that are not started yet and end with the block."""
    with ExitStack() as running:

        def make(**config: Any) -> Watched:
            inside = folder / "node-1"
            runtime = Path(tempfile.mkdtemp(prefix="kvbm-test-"))
            running.callback(shutil.rmtree, runtime, ignore_errors=True)
            settings = {"dram": "32MiB", "ssd": "64MiB", **config}
            daemon = Watched(
                DaemonConfig(
                    folder=inside,
                    socket=runtime / "s",
                    logs=inside,
                    records=inside,
                    node="node-1",
                    **settings,
                )
            )
            running.callback(daemon.process.stop)
            return daemon

        yield make


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[MakeWatched]:
    with making_daemons(tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with EmbeddedS3(tmp_path_factory.mktemp("s3"), buckets=[BUCKET]) as server:
        yield server


def keys_of(items: Sequence[StoreItem]) -> list[Key]:
    return [item.chunk.key for item in items]


def assert_never_wrong(engine: StandIn, items: Sequence[StoreItem]) -> int:
    """Ask for each chunk by itself: its own bytes or none. How many came."""
    came = 0
    for item in items:
        (got,) = engine.fetch([item.chunk.key])
        assert got is None or got == bytes(item.data), f"wrong bytes for {item.chunk.key.hex()}"
        came += got is not None
    return came
