"""The programs themselves, as units and chart start them: what these wait for and ask is there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx2
import pytest
import yaml

from runtime.server_process import free_ports
from tests.deploy.chart import EVERYTHING, named, rendered

WAIT_S: Final = 120
# Program -> kind and name of its workload, and what of its settings is other outside of a cluster.
PROGRAMS: Final = {
    "kvbm-daemon": ("DaemonSet", "daemon", {"dram": {"capacity": "64MiB"}, "peers": None}),
    "kvbm-router": ("Deployment", "router", {}),
    "kvbm-frontend": ("Deployment", "frontend", {}),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_what_is_waited_for_and_answers_what_is_asked(
    program: str, tmp_path: Path
) -> None:
    kind, part, other = PROGRAMS[program]
    workload = named(rendered(EVERYTHING), kind, f"kv-kvbm-{part}")
    container = workload["spec"]["template"]["spec"]["containers"][0]
    text = named(rendered(EVERYTHING), "ConfigMap", f"kv-kvbm-{part}")["data"]
    settings, url = _here(yaml.safe_load(next(iter(text.values()))), other, tmp_path)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(WAIT_S)
        with _serving(program, tmp_path) as process:
            said = _heard(systemd, until="READY=1")
            assert any(line.startswith("STATUS=listening on ") for line in said)
            assert _heard(systemd, until="WATCHDOG=1")
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                answer = httpx2.get(f"{url}{container[probe]['httpGet']['path']}", timeout=30)
                assert answer.status_code == 200, answer.text
            assert httpx2.get(f"{url}/metrics", timeout=30).status_code == 200
            if program == "kvbm-daemon":
                _drain(container["lifecycle"]["preStop"]["exec"]["command"], url)
            process.send_signal(signal.SIGTERM)
            assert _heard(systemd, until="STOPPING=1")
            assert process.wait(WAIT_S) == 0


def _here(
    settings: dict[str, dict[str, object]], other: dict[str, object], folder: Path
) -> tuple[dict[str, object], str]:
    """The chart's settings with nothing of a cluster; and where the program's API is then."""
    (port,) = free_ports(1)
    web = "admin" if "admin" in settings else "http"
    found: dict[str, object] = {
        **settings,
        **other,
        web: {**settings[web], "host": "127.0.0.1", "port": port, "token": "0123456789"},
        "discovery": {"file_directory": str(folder / "discovery")},
        "events": {"plane": "none"},
        "requests": {},
    }
    if "openai" in found:
        found["openai"] = {"port": 0, "drain": settings["openai"]["drain"]}
    if "socket" in found:
        found["socket"] = str(folder / "kvbm.sock")
        found["ssd"] = {"path": str(folder / "ssd"), "capacity": "128MiB"}
    return found, f"http://127.0.0.1:{port}"


def _drain(command: list[str], url: str) -> None:
    """As the pod does before it ends."""
    environ = {**os.environ, "KVBM_ADMIN_URL": url, "KVBM_ADMIN_TOKEN": "0123456789"}
    kvbm = Path(sys.executable).parent / command[0]
    subprocess.run([kvbm, *command[1:]], env=environ, check=True, timeout=WAIT_S)


@contextmanager
def _serving(program: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = {
        **os.environ,
        "NOTIFY_SOCKET": str(folder / "notify"),
        "WATCHDOG_USEC": "200000",
    }
    command = [Path(sys.executable).parent / program, "serve", "--config"]
    process = subprocess.Popen(
        [*command, folder / "settings.yaml"], env=environ, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)


def _heard(systemd: socket.socket, until: str) -> list[str]:
    """The lines of the datagram that has this one, within the socket's timeout."""
    while True:
        lines = systemd.recv(1024).decode().splitlines()
        if until in lines:
            return lines
