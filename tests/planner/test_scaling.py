"""Load, and what follows of it: engines are started, drained and ended, and no request is lost.

All of it is real but the model: NATS, a frontend, the planner's own loop with its process actuator,
and mock engines as processes. Only the time over which a rate is taken is shorter than it is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from planner import planning
from planner.actuate.processes import Processes
from planner.assembly import running
from planner.loop import Loop
from planner.settings import PlannerSettings
from runtime.embedded import EmbeddedNats
from tests.router.pools.world import MODEL, ROOT, Site, a_site, until

NAMESPACE = "front"
MOST = 3
USERS = 6
# An answer takes half a second of an engine's time: many users keep all of them busy.
TOKENS = 150
PROFILE = {"prefill": [[100, 0.01], [1000, 0.1]], "decode": [[1, 0, 0.013], [101, 0, 0.313]]}


def settings_of(site: Site, folder: Path) -> PlannerSettings:
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    sections = ("discovery", "events")
    place = {
        f"KVBM_MOCK_{key.upper().replace('.', '__')}": str(value)
        for key, value in site.place.items()
        if key.startswith(sections)
    }
    command = f"{sys.executable} -m mocker serve --set port={{port}} --set node=n{{port}}"
    overrides: dict[str, Any] = {
        **site.place,
        "namespace": NAMESPACE,
        "actuator": "processes",
        "processes.command": f"{command} --set drain=60",
        "processes.log_directory": folder / "logs",
        "processes.environment": {
            **place,
            "PYTHONPATH": str(ROOT),
            "KVBM_MOCK_NAMESPACE": NAMESPACE,
            "KVBM_MOCK_EVENTS__NAMESPACE": NAMESPACE,
            "KVBM_MOCK_SPEEDUP": "4",
        },
        "goals.ttft": 100.0,
        "perf.profile": folder / "profile.json",
        "perf.load_min_observations": 200,  # so that the profile stays what counts
        "forecast.load_predictor": "constant",
        "forecast.throughput_adjustment_interval": 1.0,
        "forecast.headroom": 0.0,
        "observe.timeout": 20.0,
        "scaling.max_endpoint": MOST,
        "scaling.load_adjustment_interval": 0.25,
        "scaling.start_delay": 1.0,
        "scaling.scale_down_delay": 6.0,
    }
    return PlannerSettings.load(environ={}, overrides=overrides).value


class Users:
    """Each asks one thing after another; whatever fails ends the test."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client
        self.answers = 0
        self.are_many = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled: one all the time, the others while they are many."""
        async with asyncio.TaskGroup() as tasks:
            for user in range(USERS):
                tasks.create_task(self._use(user))

    async def _use(self, user: int) -> None:
        for turn in itertools.count():
            if user:
                await self.are_many.wait()
            elif not self.are_many.is_set():
                await asyncio.sleep(1.0)
            answer = await self.client.completions.create(
                model=MODEL, prompt=[user, turn, 7] * 100, max_tokens=TOKENS
            )
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == TOKENS
            self.answers += 1


def phases(loop: Loop) -> list[str]:
    return [e.phase for e in loop.latest.plan.observation.engines] if loop.latest else []


async def test_engines_come_with_the_load_and_go_with_it_and_no_request_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "RATE_S", 2.0)
    monkeypatch.setattr(planning, "RATE_FAST_S", 1.0)
    with EmbeddedNats(tmp_path / "nats") as nats:
        async with a_site(tmp_path, nats) as site:
            settings = settings_of(site, tmp_path)
            async with running(settings, {}) as loop, asyncio.TaskGroup() as tasks:
                planned = tasks.create_task(loop.run())
                await until("the first engine serves", lambda: phases(loop) == ["serving"])
                users = Users(await site.frontend(1))
                using = tasks.create_task(users.run())
                users.are_many.set()
                await until("all serve", lambda: phases(loop) == ["serving"] * MOST)
                before = users.answers
                await until("all are at work", lambda: users.answers > before + 5 * USERS)
                actuator = loop.actuator
                assert isinstance(actuator, Processes)
                processes = [one.process for one in actuator._engines]
                users.are_many.clear()
                await until("one is left", lambda: phases(loop) == ["serving"])
                before = users.answers
                await until("it serves on", lambda: users.answers > before + 5)
                using.cancel()
                planned.cancel()
            assert not actuator.deaths_total
            assert [one.poll() for one in processes] == [0] * MOST
            assert loop.changes_total["aggregated", "down"] == MOST - 1
            assert not any(loop.faults_total.values())
