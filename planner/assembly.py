"""A planner put together from its settings."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import assert_never

from planner.actuate.base import Actuator
from planner.events import Events
from planner.fleet import Fleet
from planner.loop import Loop
from planner.measure import Profile
from planner.planning import Planner
from planner.settings import PROGRAM, PlannerSettings
from planner.sources import Pages, Prometheus, Source
from runtime.discovery import Discovery, create_discovery
from runtime.discovery.store import Store
from runtime.event_peers import joined
from runtime.events import create_event_plane


@contextlib.asynccontextmanager
async def running(
    settings: PlannerSettings, environ: Mapping[str, str], memory: Store | None = None
) -> AsyncIterator[Loop]:
    """Connected, not looking yet: `run` or `tick` does. Raises ProfileRefused, OSError, and
    ActuateError where the actuator cannot begin."""
    profile = settings.perf.profile
    profiles = {}
    if profile is not None:
        profiles = dict.fromkeys(settings.scaling.roles, Profile.read(profile))
    planner = Planner(settings.plan, profiles)
    async with AsyncExitStack() as stack:
        discovery = create_discovery(settings.discovery, environ, memory)
        await discovery.start()
        stack.push_async_callback(discovery.close)
        fleet = Fleet(
            discovery,
            settings.namespace,
            settings.model,
            settings.observe.frontends,
            _source(settings),
            events := await _events(settings, discovery, stack),
        )
        await fleet.start()
        stack.push_async_callback(fleet.close)
        actuator = _actuator(settings, discovery, environ)
        stack.push_async_callback(actuator.close)
        await actuator.start()
        yield Loop(
            fleet,
            planner,
            actuator,
            settings.scaling.load_adjustment_interval,
            advisory=settings.advisory,
            history_max=settings.history_max,
            events=events,
        )


async def _events(
    settings: PlannerSettings, discovery: Discovery, stack: AsyncExitStack
) -> Events | None:
    """Heard until the stack is left."""
    given = settings.events.model_copy(update={"namespace": settings.namespace})
    if given.plane == "none":
        return None
    plane = create_event_plane(given, PROGRAM)
    await plane.start()
    stack.push_async_callback(plane.close)
    # Questions to routers go out, too.
    await stack.enter_async_context(joined(discovery, plane, given, publishes=True, listens=True))
    events = Events(plane, settings.namespace)
    tasks = await stack.enter_async_context(asyncio.TaskGroup())
    hearing = tasks.create_task(events.run(), name="events")
    stack.callback(hearing.cancel)
    return events


def _source(settings: PlannerSettings) -> Source:
    observe = settings.observe
    if observe.prometheus is not None:
        return Prometheus(observe.prometheus)
    return Pages(observe.timeout)


def _actuator(
    settings: PlannerSettings, discovery: Discovery, environ: Mapping[str, str]
) -> Actuator:
    """Only its own libraries are imported."""
    match settings.actuator:
        case "dry-run":
            from planner.actuate.dry_run import DryRun

            return DryRun()
        case "virtual":
            from planner.actuate.virtual import Virtual

            return Virtual(discovery, settings.namespace, settings.virtual.timeout)
        case "kubernetes":
            from planner.actuate.kubernetes import Kubernetes
            from runtime.discovery.kubernetes_api import Api

            return Kubernetes(Api(settings.discovery, environ), discovery, settings.kubernetes)
        case "processes":
            from planner.actuate.processes import Processes

            return Processes(settings.processes)
        case _:
            assert_never(settings.actuator)
