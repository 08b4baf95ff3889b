"""The daemon as its operator runs it: its own process, real SSD files, real NATS and S3."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from kvbm.cli.client import Failure
from kvbm.note import Note
from kvbm.stand_in import StandIn
from runtime.embedded import EmbeddedNats, EmbeddedS3
from runtime.events import EventPlaneSettings, create_event_plane
from runtime.events.blocks import Follower, Stored, blocks_subject, decode_batch
from storage_tiers.base import Key, StoreItem
from storage_tiers.testing import make_items
from tests.waiting import wait_until

CHUNK = 64 << 10
BUCKET = "daemon"
WAIT_S = 60.0

MakeDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with EmbeddedS3(tmp_path_factory.mktemp("s3"), buckets=[BUCKET]) as server:
        yield server


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[MakeDaemon]:
    """Daemons that are not started yet and end with the test."""
    with ExitStack() as running:

        def make(name: str = "node-1", **config: Any) -> Daemon:
            folder = tmp_path / name
            runtime = Path(tempfile.mkdtemp(prefix="kvbm-test-"))
            running.callback(shutil.rmtree, runtime, ignore_errors=True)
            settings = {"dram": "32MiB", "ssd": "256MiB", **config}
            daemon = Daemon(
                DaemonConfig(
                    folder=folder,
                    socket=runtime / "s",
                    logs=folder,
                    records=folder,
                    node=name,
                    **settings,
                )
            )
            running.callback(daemon.process.stop)
            return daemon

        yield make


def s3_section(server: EmbeddedS3, bucket: str = BUCKET, prefix: str = "") -> dict[str, Any]:
    return {
        **server.settings(bucket),
        "prefix": prefix,
        "linger": "50ms",
        "object_bytes": "1MiB",
        "refresh": "500ms",
    }


def keys_of(items: list[StoreItem]) -> list[Key]:
    return [item.chunk.key for item in items]


def bytes_of(items: list[StoreItem]) -> list[bytes | None]:
    return [bytes(item.data) for item in items]


def kept(daemon: Daemon, tier: str, count: int) -> None:
    wait_until(lambda: daemon.kept_chunks()[tier] >= count, WAIT_S, f"{count} chunks in {tier}")


def test_what_an_engine_stores_comes_back_from_every_tier(
    make_daemon: MakeDaemon, s3: EmbeddedS3
) -> None:
    daemon = make_daemon(s3=s3_section(s3, prefix="every"))
    items = make_items("every tier", 40, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        kept(daemon, "G4", len(items))
        assert engine.fetch(keys_of(items)) == bytes_of(items)
        assert daemon.loaded_bytes()["G3"] == daemon.loaded_bytes()["G4"] == 0
    for empty_ssd, tier in ((False, "G3"), (True, "G4")):
        daemon.stop()
        if empty_ssd:
            daemon.empty_ssd()
        daemon.start()
        assert daemon.kept_chunks()["G2"] == 0
        with StandIn(daemon.socket, CHUNK) as engine:
            assert engine.fetch(keys_of(items)) == bytes_of(items)
        assert daemon.loaded_bytes()[tier] == len(items) * CHUNK


def test_stopping_writes_what_still_waits(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(ssd="256MiB")
    items = make_items("waiting", 200, CHUNK)
    daemon.start()
    with StandIn(daemon.socket, CHUNK, lease_chunks=64) as engine:
        engine.store(items)
        wait_until(lambda: daemon.kept_chunks()["G2"] >= len(items), WAIT_S, "the daemon has them")
        daemon.stop()
    assert not daemon.socket.exists()
    daemon.start()
    assert daemon.kept_chunks()["G3"] == len(items)
    with StandIn(daemon.socket, CHUNK) as engine:
        assert engine.fetch(keys_of(items)) == bytes_of(items)


def test_a_killed_daemon_lists_nothing_it_cannot_give(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(ssd="64MiB")
    daemon.start()
    rounds = [make_items(f"round {number}", 200, CHUNK) for number in range(3)]
    for items in rounds:
        with StandIn(daemon.socket, CHUNK, lease_chunks=64) as engine:
            engine.store(items)
            daemon.process.kill()
        daemon.start()  # the stale socket is replaced
        listed = daemon.kept_chunks()["G3"]
        with StandIn(daemon.socket, CHUNK) as engine:
            found = sum(
                got == bytes(item.data)
                for every in rounds
                for item in every
                if (got := engine.fetch([item.chunk.key])[0]) is not None
            )
        assert found == listed
        assert all(tier["corrupt"] == 0 for tier in daemon.tiers())


def test_another_node_reads_what_the_first_left_in_s3(
    make_daemon: MakeDaemon, s3: EmbeddedS3
) -> None:
    first = make_daemon("node-1", s3=s3_section(s3, prefix="shared"))
    second = make_daemon("node-2", s3=s3_section(s3, prefix="shared"), ssd=None)
    items = make_items("shared", 20, CHUNK)
    second.start()
    first.start()
    with StandIn(first.socket, CHUNK) as engine:
        engine.store(items)
        kept(first, "G4", len(items))
    first.process.kill()
    kept(second, "G4", len(items))
    with StandIn(second.socket, CHUNK) as engine:
        assert engine.fetch(keys_of(items)) == bytes_of(items)


def noted(name: str, count: int) -> list[StoreItem]:
    """A sequence whose chunks have notes of two blocks each, every third none."""
    return [
        item
        if place % 3 == 2
        else replace(item, chunk=replace(item.chunk, note=note_of(place).encode()))
        for place, item in enumerate(make_items(name, count, CHUNK))
    ]


def note_of(place: int) -> Note:
    parent = 1000 + place if place else None
    return Note(7, parent, np.array([2 * place, 2 * place + 1], np.uint64))


def notes_known(daemon: Daemon, items: list[StoreItem]) -> list[list[str] | None]:
    """Token hashes of each chunk's blocks, as its node knows them."""
    told = [daemon._get(f"/v1/chunks/{key.hex()}")["note"] for key in keys_of(items)]
    return [note and note["blocks"] for note in told]


def notes_given(items: list[StoreItem]) -> list[list[str] | None]:
    notes = [Note.decode(item.chunk.note) if item.chunk.note else None for item in items]
    return [
        None if note is None else [f"{block:016x}" for block in note.tokens_hashes.tolist()]
        for note in notes
    ]


def test_notes_are_known_after_a_restart_and_on_another_node(
    make_daemon: MakeDaemon, s3: EmbeddedS3
) -> None:
    section = s3_section(s3, prefix="notes")
    # The first tells no router itself; what is on its SSD it knows.
    first = make_daemon("node-1", s3=section | {"note_reads_per_s": 0})
    second = make_daemon("node-2", s3=section, ssd=None, events={"plane": "memory"})
    items, bare = noted("notes", 12), make_items("no notes", 2, CHUNK)
    first.start()
    second.start()
    with StandIn(first.socket, CHUNK) as engine:
        engine.store([*items, *bare])
        kept(first, "G4", len(items) + len(bare))
        assert notes_known(first, items) == notes_given(items)
    kept(second, "G4", len(items) + len(bare))
    told = "the notes of what is in S3 alone are read"
    wait_until(lambda: notes_known(second, items) == notes_given(items), WAIT_S, told)
    assert notes_known(second, bare) == [None] * len(bare)
    g4 = next(tier for tier in second.tiers() if tier["tier"] == "G4")
    assert g4["requests"]["get_notes"] >= 1 and not g4["errors"]
    first.stop()
    first.start()
    assert notes_known(first, items) == notes_given(items)
    with StandIn(first.socket, CHUNK) as engine:
        assert engine.fetch(keys_of(items)) == bytes_of(items)


def why_not_ready(daemon: Daemon) -> str:
    """What it says of G4; empty before it has looked."""
    daemon.process.check()
    try:
        return daemon._admin.readiness().get("G4", "")
    except Failure:
        return ""


def test_s3_that_comes_late_is_opened_then(make_daemon: MakeDaemon, s3: EmbeddedS3) -> None:
    daemon = make_daemon(s3=s3_section(s3, bucket="late"))
    daemon._write_settings()
    daemon.process.start()
    wait_until(lambda: "late" in why_not_ready(daemon), WAIT_S, "S3 is missed")
    items = make_items("before s3", 4, CHUNK)
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        assert engine.fetch(keys_of(items)) == bytes_of(items)
        s3._create("late")
        wait_until(daemon.ready, WAIT_S, "S3 is open")
        more = make_items("with s3", 4, CHUNK)
        engine.store(more)
        kept(daemon, "G4", len(more))


async def test_block_events_on_nats_are_the_truth(
    make_daemon: MakeDaemon, tmp_path: Path, s3: EmbeddedS3
) -> None:
    """Replayed by somebody else, they give exactly what each tier holds, over a restart too."""
    with EmbeddedNats(tmp_path / "nats") as nats:
        events = {
            "plane": "nats",
            "nats_url": nats.url,
            "nats_user": nats.user,
            "nats_password": nats.password,
        }
        plane = create_event_plane(EventPlaneSettings.model_validate(events), "test")
        await plane.start()
        subscription = plane.subscribe(blocks_subject("default", "node-1"))
        await asyncio.wait_for(subscription.active.wait(), WAIT_S)
        believed: dict[str, set[bytes]] = {}

        async def follow() -> None:
            follower = Follower()
            async for message in subscription:
                followed = follower.follow(decode_batch(message.payload))
                assert followed.missed is None
                if followed.restarted:
                    believed.clear()
                for event in followed.events:
                    keys = believed.setdefault(event.tier, set())
                    if isinstance(event, Stored):
                        keys.update(event.keys)
                    else:
                        keys.difference_update(event.keys)

        following = asyncio.create_task(follow())
        daemon = make_daemon(
            dram="16MiB", ssd="64MiB", s3=s3_section(s3, prefix="events"), events=events
        )
        items = make_items("events", 1500, CHUNK, chained=False)  # more than G2 and G3 hold
        await asyncio.to_thread(daemon.start)
        await asyncio.to_thread(_store_and_fetch, daemon, items)
        await _believes_the_truth(daemon, believed)
        await asyncio.to_thread(daemon.stop)
        await asyncio.to_thread(daemon.start)
        await _believes_the_truth(daemon, believed)
        assert believed["G3"] and believed["G4"] and not believed.get("G2")
        following.cancel()
        await plane.close()


def _store_and_fetch(daemon: Daemon, items: list[StoreItem]) -> None:
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        engine.fetch(keys_of(items)[:100])


async def _believes_the_truth(daemon: Daemon, believed: dict[str, set[bytes]]) -> None:
    """Once nothing moves any more."""
    async with asyncio.timeout(WAIT_S):
        last: dict[str, int] = {}
        while True:
            kept_now = await asyncio.to_thread(daemon.kept_chunks)
            if kept_now == last and {t: len(believed.get(t, ())) for t in kept_now} == kept_now:
                return
            last = kept_now
            await asyncio.sleep(0.5)


def test_no_nats_is_no_reason_not_to_serve(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(events={"plane": "nats", "nats_url": "nats://127.0.0.1:1"})
    daemon.start()
    items = make_items("no nats", 4, CHUNK)
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        assert engine.fetch(keys_of(items)) == bytes_of(items)


def run_daemon(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "kvbm-daemon"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KVBM_")}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=60, env=environ, check=False
    )


def test_a_second_daemon_is_told_what_is_taken(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.start()
    elsewhere = ["--set", f"socket={tmp_path / 'other'}", "--set", "admin.port=0"]
    ssd = [f"ssd.path={daemon.ssd_folder}", "ssd.capacity=256MiB"]
    done = run_daemon("serve", *elsewhere, "--set", ssd[0], "--set", ssd[1])
    assert done.returncode == 1
    assert str(daemon.ssd_folder) in done.stderr and "Traceback" not in done.stderr
    done = run_daemon("serve", "--set", f"socket={daemon.socket}", "--set", "admin.port=0")
    assert done.returncode == 1
    assert "another daemon listens" in done.stderr and "Traceback" not in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_daemon("serve", *elsewhere[:2], "--set", f"admin.port={port}")
    assert done.returncode == 1
    assert "admin.port" in done.stderr and "Traceback" not in done.stderr
    assert daemon.ready(), "the first one is not disturbed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "drum.capacity=1GiB"], "did you mean 'dram'"),
        (["--set", "dram.capacity=1KiB"], "dram.capacity"),
        (["--config", "/nonexistent/kvbm.yaml"], "/nonexistent/kvbm.yaml"),
        (["--set", "nonsense"], "nonsense"),
    ],
)
def test_settings_that_cannot_be_used_end_with_status_2(arguments: list[str], said: str) -> None:
    done = run_daemon("serve", *arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_settings_are_checked_without_serving(tmp_path: Path) -> None:
    file = tmp_path / "kvbm.toml"
    file.write_text('[dram]\ncapacity = "2GiB"\n')
    done = run_daemon("check-config", str(file))
    assert done.returncode == 0
    assert f"dram.capacity: from {file}" in done.stdout


def test_sigint_is_a_clean_end_too(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(ssd=None)
    daemon.start()
    os.kill(daemon.process.pid, signal.SIGINT)
    wait_until(lambda: not daemon.process.running, WAIT_S, "it ended")
    assert daemon.process.stop() == 0


def test_short_sequences_of_many_requests_share_objects(
    make_daemon: MakeDaemon, s3: EmbeddedS3
) -> None:
    """Requests to S3 cost money: under load an object has 8 MiB or more, however short prompts."""
    length, sequences = 512 << 10, [4, 9, 2, 7, 12, 1, 5, 8] * 6
    section = {**s3_section(s3, prefix="shared"), "object_bytes": "16MiB", "linger": "1s"}
    daemon = make_daemon(s3=section, dram="384MiB", ssd=None)
    daemon.start()
    with StandIn(daemon.socket, length, lease_chunks=64) as engine:
        for number, count in enumerate(sequences):
            engine.store(make_items(f"short {number}", count, length))
        kept(daemon, "G4", sum(sequences))
        report = next(tier for tier in daemon.tiers() if tier["tier"] == "G4")
    average = report["stored_bytes"] / report["requests"]["put"]
    assert average >= 8 << 20, f"{report['requests']} for {report['stored_bytes']} bytes"
