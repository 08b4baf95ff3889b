"""The router's HTTP API: where to send a request and why, what became of it, who is there.

Bodies are read by `router.asks`, not by pydantic: a prompt of thousands of tokens is then parsed
once, and quickly. Errors are RFC 9457 problems with a `kind` that callers can act on.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.responses import Response

from router.asks import NAME_MAX, AskRefused, Happened, schemas
from router.reports import index_report, replicas_report, samples, workers_report
from router.service import Kind, NotRouted, RouterService
from router.settings import PROGRAM
from runtime.web.access import operators, readers
from runtime.web.dashboard import Dashboard
from runtime.web.probes import add_probes
from runtime.web.problems import described, handle_problems, problem

TOKEN_SETTING: Final = "http.token"  # noqa: S105 (a name)
JSON: Final = "application/json"
BUSY: Final = frozenset[Kind]({"busy", "queue-full", "deadline", "full"})
_STATUS: Final[dict[Kind, int]] = {
    "unknown-model": 404,
    "unknown-request": 404,
    "no-worker": 503,
    "no-prefill-worker": 503,
    "duplicate": 409,
}

RequestId = Annotated[str, InPath(min_length=1, max_length=NAME_MAX, description="The request's.")]
Handler = Callable[[Request], Awaitable[Any]]


class TooLarge(Exception):
    """A body over the limit."""


def create_app(service: RouterService, dashboard: Dashboard | None = None) -> FastAPI:
    """The API over one router; call it once for each.

    With a token in the settings, every request below /v1 must give it.
    """
    assembly = service.assembly
    metrics, settings = assembly.metrics, assembly.settings.http
    metrics.attach(lambda: samples(assembly))
    app = FastAPI(title=PROGRAM, version=metrics.version, docs_url=None, redoc_url=None)
    handle_problems(app, PROGRAM)
    _handle_refusals(app, service)
    add_probes(app, assembly.readiness, metrics.render, "docs/ROUTER_METRICS.md")
    token = settings.token_text
    errors: dict[int | str, dict[str, Any]] = {
        "default": described("Any error; `kind` says which.")
    }
    reading = [Depends(readers(token, TOKEN_SETTING))]
    acting = [Depends(operators(token, TOKEN_SETTING))]
    app.include_router(_reports(service), prefix="/v1", dependencies=reading, responses=errors)
    app.include_router(_requests(service), prefix="/v1", dependencies=acting, responses=errors)
    app.include_router(_thresholds(service), prefix="/v1", dependencies=acting, responses=errors)
    if dashboard is not None:
        dashboard.add_to(app, reading)
    return app


def _requests(service: RouterService) -> APIRouter:
    router = APIRouter(tags=["requests"])
    most = service.assembly.settings.http.body_max

    @router.post("/route", openapi_extra=_asks("RouteAsk"), response_class=Response)
    async def route(request: Request) -> Response:
        """The worker for a prompt. It counts there until its end is told, or its lease is over."""
        answer = await service.route(await read_body(request, most))
        if answer["waited_s"] and await request.is_disconnected():
            service.happened(Happened(request=answer["request"], kind="end", ending="cancelled"))
        return _json(answer)

    @router.post("/route/explain", openapi_extra=_asks("RouteAsk"), response_class=Response)
    async def explain(request: Request) -> Response:
        """Where it would go now and why: all candidates, and what keeps the others from it."""
        return _json(service.explain(await read_body(request, most)))

    @router.post("/route/forecast", openapi_extra=_asks("RouteAsk"), response_class=Response)
    async def forecast(request: Request) -> Response:
        """What it may expect where it would go now, in seconds; `why`: nobody would take it."""
        return _json(service.forecast(await read_body(request, most)))

    @router.post("/requests/events", openapi_extra=_asks("EventsAsk"), response_class=Response)
    async def events(request: Request) -> Response:
        """What happened to requests, in order; those that are not known are named."""
        return _json(service.events(await read_body(request, most)))

    @router.post("/requests/{request_id}/prefilled")
    async def prefilled(request_id: RequestId) -> dict[str, str]:
        """Its prompt is computed; the first token says so too."""
        return _happened(service, Happened(request=request_id, kind="prefilled"))

    @router.post("/requests/{request_id}/first_token")
    async def first_token(request_id: RequestId) -> dict[str, str]:
        """Its first token has come."""
        return _happened(service, Happened(request=request_id, kind="first_token"))

    @router.post("/requests/{request_id}/output")
    async def output(
        request_id: RequestId,
        tokens: Annotated[int, Query(ge=1, le=1 << 31, description="So many more.")] = 1,
    ) -> dict[str, str]:
        """More of its output has come."""
        return _happened(service, Happened(request=request_id, kind="output", tokens=tokens))

    @router.post("/requests/{request_id}/answered")
    async def answered(
        request_id: RequestId,
        tokens: Annotated[int, Query(ge=1, le=1 << 31, description="Of the answer.")],
    ) -> dict[str, str]:
        """Its whole answer has come at once: when its first token did is not known."""
        return _happened(service, Happened(request=request_id, kind="answered", tokens=tokens))

    @router.post("/requests/{request_id}/end")
    async def end(
        request_id: RequestId,
        ending: Annotated[str, Query(pattern="^(done|failed|cancelled)$")] = "done",
    ) -> dict[str, str]:
        """It has ended, however."""
        told = msgspec.convert(
            {"request": request_id, "kind": "end", "ending": ending}, type=Happened
        )
        return _happened(service, told)

    return router


def _thresholds(service: RouterService) -> APIRouter:
    router = APIRouter(tags=["limits"])

    @router.get("/busy_threshold")
    async def busy_threshold(model: str | None = None) -> dict[str, Any]:
        """Limits above which workers are sent nothing; null is no limit."""
        return service.busy_threshold(model)

    @router.post("/busy_threshold", openapi_extra=_asks("BusyAsk"), response_class=Response)
    async def set_busy_threshold(request: Request) -> Response:
        """Change those that are named, for one model or all, until the router ends."""
        body = await read_body(request, service.assembly.settings.http.body_max)
        return _json(service.set_busy_threshold(body))

    return router


def _reports(service: RouterService) -> APIRouter:
    router = APIRouter(tags=["reports"])
    assembly = service.assembly

    @router.get("/workers", response_class=Response)
    async def workers() -> Response:
        """Workers by model: state, load, capacity, blocks held, speed; and records left out."""
        return _json(workers_report(assembly))

    @router.get("/index", response_class=Response)
    async def index() -> Response:
        """The block index: how full, what came of its changes, how its feeds are."""
        return _json(index_report(assembly))

    @router.get("/replicas", response_class=Response)
    async def replicas() -> Response:
        """Other routers of the same models."""
        return _json(replicas_report(assembly))

    return router


def _handle_refusals(app: FastAPI, service: RouterService) -> None:
    busy, metrics = service.assembly.settings.busy, service.assembly.metrics

    async def on_bad_ask(request: Request, error: Exception) -> Response:
        metrics.bad_request(_endpoint(request))
        return problem(request, HTTPStatus.BAD_REQUEST, str(error), kind="bad-request")

    async def on_too_large(request: Request, error: Exception) -> Response:
        metrics.bad_request(_endpoint(request))
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return problem(request, status, str(error), kind="too-large")

    async def on_not_routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, NotRouted)
        if error.kind in BUSY:
            after = {"Retry-After": str(math.ceil(busy.retry_after))}
            return problem(request, busy.status, str(error), headers=after, kind=error.kind)
        return problem(request, _STATUS[error.kind], str(error), kind=error.kind)

    app.add_exception_handler(AskRefused, on_bad_ask)
    app.add_exception_handler(TooLarge, on_too_large)
    app.add_exception_handler(NotRouted, on_not_routed)
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        schema.setdefault("components", {}).setdefault("schemas", {}).update(schemas())
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


async def read_body(request: Request, most: int) -> bytes:
    """Raises TooLarge, before more than the limit is held."""
    parts: list[bytes] = []
    held = 0
    async for part in request.stream():
        held += len(part)
        if held > most:
            raise TooLarge(f"the body is over {most} bytes (http.body_max)")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _happened(service: RouterService, what: Happened) -> dict[str, str]:
    if not service.happened(what):
        raise NotRouted(
            "unknown-request", f"no request {what.request!r} runs; its lease may be over"
        )
    return {"request": what.request}


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)


def _asks(schema: str) -> dict[str, Any]:
    content = {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _endpoint(request: Request) -> str:
    """The route's path, not the request's: labels of metrics are few."""
    return str(getattr(request.scope.get("route"), "path", "none"))
