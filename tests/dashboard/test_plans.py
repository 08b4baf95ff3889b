"""What a fleet's dashboard is told of a planner: its own reports, or why there are none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import router.plans
from planner.app import create_app
from planner.assembly import running
from planner.settings import PlannerSettings
from router.plans import Plans
from runtime.web.server import WebServer

WAIT_S = 60.0
TOKEN = "a-token-of-16-up"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.plans, "INTERVAL_S", 0.02)


@asynccontextmanager
async def asking(
    plans: Plans, is_watched: Callable[[], bool] = lambda: True
) -> AsyncIterator[None]:
    task = asyncio.create_task(plans.run(is_watched))
    yield
    task.cancel()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():
            await asyncio.sleep(0.01)


async def test_a_planners_own_reports_are_shown_while_somebody_watches(tmp_path: Path) -> None:
    settings = PlannerSettings.model_validate({"discovery": {"file_directory": tmp_path}})
    async with running(settings, {}) as loop:
        server = WebServer(create_app(loop, "1", TOKEN), "127.0.0.1", 0, section="http")
        await server.start()
        watched = False
        plans = Plans(server.url, TOKEN)
        async with asking(plans, lambda: watched):
            await until(lambda: loop.readiness()["discovery"] is None)
            for _ in range(2):
                await loop.tick()
            await asyncio.sleep(0.1)
            assert plans.state()["points"] == [], "nobody looks"
            watched = True
            await until(lambda: len(plans.state()["points"]) == 2)
            told = plans.state()
            assert told["error"] is None
            assert told["targets"] == {"aggregated": 1}
            # The one engine at least that the first tick asked for is there by now, it imagines.
            assert {reason.kind for reason in told["reasons"]} == {"blind"}
            first, last = told["points"]
            assert first["at"] <= last["at"]
            assert (last["target"], last["serving"], last["rate"]) == (1, 0, None)
            await server.stop()
            await until(lambda: plans.state()["error"] is not None)
            assert len(plans.state()["points"]) == 2, "what was known is still shown"


async def test_a_planner_that_asks_for_another_token_is_told_as_that(tmp_path: Path) -> None:
    settings = PlannerSettings.model_validate({"discovery": {"file_directory": tmp_path}})
    async with running(settings, {}) as loop:
        server = WebServer(create_app(loop, "1", TOKEN), "127.0.0.1", 0, section="http")
        await server.start()
        plans = Plans(server.url)
        async with asking(plans):
            await until(lambda: plans.state()["error"] is not None)
        assert "401" in plans.state()["error"]
        await server.stop()
