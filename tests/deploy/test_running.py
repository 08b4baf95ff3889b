"""The programs, started as the chart starts them: what it and units wait for is there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import yaml

from runtime.server_process import free_ports
from tests.deploy.chart import EVERYTHING, named, rendered
from tests.plain_http import PLAIN

WAIT_S: Final = 120
FIRST_START_S: Final = 500  # kernels are compiled, on a machine with other work
TOKEN: Final = "0123456789"
NODE: Final = "ip-10-1-2-3.ec2.internal"


@pytest.mark.parametrize("part", ["router", "frontend"])
def test_a_program_says_when_it_is_ready_and_answers_what_is_asked(
    part: str, tmp_path: Path
) -> None:
    container, url = _container("Deployment", part, tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(WAIT_S)
        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with _running(container["command"], told) as process:
            said = _heard(systemd, until="READY=1")
            assert any(line.startswith("STATUS=listening on http://") for line in said)
            assert _heard(systemd, until="WATCHDOG=1")
            _ask_probes(container, url)
            process.send_signal(signal.SIGTERM)
            assert _heard(systemd, until="STOPPING=1")
            assert process.wait(WAIT_S) == 0


def test_the_daemon_has_the_node_s_name_drains_and_restarts_in_its_container(
    tmp_path: Path,
) -> None:
    container, url = _container("DaemonSet", "daemon", tmp_path)
    with _running([*container["command"], *container["args"]], {"NODE_NAME": NODE}) as process:
        _wait_ready(url)
        assert (
            httpx2.get(f"{url}/version", verify=PLAIN).json()["node"] == "ip-10-1-2-3-ec2-internal"
        )
        _ask_probes(container, url)
        first = _process(url)
        process.send_signal(signal.SIGHUP)
        _wait_ready(url, but_not=first["pid"])
        assert _process(url)["pid"] != process.pid, "it runs below the holder"
        told = {"KVBM_ADMIN_URL": url, "KVBM_ADMIN_TOKEN": TOKEN}
        with _running(container["lifecycle"]["preStop"]["exec"]["command"], told) as drain:
            assert drain.wait(WAIT_S) == 0
        assert httpx2.get(f"{url}/readyz", verify=PLAIN).status_code == 503, "drained"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


def _container(kind: str, part: str, folder: Path) -> tuple[dict[str, Any], str]:
    """As the chart has it, but nothing of a cluster in its settings; and where it then answers."""
    manifests = rendered(EVERYTHING)
    workload = named(manifests, kind, f"kv-kvbm-{part}")
    container: dict[str, Any] = workload["spec"]["template"]["spec"]["containers"][0]
    (text,) = named(manifests, "ConfigMap", f"kv-kvbm-{part}")["data"].values()
    settings = yaml.safe_load(text)
    (port,) = free_ports(1)
    web = "admin" if part == "daemon" else "http"
    settings[web] = {**settings[web], "host": "127.0.0.1", "port": port, "token": TOKEN}
    settings["discovery"] = {"file_directory": str(folder / "discovery")}
    settings["events"] = {"plane": "none"}
    settings["requests"] = {}
    if part == "frontend":
        settings["openai"] = {"port": 0, "drain": settings["openai"]["drain"]}
    if part == "daemon":
        settings["socket"] = str(folder / "kvbm.sock")
        settings["dram"] |= {"capacity": "64MiB", "huge_pages": False}
        settings["ssd"] = {"path": str(folder / "ssd"), "capacity": "128MiB"}
        settings["peers"] = None
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    for key in ("command", "args"):
        container = {**container, key: [_here(word, folder) for word in container.get(key, [])]}
    return container, f"http://127.0.0.1:{port}"


def _here(word: str, folder: Path) -> str:
    for name in ("kvbm", "router", "frontend"):
        word = word.replace(f"/etc/kvbm/{name}.yaml", str(folder / "settings.yaml"))
    return word


def _ask_probes(container: dict[str, Any], url: str) -> None:
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        answer = httpx2.get(f"{url}{container[probe]['httpGet']['path']}", timeout=30, verify=PLAIN)
        assert answer.status_code == 200, answer.text
    assert httpx2.get(f"{url}/metrics", timeout=30, verify=PLAIN).status_code == 200


def _process(url: str) -> dict[str, Any]:
    answer = httpx2.get(
        f"{url}/v1/node", headers={"Authorization": f"Bearer {TOKEN}"}, verify=PLAIN
    )
    found: dict[str, Any] = answer.json()["process"]
    return found


def _wait_ready(url: str, but_not: int | None = None) -> None:
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        try:
            if (
                httpx2.get(f"{url}/readyz", verify=PLAIN).status_code == 200
                and _process(url)["pid"] != but_not
            ):
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.05)
    pytest.fail(f"{url} was not ready within {WAIT_S} s")


@contextmanager
def _running(command: list[str], more: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": programs, **more}
    process = subprocess.Popen(
        command, env=environ, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # ended, and all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(WAIT_S)


def _heard(systemd: socket.socket, until: str) -> list[str]:
    """The lines of the datagram that has this one."""
    end_s = time.monotonic() + FIRST_START_S
    while time.monotonic() < end_s:
        lines = systemd.recv(1024).decode().splitlines()
        if until in lines:
            return lines
    pytest.fail(f"{until} was not said within {FIRST_START_S} s")
