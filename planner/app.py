"""The planner's HTTP API: the last plan and why, plans before it, and switches for operators."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Final

import structlog
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from starlette.exceptions import HTTPException

from planner.loop import Loop
from planner.metrics import PlannerMetrics
from planner.reports import samples, step_report
from planner.settings import PROGRAM
from runtime.web.access import operators, readers
from runtime.web.probes import add_probes
from runtime.web.problems import described, handle_problems

TOKEN_SETTING: Final = "http.token"  # noqa: S105 (a name)

_log = structlog.get_logger("planner")


def create_app(loop: Loop, version: str, token: str | None) -> FastAPI:
    """With a token, every request below /v1 must give it."""
    app = FastAPI(title=PROGRAM, version=version, docs_url=None, redoc_url=None)
    handle_problems(app, PROGRAM)
    metrics = PlannerMetrics(version, lambda: samples(loop))
    add_probes(app, loop.readiness, metrics.render, "docs/PLANNER_METRICS.md")
    errors: dict[int | str, dict[str, Any]] = {"default": described("Any error.")}
    reading = [Depends(readers(token, TOKEN_SETTING))]
    acting = [Depends(operators(token, TOKEN_SETTING))]
    app.include_router(_reports(loop), prefix="/v1", dependencies=reading, responses=errors)
    app.include_router(_switches(loop), prefix="/v1", dependencies=acting, responses=errors)
    return app


def _reports(loop: Loop) -> APIRouter:
    router = APIRouter(tags=["plans"])

    @router.get("/plan")
    async def plan() -> dict[str, Any]:
        """The last decision with its reasons, and the forecast and observation it was made of."""
        step = loop.latest
        if step is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "there has been no tick yet")
        return _state(loop) | step_report(step)

    @router.get("/plan/history")
    async def history(
        most: Annotated[int, Query(ge=1, le=10_000, description="So many of the latest.")] = 32,
        changes: Annotated[bool, Query(description="Only those that changed a target.")] = False,
    ) -> dict[str, Any]:
        """Plans, the latest first."""
        steps = [s for s in reversed(loop.history) if s.plan.decision.changes or not changes]
        return {"plans": [step_report(step) for step in steps[:most]]}

    return router


def _switches(loop: Loop) -> APIRouter:
    router = APIRouter(tags=["switches"])

    @router.post("/pause")
    async def pause(request: Request) -> dict[str, Any]:
        """Look at nothing and change nothing until `/v1/resume`."""
        loop.paused = True
        _note(request)
        return _state(loop)

    @router.post("/resume")
    async def resume(request: Request) -> dict[str, Any]:
        """End a pause."""
        loop.paused = False
        _note(request)
        return _state(loop)

    @router.post("/advisory")
    async def advisory(
        request: Request,
        on: Annotated[bool, Query(description="Whether to decide and do nothing.")],
    ) -> dict[str, Any]:
        """Decide and tell, without doing; or do again."""
        loop.advisory = on
        _note(request)
        return _state(loop)

    return router


def _state(loop: Loop) -> dict[str, Any]:
    return {"paused": loop.paused, "advisory": loop.advisory, "actuator": loop.actuator.kind}


def _note(request: Request) -> None:
    client = request.client.host if request.client is not None else "unknown"
    _log.info("admin_action", path=request.url.path, client=client)
