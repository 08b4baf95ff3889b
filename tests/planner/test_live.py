"""The planner as it runs: over real engines' and a frontend's metrics, over HTTP, as a process."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from planner.app import create_app
from planner.assembly import running
from planner.loop import Loop
from planner.metrics import SPECS, planner_metrics_page
from planner.observe import EngineLoad
from planner.settings import PlannerSettings, config_page
from runtime.settings import SettingsError
from runtime.web.server import WebServer
from tests.frontend.engines import MODEL, frontend
from tests.plain_http import PLAIN
from tests.runtime.engines.scripted import Asked, Wire
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
WAIT_S = 240.0  # a fresh checkout compiles its kernels first
MOCKER = f"{sys.executable} -m mocker serve --set port={{port}} --set node=n{{port}} --set drain=20"


def planner_settings(folder: Path, **given: Any) -> PlannerSettings:
    fields = {
        "actuator": "processes",
        "discovery": {"file_directory": str(folder / "found"), "file_poll": 0.05},
        "processes": {
            "command": MOCKER,
            "log_directory": str(folder / "logs"),
            "environment": {
                "KVBM_MOCK_DISCOVERY__FILE_DIRECTORY": str(folder / "found"),
                "KVBM_MOCK_DISCOVERY__FILE_POLL": "50ms",
                "KVBM_MOCK_EVENTS__PLANE": "zmq",
                "PYTHONPATH": str(ROOT),
            },
        },
        "scaling": {
            "load_adjustment_interval": 0.2,
            "scale_down_delay": 0.0,
            "start_delay": 1.0,
            "manual_hold": 0.0,
        },
        **given,
    }
    return PlannerSettings.model_validate(fields)


async def quick(wire: Wire, asked: Asked) -> None:
    wire.whole(b'{"object":"text_completion"}')


async def until(true: Any, what: str) -> None:
    end_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end_s, what
        await asyncio.sleep(0.1)


def engines(loop: Loop) -> Sequence[EngineLoad]:
    step = loop.latest
    assert step is not None
    return step.plan.observation.engines


def phases(loop: Loop, phase: str) -> int:
    return sum(e.phase == phase for e in engines(loop))


async def stream(client: httpx2.AsyncClient, url: str) -> int:
    """An answer that takes a while; how many events came of it."""
    body = {"model": "mock", "prompt": "x " * 64, "max_tokens": 300, "stream": True}
    events = 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            events += line.startswith("data: {")
    return events


async def test_real_engines_are_started_read_drained_and_ended(tmp_path: Path) -> None:
    """Processes of the mock engine, up to two and down to one while an answer is under way, and
    the load as a real frontend tells it."""
    async with frontend(quick) as front:
        settings = planner_settings(tmp_path, observe={"frontends": [front.url], "timeout": 20.0})
        async with (
            running(settings, {}) as loop,
            httpx2.AsyncClient(timeout=WAIT_S, verify=PLAIN) as client,
        ):
            scaling = settings.scaling

            async def ticks(least: int) -> None:
                """The bounds are what makes the size certain here."""
                bounds = scaling.model_copy(update={"min_endpoint": least, "max_endpoint": least})
                planner = loop._planner
                planner._settings = planner._settings.model_copy(update={"scaling": bounds})
                step = await loop.tick()
                assert step.applied.accepted, step.applied

            async def ticks_until(least: int, true: Any, what: str) -> None:
                end_s = time.monotonic() + WAIT_S
                while True:
                    await ticks(least)
                    if true():
                        return
                    assert time.monotonic() < end_s, what
                    await asyncio.sleep(0.2)

            await until(lambda: loop.readiness()["discovery"] is None, "discovery is listed")
            await ticks_until(2, lambda: phases(loop, "serving") == 2, "two engines serve")
            step = loop.latest
            assert step is not None
            assert not step.plan.observation.problems
            body = {"model": MODEL, "prompt": "x"}
            for _ in range(10):
                answer = await client.post(f"{front.url}/v1/completions", json=body)
                assert answer.status_code == 200
            await ticks(2)
            step = loop.latest
            assert step is not None
            assert step.plan.observation.traffic is not None
            assert step.plan.observation.traffic.requests == 10
            urls = [m.labels["url"] for m in loop._fleet._instances.known.values()]
            answers = [asyncio.create_task(stream(client, url)) for url in urls]
            await ticks_until(2, lambda: any(e.running for e in engines(loop)), "it is at work")
            await ticks_until(
                1, lambda: phases(loop, "serving") == 1, "one engine is on its way out"
            )
            assert [await one for one in answers] == [300, 300]
            pids = [e.process for e in loop.actuator._engines]  # type: ignore[attr-defined]
            await ticks_until(1, lambda: sum(p.poll() is None for p in pids) == 1, "it has ended")
            assert loop.actuator.deaths_total == 0  # type: ignore[attr-defined]
            survivor = next(p for p in pids if p.poll() is None)
            survivor.kill()
            survivor.wait()
            await ticks(1)
            assert loop.actuator.deaths_total == 1  # type: ignore[attr-defined]
        assert all(p.poll() is not None for p in pids)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Loop, str]]:
    settings = planner_settings(tmp_path, actuator="dry-run")
    async with running(settings, {}) as loop:
        server = WebServer(create_app(loop, "1.2.3", "a-token"), "127.0.0.1", 0, section="http")
        await server.start()
        yield loop, server.url
        await server.stop()


async def test_the_api_tells_the_plan_and_its_switches_need_the_token(
    served: tuple[Loop, str],
) -> None:
    loop, url = served
    token = {"Authorization": "Bearer a-token"}
    async with httpx2.AsyncClient(base_url=url, timeout=30.0, verify=PLAIN) as client:
        assert (await client.get("/live")).json() == {"status": "alive"}
        assert (await client.get("/v1/plan")).status_code == 401
        assert (await client.get("/v1/plan", headers=token)).status_code == 404
        await until(lambda: loop.readiness()["discovery"] is None, "discovery is listed")
        assert (await client.get("/health")).json()["status"] == "ready"
        for _ in range(3):
            await loop.tick()
        plan = (await client.get("/v1/plan", headers=token)).json()
        assert plan["targets"] == {"aggregated": 1}
        assert plan["applied"]["accepted"] is False
        assert [r["kind"] for r in plan["reasons"]] == ["blind"], "one would be there by now"
        history = (await client.get("/v1/plan/history?most=2", headers=token)).json()["plans"]
        assert [one["number"] for one in history] == [3, 2]
        for path in ("pause", "resume", "advisory?on=true"):
            assert (await client.post(f"/v1/{path}")).status_code == 401
            assert (await client.post(f"/v1/{path}", headers=token)).status_code == 200
        assert loop.advisory
        page = (await client.get("/metrics")).text
        assert all(f"# TYPE {spec.name} " in page for spec in SPECS)
        assert 'kvbm_planner_target_replicas{role="aggregated"} 1.0' in page


async def test_the_loop_goes_on_after_a_tick_that_fails(tmp_path: Path) -> None:
    settings = planner_settings(tmp_path, actuator="dry-run")
    async with running(settings, {}) as loop:
        await until(lambda: loop.readiness()["discovery"] is None, "discovery is listed")
        tick, failures = loop._planner.tick, [ValueError("a bug"), ValueError("another")]

        def failing(snapshot: Any, **given: Any) -> Any:
            if failures:
                raise failures.pop()
            return tick(snapshot, **given)

        loop._planner.tick = failing  # type: ignore[method-assign]
        task = asyncio.create_task(loop.run())
        await until(lambda: loop.ticks_total >= 2, "it ticks")
        loop.paused = True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert loop.faults_total["bug"] == 2


def test_pages_of_settings_and_metrics_are_what_the_code_says() -> None:
    page = (ROOT / "docs/PLANNER_CONFIG.md").read_text()
    assert page == config_page(), "run: python -m planner.settings > docs/PLANNER_CONFIG.md"
    page = (ROOT / "docs/PLANNER_METRICS.md").read_text()
    assert page == planner_metrics_page(), (
        "run: python -m planner.metrics > docs/PLANNER_METRICS.md"
    )


def test_settings_that_contradict_each_other_are_refused() -> None:
    def wrong(**given: Any) -> str:
        with pytest.raises(SettingsError) as caught:
            PlannerSettings.load(environ={}, overrides=given)
        return str(caught.value)

    assert "names nothing for aggregated" in wrong(actuator="kubernetes")
    assert "more than max_endpoint" in wrong(
        **{"scaling.min_endpoint": 5, "scaling.max_endpoint": 2}
    )
    assert "ttft" in wrong(**{"goals.ttft": "-1s"})


def test_the_program_runs_and_ends_when_told(tmp_path: Path) -> None:
    found = f"discovery.file_directory={tmp_path}"
    command = [sys.executable, "-m", "planner", "serve", "--set", "http.port=0", "--set", found]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stderr=output)
        try:
            wait_until(lambda: b"serving" in log.read_bytes(), WAIT_S, "it serves")
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.wait()
    assert b"stopped" in log.read_bytes()
    refused = subprocess.run(
        [*command, "--set", "actuator=magic"], cwd=ROOT, capture_output=True, check=False
    )
    assert refused.returncode == 2
