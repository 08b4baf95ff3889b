"""What systemd is told, over a real datagram socket; and the unit that expects it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import pytest

from kvbm.daemon.unit import Installation, unit_text
from kvbm.engine.settings import EngineSettings
from kvbm.engine.unit import unit_text as engine_unit_text
from runtime.systemd import Notifier, take_inherited

ROOT = Path(__file__).parents[2]


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(60)
        yield sock


def test_each_fact_is_one_datagram(systemd: socket.socket) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": systemd.getsockname()})
    assert notifier.ready("recovered 12 chunks")
    assert notifier.stopping()
    assert systemd.recv(1024) == b"READY=1\nSTATUS=recovered 12 chunks"
    assert systemd.recv(1024) == b"STOPPING=1"


def test_an_abstract_address_is_understood() -> None:
    name = f"kvbm-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        assert Notifier(f"@{name}", None).status("busy")
        assert sock.recv(1024) == b"STATUS=busy"


def test_without_systemd_nothing_happens(tmp_path: Path) -> None:
    assert not Notifier.from_environ({}).ready("x")
    assert not Notifier(str(tmp_path / "absent"), None).ready("x")


async def test_the_watchdog_is_fed_twice_a_period(systemd: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "40000"}
    notifier = Notifier.from_environ(environ)
    assert notifier.watchdog_s == pytest.approx(0.04)
    systemd.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        feeding = group.create_task(notifier.feed_watchdog())
        begin_s = loop.time()
        assert [await loop.sock_recv(systemd, 64) for _ in range(5)] == [b"WATCHDOG=1"] * 5
        assert loop.time() - begin_s > 0.07
        feeding.cancel()


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}])
async def test_without_a_watchdog_there_is_nothing_to_feed(environ: dict[str, str]) -> None:
    await asyncio.wait_for(Notifier.from_environ(environ).feed_watchdog(), 60)


def test_a_watchdog_meant_for_another_process_is_not_ours() -> None:
    environ = {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environ(environ).watchdog_s is None


async def test_descriptors_are_left_by_name_and_systemd_has_dealt_with_them(
    systemd: socket.socket, tmp_path: Path
) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": systemd.getsockname(), "FDSTORE": "4"})
    assert notifier.listens and notifier.store_max == 4
    with (tmp_path / "left").open("w+") as file:
        storing = asyncio.create_task(notifier.store({"one": file.fileno()}))
        said, fds = await asyncio.to_thread(_heard, systemd, 3)
        assert said == ["FDSTOREREMOVE=1\nFDNAME=one", "FDSTORE=1\nFDNAME=one", "BARRIER=1"]
        stored, barrier = fds
        assert os.path.samestat(os.fstat(stored), os.fstat(file.fileno()))
        assert not storing.done(), "it waits for the barrier"
        os.close(barrier)
        assert await storing
        os.close(stored)


async def test_a_systemd_that_does_not_answer_is_not_waited_for(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.systemd.BARRIER_S", 0.05)
    notifier = Notifier(systemd.getsockname(), None)
    assert not await notifier.store({"one": systemd.fileno()})
    assert not await Notifier(None, None).store({"one": systemd.fileno()})


def _heard(systemd: socket.socket, count: int) -> tuple[list[str], list[int]]:
    said: list[str] = []
    fds: list[int] = []
    for _ in range(count):
        data, received, _, _ = socket.recv_fds(systemd, 1024, 4)
        said.append(data.decode())
        fds += received
    return said, fds


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"},
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())},
    ],
)
def test_descriptors_of_another_process_are_not_ours(environ: dict[str, str]) -> None:
    assert take_inherited(environ) == {}


def test_inherited_descriptors_are_taken_by_name() -> None:
    """In a process of its own, whose descriptors from 3 on are known."""
    program = (
        "import os; from runtime.systemd import take_inherited;"
        "os.environ['LISTEN_PID'] = str(os.getpid());"
        "fds = [os.dup(2) for _ in range(5)];"  # 3 to 7, two of them not announced
        "found = take_inherited(os.environ);"
        "print(found, [os.get_inheritable(fd) for fd in found.values()],"
        "[fd for fd in fds if os.path.exists(f'/proc/self/fd/{fd}')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:a"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        close_fds=True,
    )
    assert done.stdout.split("\n")[0] == "{'b': 4, 'a': 5} [False, False] [4, 5, 6, 7]"


HOME = Path("/home") / "ops"
DOCUMENTED = Installation(
    program=Path("/opt/kvbm/bin/kvbm-daemon"),
    config=Path("/etc/kvbm/kvbm.yaml"),
    user="kvbm",
    group="kvbm",
)


def test_the_unit_that_is_deployed_is_the_one_that_is_printed() -> None:
    assert (ROOT / "deploy/kvbm-daemon.service").read_text() == unit_text(DOCUMENTED)


def test_the_template_for_engines_is_the_one_that_is_printed() -> None:
    program, config = Path("/opt/kvbm/bin/kvbm"), Path("/etc/kvbm/kvbm.yaml")
    text = engine_unit_text(program, config, "kvbm", "kvbm")
    assert (ROOT / "deploy/kvbm-engine@.service").read_text() == text
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service, engine = unit["Service"], EngineSettings()
    assert service["ExecStart"].endswith(" engine vllm --config /etc/kvbm/kvbm.yaml -- $VLLM_ARGS")
    assert service["KillMode"] == "mixed", "the launcher drains before the engine is told"
    assert int(service["TimeoutStopSec"]) > engine.drain_timeout + engine.stop_timeout


def test_the_unit_names_what_is_where() -> None:
    text = unit_text(
        Installation(
            program=HOME / "my env/bin/kvbm-daemon",
            config=Path("/srv/100%.yaml"),
            user="vllm",
            group="gpu",
            ssd=Path("/mnt/nvme0/kvbm"),
        )
    )
    lines = text.splitlines()
    assert f'ExecStart="{HOME}/my env/bin/kvbm-daemon" serve --config /srv/100%%.yaml' in lines
    assert {"User=vllm", "Group=gpu", "ReadWritePaths=/mnt/nvme0/kvbm"} <= set(lines)
    assert "ProtectHome=read-only" in lines, "else systemd could not run the program"
    assert "@" not in text.replace("@system-service", "")


@pytest.mark.parametrize("ssd", ["/var/cache/kvbm", "/var/cache/kvbm/deeper"])
def test_the_cache_directory_needs_no_leave(ssd: str) -> None:
    text = unit_text(replace(DOCUMENTED, ssd=Path(ssd)))
    assert "\nReadWritePaths" not in text


def test_the_daemon_prints_its_unit_for_its_settings(tmp_path: Path) -> None:
    config = tmp_path / "kvbm.yaml"
    config.write_text("ssd: {path: /mnt/nvme1, capacity: 1GiB}\n")
    program = Path(sys.executable).parent / "kvbm-daemon"
    done = subprocess.run(
        [program, "print-unit", "--config", config, "--user", "vllm"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    expected = Installation(program.absolute(), config, "vllm", "vllm", Path("/mnt/nvme1"))
    assert done.stdout == unit_text(expected)


def test_the_unit_waits_for_ready_and_keeps_what_the_daemon_needs() -> None:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy/kvbm-daemon.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert int(service["FileDescriptorStoreMax"]) >= 2, "the arena and its index"
    assert service["LimitMEMLOCK"] == "infinity"
    assert service["RuntimeDirectory"] == "kvbm"
    assert "AF_UNIX" in service["RestrictAddressFamilies"]
    assert "PrivateDevices" not in service
    assert "MemoryDenyWriteExecute" not in service
