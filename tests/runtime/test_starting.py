"""A program's first minute: it answers, says what it waits for, and ends when it is told to."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime import program
from runtime.embedded import EmbeddedNats
from runtime.embedded_etcd import EmbeddedEtcd
from runtime.kernels import WHY, compiled
from runtime.server_process import free_ports
from runtime.web.starting import Starting
from tests.plain_http import PLAIN
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
WAIT_S = 240.0


async def test_everything_goes_to_the_application_once_it_is_there() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    page = Starting("waiting for a friend")
    transport = httpx.ASGITransport(page)
    async with httpx.AsyncClient(transport=transport, base_url="http://starting") as http:
        assert (await http.get("/live")).json() == {"status": "alive"}
        refused = await http.post("/v1/route", json={})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["detail"] == "waiting for a friend"
        assert refused.json()["kind"] == "not-ready"
        page.app = application
        assert (await http.get("/live")).status_code == 204


async def test_the_event_loop_turns_while_modules_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_kernels.py").write_text("import time\ntime.sleep(0.5)\n")
    (tmp_path / "broken_kernels.py").write_text("raise ValueError('no such kernel')\n")
    monkeypatch.syspath_prepend(tmp_path)
    turns = 0
    task = asyncio.create_task(compiled(["slow_kernels"]))
    while not task.done():
        turns += 1
        await asyncio.sleep(0.01)
    await task
    assert turns > 5 and "slow_kernels" in sys.modules
    with pytest.raises(ValueError, match="no such kernel"):
        await compiled(["broken_kernels"])


def test_kernels_are_loaded_without_scipy_which_others_may_use_afterwards() -> None:
    code = """
import asyncio, sys
from runtime.kernels import compiled
asyncio.run(compiled(["runtime.xxh3"]))
print("scipy.linalg" in sys.modules)
import scipy.linalg, runtime.hashing
print(scipy.linalg.det([[2.0]]), len(runtime.hashing.block_hashes(range(32), 16)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-2:] == ["False", "2.0 2"]


async def test_a_stop_ends_what_is_waited_for() -> None:
    stop = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0)

    assert await program.unless_stopped(stop, work())
    asyncio.get_running_loop().call_later(0.01, stop.set)
    assert not await program.unless_stopped(stop, asyncio.sleep(WAIT_S))


PROGRAMS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "frontend": ("openai.port", "/live", "/health", {"http.port": 0}),
    "router": ("http.port", "/live", "/ready", {}),
    "kvbm.daemon": ("admin.port", "/healthz", "/readyz", {"events.plane": "nats"}),
}


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("kvbm.daemon", {"boto3", "fastapi", "kvbm.daemon.server", "numba", "uvicorn"}),
        ("router", {"boto3", "numba", "scipy"}),
        ("frontend", {"boto3", "grpc", "huggingface_hub", "numba", "scipy"}),
        ("planner", {"fastapi", "numba", "scipy", "statsmodels"}),
    ],
)
def test_what_only_some_want_is_not_imported_for_all(module: str, others: set[str]) -> None:
    """Where nothing is served yet, or without that part: half of a program's start was that."""
    code = f"import sys, {module}.__main__\nprint(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert not others & set(said.split())


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_first_start_answers_before_its_kernels_are_compiled(tmp_path: Path, module: str) -> None:
    port_setting, live, ready, more = PROGRAMS[module]
    (port,) = free_ports(1)
    given = {port_setting: port, "discovery.file_directory": tmp_path / "found", **more}
    if module == "kvbm.daemon":
        given |= {"dram.capacity": "16MiB", "socket": tmp_path / "s", "node": "n"}
    url = f"http://127.0.0.1:{port}"
    with systemd(tmp_path) as told, child(module, given, tmp_path) as process:
        wait_until(lambda: process.poll() is not None or alive(url + live), WAIT_S, "it is alive")
        assert process.poll() is None, (tmp_path / "log").read_text()
        answer = httpx.get(url + ready, verify=PLAIN)
        assert answer.status_code == 503
        assert WHY in answer.text
        status = told.recv(4096).decode()
        while not status.startswith("STATUS="):  # it feeds the watchdog meanwhile
            status = told.recv(4096).decode()
        assert status == f"STATUS={WHY}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


def test_programs_that_start_before_nats_and_etcd_say_so_and_go_on_once_they_are_there(
    tmp_path: Path,
) -> None:
    nats_port, etcd_port, *ports = free_ports(2 + len(PROGRAMS))
    nats = EmbeddedNats(tmp_path / "nats", port=nats_port)
    with ExitStack() as stack:
        urls = {}
        for (module, (port_setting, _, ready, more)), port in zip(
            PROGRAMS.items(), ports, strict=True
        ):
            folder = tmp_path / module
            folder.mkdir()
            given = {
                **more,
                port_setting: port,
                "discovery.discovery": "etcd",
                "discovery.etcd_url": f"http://127.0.0.1:{etcd_port}",
                "events.plane": "nats",
                "events.nats_url": nats.url,
                "events.nats_user": nats.user,
                "events.nats_password": nats.password,
            }
            if module == "kvbm.daemon":
                given |= {"dram.capacity": "16MiB", "socket": folder / "s", "node": "n"}
            told = stack.enter_context(systemd(folder))
            process = stack.enter_context(child(module, given, folder, kept=True))
            urls[module] = (f"http://127.0.0.1:{port}{ready}", told, process)
        for module, (url, told, process) in urls.items():
            status = ""
            while "; waits for " not in status:
                status = told.recv(4096).decode()
            assert process.poll() is None
            assert "events: [Errno 111] Conn" in status
            if module != "kvbm.daemon":  # which serves its engines without either
                unlisted = f"engines were not listed yet: etcd at http://127.0.0.1:{etcd_port}"
                assert f"discovery: {unlisted}" in status
                answer = httpx.get(url, verify=PLAIN)
                assert answer.status_code == 503
                assert unlisted in answer.text
            assert '"waits_for"' in (tmp_path / module / "log").read_text()
        stack.enter_context(nats)
        stack.enter_context(EmbeddedEtcd(tmp_path / "etcd", port=etcd_port))
        wait_until(lambda: alive(urls["router"][0]), WAIT_S, "the router is ready")
        wait_until(lambda: not_waiting(urls["frontend"][0]), WAIT_S, "only engines are missing")
        for module, (_, _, process) in urls.items():
            log = tmp_path / module / "log"
            has_all = partial(_says, log, "waits_for_nothing")
            wait_until(has_all, WAIT_S, module)
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0


def not_waiting(health: str) -> bool:
    told = httpx.get(health, verify=PLAIN).json()
    return bool(told["status"] == "no engine serves" and not told["waits_for"])


def alive(url: str) -> bool:
    try:
        return httpx.get(url, verify=PLAIN).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def systemd(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(folder / "notify"))
        listening.settimeout(WAIT_S)
        yield listening


@contextmanager
def child(
    module: str, settings: dict[str, Any], folder: Path, *, kept: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """`kept`: with kernels that were compiled before, if they were; else with none."""
    environ = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}
    if not kept:
        environ["NUMBA_CACHE_DIR"] = str(folder / "kernels")
    command = [sys.executable, "-m", module, "serve"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _says(log: Path, what: str) -> bool:
    return what in log.read_text()
