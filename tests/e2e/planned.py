"""A planner beside the demo's stack: in this process, with the engines it starts as its own.

How many engines there shall be is set by bounds, so that a test says when and not the load.
"""

from __future__ import annotations

import asyncio
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from examples.demo.engine import Engine
from examples.demo.planner import settings_of
from examples.demo.stack import Stack
from planner.actuate.processes import Processes
from planner.assembly import running
from planner.loop import Loop, Step
from planner.observe import EngineLoad, Observation
from planner.settings import PlannerSettings

TICK_S = 0.5


class Planned:
    """Ticks on a thread of its own while `planning` lasts."""

    def __init__(self, loop: Loop) -> None:
        self.wanted = 0  # engines, from the next tick on
        self._loop = loop

    @property
    def step(self) -> Step:
        step = self._loop.latest
        assert step is not None
        return step

    @property
    def seen(self) -> Observation:
        return self.step.plan.observation

    @property
    def started(self) -> list[int]:
        """Numbers of the instances that it has started and that are to be found."""
        actuator = self._loop.actuator
        assert isinstance(actuator, Processes)
        known = self._loop._fleet._instances.known.items()
        return [name.id for name, record in known if record.pid in actuator._started]

    def load_of(self, engine: Engine) -> EngineLoad:
        [found] = [one for one in self.seen.engines if one.name == f"{engine.instance:x}"]
        return found

    def until(self, what: str, true: Callable[[], bool], timeout_s: float) -> None:
        """Raises TimeoutError with the last plan."""
        end_s = time.monotonic() + timeout_s
        while self._loop.latest is None or not true():
            if time.monotonic() > end_s:
                raise TimeoutError(f"{what}: not within {timeout_s:.0f} s: {self._loop.latest}")
            time.sleep(0.1)

    def phases(self) -> list[str]:
        return sorted(engine.phase for engine in self.seen.engines)

    async def tick(self) -> None:
        bounds = {"min_endpoint": self.wanted, "max_endpoint": self.wanted}
        planner = self._loop._planner
        scaling = planner._settings.scaling.model_copy(update=bounds)
        planner._settings = planner._settings.model_copy(update={"scaling": scaling})
        await self._loop.tick()


@contextmanager
def planning(stack: Stack, like: Engine, folder: Path) -> Iterator[Planned]:
    """It starts engines as `like` is started, ends them by SIGTERM, and the last with itself."""
    given = settings_of(like.config, stack.frontend.url, folder, stack.events(), stack.discovery())
    command = shlex.split(given["processes"]["command"])
    options = command.index("--")
    command[options:options] = ["--set", "engine.drain_timeout=60s"]
    given["processes"] |= {"command": shlex.join(command), "stop_timeout": 120.0}
    settings = PlannerSettings.model_validate({**given, "scaling": {"scale_down_delay": 0.0}})
    made: Future[Planned] = Future()
    ended = threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(_plan(settings, made, ended),))
    thread.start()
    try:
        yield made.result(TICK_S * 100)
    finally:
        ended.set()
        thread.join(settings.processes.stop_timeout + 60)
        assert not thread.is_alive()


async def _plan(settings: PlannerSettings, made: Future[Planned], ended: threading.Event) -> None:
    async with running(settings, {}) as loop:
        planned = Planned(loop)
        made.set_result(planned)
        while not ended.is_set():
            if loop.readiness()["discovery"] is None and planned.wanted:
                await planned.tick()
            await asyncio.sleep(TICK_S)
