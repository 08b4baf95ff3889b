"""The program as its operators run it, its HTTP API, its pages."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.pools.config import strategies_of
from router.pools.meter import SPECS, global_router_metrics_page
from router.pools.settings import GlobalRouterSettings, config_page
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.instances import Registration
from runtime.lifecycle import Lifecycle, State
from runtime.names import EndpointName, InstanceName
from runtime.server_process import free_ports
from runtime.settings import SettingsError
from tests.plain_http import PLAIN
from tests.router.pools.configs import agg, disagg
from tests.router.service.world import card

ROOT = Path(__file__).parents[3]
WAIT_S = 240.0  # a fresh checkout compiles its kernels first
COMMAND = [sys.executable, "-m", "router.pools"]


def written(folder: Path, config: dict[str, Any]) -> Path:
    file = folder / "global_router_config.json"
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("GLOBAL_ROUTER_CONFIG.md", config_page),
        ("GLOBAL_ROUTER_METRICS.md", global_router_metrics_page),
    ],
)
def test_a_page_is_current(name: str, page: Any) -> None:
    assert (ROOT / "docs" / name).read_text() == page(), "make it again, as its text says"


def test_settings() -> None:
    with pytest.raises(SettingsError, match="config"):
        GlobalRouterSettings.load(environ={})
    environ = {"KVBM_GLOBAL_ROUTER_CONFIG": "a.json", "KVBM_GLOBAL_ROUTER_FEEDBACK__MARGIN": "2s"}
    settings = GlobalRouterSettings.load(environ=environ).value
    assert (settings.http.port, settings.feedback.margin) == (9490, 2.0)
    of_pool = settings.of_pool("p0")
    assert (of_pool.events.namespace, of_pool.component, of_pool.policy) == ("p0", None, "kv")


@pytest.mark.parametrize("key", ["dashboard.planner", "snapshot.path", "component", "busy.status"])
def test_what_only_a_router_of_engines_uses_is_no_setting(key: str) -> None:
    with pytest.raises(SettingsError, match=key.partition(".")[0]):
        GlobalRouterSettings.load(environ={}, overrides={"config": "a.json", key: "503"})


def test_limits_are_those_of_the_pools_routers() -> None:
    limits = {"config": "a.json", "busy.prefill_tokens": 7}
    of_pool = GlobalRouterSettings.load(environ={}, overrides=limits).value.of_pool("p0")
    assert of_pool.busy.limits.prefill_tokens == 7 and of_pool.busy.status == 529


def test_a_configuration_that_cannot_be_used_ends_it(tmp_path: Path) -> None:
    file = written(tmp_path, agg("a") | {"num_pools": 1})
    given = ["serve", "--set", f"config={file}"]
    done = subprocess.run([*COMMAND, *given], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "num_pools (from" in done.stderr
    assert "accepted here: mode, " in done.stderr


def test_it_is_no_pool_of_its_own(tmp_path: Path) -> None:
    settings = GlobalRouterSettings(config=written(tmp_path, agg("a", "default")))
    with pytest.raises(SettingsError, match="'default' is the global router's own namespace"):
        strategies_of(settings)


async def test_it_serves_tells_and_ends(tmp_path: Path) -> None:
    found = DiscoverySettings(file_directory=tmp_path / "found", file_poll=0.05)
    discovery = create_discovery(found, {})
    await discovery.start()
    name = InstanceName(EndpointName("p0", "backend", "generate"), 1)
    record = Registration(discovery, name, Lifecycle(), "tcp://nowhere:1", card().labels())
    await record.register()
    await record.move(State.RUNNING)
    [port] = free_ports(1)
    given = {
        "config": written(tmp_path, disagg(["p0", "p1"], ["p0"])),
        "http.port": port,
        "index.capacity": 10_000,
        "discovery.file_directory": tmp_path / "found",
    }
    log = tmp_path / "log"
    process = started(given, log)
    base = f"http://127.0.0.1:{port}"
    try:
        async with httpx2.AsyncClient(base_url=base, timeout=30.0, verify=PLAIN) as client:
            await _ready(client, process, log.read_text)
            await _answers(client)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, WAIT_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait(WAIT_S)
        await discovery.close()


def started(given: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    command = [*COMMAND, "serve"]
    for key, value in given.items():
        command += ["--set", f"{key}={value}"]
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=ROOT, stderr=output, stdout=output)


async def _ready(
    client: httpx2.AsyncClient, process: subprocess.Popen[bytes], said: Callable[[], str]
) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            assert process.poll() is None, said()
            try:
                if (await client.get("/ready")).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.05)


async def _answers(client: httpx2.AsyncClient) -> None:
    async def post(**body: Any) -> httpx2.Response:
        return await client.post("/v1/route/explain", json=body)

    told = (await post(tokens=list(range(2000)), ttft_target_ms=100)).json()
    assert told["prefill"]["grid"]["pool"] == "p1"
    assert (told["prefill"]["pool"], told["prefill"]["reason"]) == ("p0", "away")
    assert told["prefill"]["why"] == "no engine of 'm' serves in p1"
    [here, gone] = told["prefill"]["pools"]
    assert here["first_token_s"] > 0.0 and gone["away"]
    assert told["decode"]["reason"] == "grid"
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"tokens": [1], "model": "other"}, 404, "known: m"),
        ({"tokens": [-1]}, 400, "no token"),
        ({"tokens": [1], "ttft_target_ms": -3}, 400, "$.ttft_target_ms"),
        ({"tokens": [1], "targets": 3}, 400, "targets"),
    ]
    for body, status, says in wrong:
        answer = await post(**body)
        assert answer.status_code == status and says in answer.json()["detail"], answer.text
    pools = (await client.get("/v1/pools")).json()
    assert [pool["engines"] for pool in pools["roles"][0]["pools"]] == [{"m": 1}, {"m": 0}]
    assert (await client.get("/v1/decisions")).json() == {"kept": 0, "decisions": []}
    text = (await client.get("/metrics")).text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert names == {spec.name.removesuffix("_total") for spec in SPECS}
