"""Host memory over a restart: real processes, the holder in systemd's place, no SSD."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from examples.demo.process import Process, ProcessError
from kvbm.note import Note
from kvbm.protocol import Fence, FromDaemon
from kvbm.stand_in import StandIn
from storage_tiers.arena import Slot
from storage_tiers.base import Key, StoreItem
from storage_tiers.testing import make_items
from tests.plain_http import PLAIN
from tests.waiting import wait_until

CHUNK = 64 << 10
WAIT_S = 60.0
PROGRAM = str(Path(sys.executable).parent / "kvbm-daemon")


class Held(Daemon):
    """A daemon of host memory alone, under the holder."""

    def __init__(self, config: DaemonConfig) -> None:
        super().__init__(config)
        self.meddle = config.folder / "meddle"
        meddler = [sys.executable, "-m", "tests.kvbm.meddler", str(self.meddle)]
        serve = [PROGRAM, "serve", "--config", str(config.folder / "kvbm.yaml")]
        self.process = Process(
            "holder", [PROGRAM, "hold", "--", *meddler, *serve], log=config.logs / "holder.log"
        )

    @property
    def pid(self) -> int:
        """The daemon's own, not the holder's."""
        pid: int = self._get("/v1/node")["process"]["pid"]
        return pid

    def handover(self) -> dict[str, Any]:
        """Once everything that was inherited has been looked at."""
        found: list[dict[str, Any]] = []

        def looked() -> bool:
            found.append(self._get("/v1/node")["handover"])
            return not found[-1]["waiting_chunks"] and (
                found[-1]["seconds"] > 0 or not found[-1]["adopted_chunks"]
            )

        wait_until(looked, WAIT_S, "what was inherited is checked")
        return found[-1]

    def next(self, number: int = signal.SIGHUP, *, to_daemon: bool = False) -> dict[str, Any]:
        """End this daemon with a signal, and wait for the one after it."""
        before = self.pid
        os.kill(before if to_daemon else self.process.pid, number)
        wait_until(lambda: self._is_another(before), WAIT_S, "the next one is ready")
        return self.handover()

    def _is_another(self, before: int) -> bool:
        try:
            return self.ready() and self.pid != before
        except ProcessError:  # it ended between the two questions
            return False

    def change(self, **config: Any) -> None:
        """Other settings for the next one."""
        self._config = replace(self._config, **config)
        self._write_settings()

    def said(self, event: str) -> list[dict[str, Any]]:
        """What it logged under this name, oldest first."""
        lines = [line for line in self.process.log.read_text().splitlines() if line[:1] == "{"]
        return [told for line in lines if (told := json.loads(line))["event"] == event]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Held]:
    with ExitStack() as cleanup:
        runtime = Path(tempfile.mkdtemp(prefix="kvbm-test-"))
        cleanup.callback(shutil.rmtree, runtime, ignore_errors=True)
        folder = tmp_path / "daemon"
        held = Held(
            DaemonConfig(
                folder=folder,
                socket=runtime / "s",
                logs=folder,
                records=folder,
                ssd=None,
                dram="32MiB",
                events={"plane": "memory"},  # without, and without S3, it keeps no notes
            )
        )
        cleanup.callback(held.process.stop)
        held.start()
        yield held


ITEMS = make_items("handed over", 40, CHUNK)
KEYS = [item.chunk.key for item in ITEMS]


def with_notes(items: list[StoreItem]) -> list[StoreItem]:
    """The same, each chunk with a note but the second."""
    return [
        item
        if place == 1
        else replace(
            item, chunk=replace(item.chunk, note=Note(7, None, np.array([place], "u8")).encode())
        )
        for place, item in enumerate(items)
    ]


BYTES: list[bytes | None] = [bytes(item.data) for item in ITEMS]


def store(daemon: Daemon, items: list[StoreItem] = ITEMS) -> None:
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        keys = [item.chunk.key for item in items]
        assert engine.fetch(keys) == [bytes(item.data) for item in items]


def fetch(daemon: Daemon, keys: list[Key]) -> list[bytes | None]:
    with StandIn(daemon.socket, CHUNK) as engine:
        return engine.fetch(keys)


@pytest.mark.parametrize(
    "restart",
    [lambda d: d.next(), lambda d: d.next(signal.SIGTERM, to_daemon=True)],
    ids=["SIGHUP to the holder", "the daemon ends"],
)
def test_what_host_memory_holds_outlives_the_daemon(
    daemon: Held, restart: Callable[[Held], dict[str, Any]]
) -> None:
    store(daemon, with_notes(ITEMS))
    for _ in range(2):
        found = restart(daemon)
        told = [daemon._get(f"/v1/chunks/{key.hex()}")["note"] for key in KEYS[:3]]
        assert [note and note["blocks"] for note in told] == [[f"{0:016x}"], None, [f"{2:016x}"]]
        assert (found["adopted_chunks"], found["dropped"]) == (len(ITEMS), {})
        assert found["adopted_bytes"] == len(ITEMS) * CHUNK
        assert fetch(daemon, KEYS) == BYTES
    assert daemon.kept_chunks() == {"G2": len(ITEMS)}
    assert daemon.leased_bytes() == 0


def test_an_engine_that_stays_finds_its_chunks_again_on_a_node_not_drained_any_more(
    daemon: Held,
) -> None:
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(ITEMS[:20])
        assert engine.fetch(KEYS[:20]) == BYTES[:20]
        httpx2.post(
            f"{daemon.url}/v1/drain", timeout=10.0, trust_env=False, verify=PLAIN
        ).raise_for_status()
        assert not daemon.ready()
        assert daemon.next()["adopted_chunks"] == 20
        engine.wait(lambda: engine.client.ready, "it is connected again")
        engine.store(ITEMS[20:])
        assert engine.fetch(KEYS) == BYTES


def test_bytes_that_changed_between_two_daemons_are_never_given_out(daemon: Held) -> None:
    items = make_items("unrelated", 12, CHUNK, chained=False)
    keys = [item.chunk.key for item in items]
    store(daemon, items)
    damaged = {keys[0], keys[7]}
    daemon.meddle.write_text(" ".join(["flip", *(key.hex() for key in damaged)]))
    found = daemon.next()
    assert (found["adopted_chunks"], found["dropped"]) == (10, {"corrupt": 2})
    for item in items:
        expected = None if item.chunk.key in damaged else bytes(item.data)
        assert fetch(daemon, [item.chunk.key]) == [expected]
    listed = {entry["key"] for entry in daemon._get("/v1/quarantine")["entries"]}
    assert listed == {key.hex() for key in damaged}
    assert {told["key"] for told in daemon.said("host_memory_damaged")} == listed


@pytest.mark.parametrize(
    ("action", "reason"), [("garble", "does not match its checksum"), ("cut", "checksum")]
)
def test_a_snapshot_that_cannot_be_believed_is_not(daemon: Held, action: str, reason: str) -> None:
    store(daemon)
    daemon.meddle.write_text(action)
    found = daemon.next()
    assert found["adopted_chunks"] == 0
    assert fetch(daemon, KEYS) == [None] * len(KEYS)
    (told,) = daemon.said("memory_not_adopted")
    assert reason in told["reason"]


def test_a_killed_daemon_leaves_nothing_nor_does_an_older_one_through_it(daemon: Held) -> None:
    store(daemon)
    assert daemon.next(signal.SIGKILL, to_daemon=True)["adopted_chunks"] == 0
    assert fetch(daemon, KEYS) == [None] * len(KEYS)
    store(daemon)
    assert daemon.next()["adopted_chunks"] == len(ITEMS)
    assert daemon.next(signal.SIGKILL, to_daemon=True)["adopted_chunks"] == 0
    assert fetch(daemon, KEYS) == [None] * len(KEYS)
    assert not daemon.said("memory_not_adopted"), "there was nothing to refuse"


def test_another_capacity_starts_empty_and_says_so(daemon: Held) -> None:
    store(daemon)
    daemon.change(dram="48MiB")
    assert daemon.next()["adopted_chunks"] == 0
    (told,) = daemon.said("memory_not_adopted")
    assert "dram.capacity was 32MiB and is 48MiB" in told["reason"]
    store(daemon)
    assert daemon.next()["adopted_chunks"] == len(ITEMS), "and is handed over from then on"


class Hanging(StandIn):
    """An engine whose worker does not answer a fence."""

    def received(self, message: FromDaemon) -> None:
        if not isinstance(message, Fence):
            super().received(message)


def test_slots_of_an_engine_that_hangs_are_kept_aside_for_good(daemon: Held) -> None:
    store(daemon)
    with Hanging(daemon.socket, CHUNK, lease_chunks=8) as engine:
        taken: list[Slot] = []

        def took() -> bool:
            taken.extend(engine.client.take_slots(0, 4))
            return len(taken) >= 4

        engine.wait(took, "slots are leased")
        old = engine._arena
        assert old is not None
        first = daemon.next()
    again = daemon.next()  # by now it has hung up, but who knows
    assert again["adopted_chunks"] == len(ITEMS)
    assert again["aside_bytes"] == first["aside_bytes"] >= len(taken) * CHUNK
    assert fetch(daemon, KEYS) == BYTES
    many = make_items("fill the rest", 600, CHUNK, chained=False)  # more than it holds
    before = {slot.offset: old.generation(slot.offset) for slot in taken}
    with StandIn(daemon.socket, CHUNK) as another:
        another.store(many)
    assert daemon._get("/v1/tiers")["tiers"][0]["evictions"]["capacity"] > 0
    for slot in taken:
        assert old.generation(slot.offset) == before[slot.offset] > slot.generation


# -- the holder ---------------------------------------------------------------------------


def hold(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "hold", "--", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_settings_that_cannot_be_used_end_the_holder() -> None:
    done = hold(PROGRAM, "serve", "--set", "drum.capacity=1GiB")
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'dram'") == 1


def test_a_command_that_is_not_there_ends_the_holder() -> None:
    done = hold("/nonexistent/kvbm-daemon")
    assert done.returncode == 2
    assert "cannot run /nonexistent/kvbm-daemon" in done.stderr


def test_ending_the_holder_ends_the_daemon_cleanly(daemon: Held) -> None:
    pid = daemon.pid
    assert daemon.process.stop() == 0
    assert not Path(f"/proc/{pid}").exists()
    assert not daemon.socket.exists()
