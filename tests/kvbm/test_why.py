"""`kvbm why` over a real daemon process: a slow SSD, evictions, chunks that were never there."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from examples.demo.process import Process
from kvbm.cli import __main__ as cli
from kvbm.protocol import Pace
from kvbm.stand_in import StandIn
from storage_tiers.base import StoreItem
from storage_tiers.testing import make_items
from tests.waiting import wait_until

CHUNK = 64 << 10
COUNT = 8
WAIT_S = 60.0
PACE = Pace(token_s=1e-3)
"""A chunk takes 32 ms to compute; at 128 KiB/s it takes 500 ms to bring up."""


@dataclass
class Slow:
    """A daemon whose SSD is slow while `file` is there."""

    daemon: Daemon
    file: Path

    def be_slow(self) -> None:
        self.file.write_text(str(128 << 10))

    def be_fast(self) -> None:
        self.file.unlink()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    with tempfile.TemporaryDirectory(prefix="kvbm-test-") as runtime:
        folder = tmp_path / "node"
        config = DaemonConfig(folder, Path(runtime) / "s", folder, folder, ssd="256MiB")
        daemon = Daemon(replace(config, dram="16MiB", governor="auto"))
        file = tmp_path / "slow"
        command = (sys.executable, "-m", "tests.kvbm.slow_daemon", str(file))
        daemon.process = Process(
            "kvbm-daemon",
            [*command, "serve", "--config", str(folder / "kvbm.yaml")],
            log=folder / "kvbm-daemon.log",
            record=folder / "kvbm-daemon.pid",
        )
        yield Slow(daemon, file)
        daemon.process.stop()


def receipt(daemon: Daemon, request: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = daemon._get(f"/v1/receipts/{request}")["receipts"]
    return found[0]


def kvbm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["kvbm", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return f"{err}status {ended.value.code}" if ended.value.code else out


def store_and_restart(daemon: Daemon, *sequences: list[StoreItem]) -> None:
    """These are on the SSD only."""
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        for items in sequences:
            engine.store(items)
        count = sum(map(len, sequences))
        wait_until(lambda: daemon.kept_chunks()["G3"] >= count, WAIT_S, "all are on the SSD")
    daemon.stop()
    daemon.start()


def test_a_slow_ssd_is_passed_over_explained_and_used_again(
    slow: Slow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = slow.daemon
    sequences = [make_items(f"sequence {number}", COUNT, CHUNK) for number in range(40)]
    store_and_restart(daemon, *sequences)
    keys = [[item.chunk.key for item in items] for items in sequences]
    whole = [[bytes(item.data) for item in items] for items in sequences]
    slow.be_slow()
    with StandIn(daemon.socket, CHUNK) as engine:
        assert engine.fetch(keys[0], "cmpl-first-0-abc", PACE) == whole[0]
        assert engine.fetch(keys[1], "cmpl-second-0-def", PACE) == [None] * COUNT
        told = receipt(daemon, "cmpl-second")
        assert told["groups"][0]["skipped"] == {"G3": COUNT}
        verdict = told["verdict"]
        assert (verdict["usable_tokens"], verdict["tokens"]) == (COUNT * 32, 0)
        assert verdict["everything"]["load_s"] > 4 * verdict["compute_all_s"]
        assert verdict["tiers"][0]["bytes_per_s"] < 256 << 10
        page = kvbm(capsys, monkeypatch, "why", "cmpl-second", "--url", daemon.url)
        assert "So nothing is loaded, and the other 256 computed, because that is sooner" in page
        assert f"{COUNT} are in the SSD, but sooner computed than loaded" in page
        assert "512 KiB from the SSD at " in page
        slow.be_fast()
        skipped, asked = iter(range(2, len(keys))), itertools.count()
        now_at = next(skipped)

        def is_used_again() -> bool:
            """Probes find out; what they brought up is in host memory then, so ask for others."""
            nonlocal now_at
            request = f"again-{next(asked)}"
            if engine.fetch(keys[now_at], request, PACE) != whole[now_at]:
                return False
            now_at = next(skipped)
            return bool(receipt(daemon, request)["landed"] == {"G3": COUNT})

        wait_until(is_used_again, WAIT_S, "the SSD is measured and used again")


def test_each_miss_has_its_reason(
    slow: Slow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host memory holds 16 MiB of 20: the rest was evicted, by whatever policy; two never came."""
    slow.daemon = daemon = Daemon(replace(slow.daemon._config, ssd=None))
    daemon.start()
    try:
        items = make_items("stored", 320, CHUNK, chained=False)
        keys = [item.chunk.key for item in items]
        with StandIn(daemon.socket, CHUNK) as engine:
            engine.store(items)
            kept = next(key for key in keys[::-1] if engine.fetch([key])[0] is not None)
            evicted = len(keys) - daemon.kept_chunks()["G2"]
            never = [item.chunk.key for item in make_items("never", 2, CHUNK)]
            others = [key for key in keys if key != kept]
            engine.fetch([kept, *never, *others], "chatcmpl-mixed-1")
            engine.fetch([kept], "chatcmpl-mixed-2")
        [group] = receipt(daemon, "chatcmpl-mixed-1")["groups"]
        assert evicted >= 320 - 256
        assert (group["here"], group["first_missing"]) == (1, 1)
        assert group["missing"] == evicted + 2
        assert group["behind_gap"] == len(others) - evicted
        [removed] = group["removed"]
        assert (removed["tier"], removed["chunks"]) == ("G2", evicted)
        assert removed["reason"] == "capacity"
        url = ("--url", daemon.url)
        page = kvbm(capsys, monkeypatch, "why", "mixed-1", *url)
        assert f"{evicted} were evicted from host memory to make room" in page
        assert "2 were never stored here, as far as is remembered" in page
        assert f"{len(others) - evicted} are kept, but of no use behind one that is not" in page
        assert "the first of them chunk 1" in page
        page = kvbm(capsys, monkeypatch, "why", "mixed", *url)
        assert "names 2 requests: chatcmpl-mixed-2, chatcmpl-mixed-1" in page
        assert "status 1" in kvbm(capsys, monkeypatch, "why", "unheard-of", *url)
        latest = kvbm(capsys, monkeypatch, "why", *url)
        assert latest.index("chatcmpl-mixed-2") < latest.index("chatcmpl-mixed-1")
        assert "evicted" in latest and "loaded" in latest
    finally:
        daemon.process.stop()
