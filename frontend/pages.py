"""What the frontend itself answers: models, limits, probes, and what it can do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from frontend.api import ROUTES, docs_page, openapi
from frontend.errors import ApiError, bad_request, model_not_found
from frontend.exchanges import Exchanges
from frontend.fleet import Fleet, ModelInfo
from frontend.gate import Gate
from frontend.meter import Meter
from router.asks import AskRefused
from router.service import NotRouted
from runtime import program

_REFERENCES_NAMES: Final = {
    "active_decode_blocks_threshold": "blocks_fraction",
    "active_prefill_tokens_threshold": "prefill_tokens",
    "active_prefill_tokens_threshold_frac": "prefill_fraction",
}

_log = structlog.get_logger("kvbm.frontend")


class Limits(Protocol):
    """See `router.service.RouterService`."""

    def busy_threshold(self, model: str | None = None) -> dict[str, Any]: ...

    def set_busy_threshold(self, body: bytes) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Pages:
    """Their routes are those of `frontend.api` that no engine answers."""

    fleet: Fleet
    gate: Gate
    meter: Meter
    limits: Limits

    def app(self, exchanges: Exchanges) -> Starlette:
        """With the routes that engines answer."""
        posted = [
            Route(path, exchange, methods=["POST"]) for path, exchange in exchanges.posted.items()
        ]
        about = [
            Route(route.path, exchanges.about_response, methods=list(route.methods))
            for route in ROUTES
            if "response_id" in route.parameters
        ]
        version = program.version()
        own = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/busy_threshold", self.busy_threshold, methods=["GET", "POST"]),
            Route("/health", self.health),
            Route("/live", _saying(JSONResponse({"status": "live"}))),
            Route("/version", _saying(JSONResponse({"version": version}))),
            Route("/metrics", self.metrics),
            Route("/openapi.json", _saying(JSONResponse(openapi(version)))),
            Route("/docs", _saying(HTMLResponse(docs_page(version)))),
        ]
        return Starlette(
            routes=[*posted, *about, *own],
            exception_handlers={
                ApiError: _on_api_error,
                HTTPException: _on_http_error,
                Exception: _on_bug,
            },
        )

    async def models(self, request: Request) -> Response:
        self.gate.check_key(request.scope["headers"])
        data = [_described(model) for model in self.fleet.models()]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        self.gate.check_key(request.scope["headers"])
        known = {model.name: model for model in self.fleet.models()}
        name = request.path_params["name"]
        if name not in known:
            raise model_not_found(name, list(known))
        return JSONResponse(_described(known[name]))

    async def busy_threshold(self, request: Request) -> Response:
        """As the reference has it: those of all models, or of the one that is changed."""
        headers = request.scope["headers"]
        self.gate.check_admin(headers)
        try:
            if request.method != "POST":
                found = self.limits.busy_threshold(request.query_params.get("model"))
                told = [_thresholds(one) for one in found["models"]]
                return JSONResponse({"thresholds": told})
            body = await self.gate.body(headers, request.receive)
            found = self.limits.set_busy_threshold(body)
        except AskRefused as error:
            raise bad_request(str(error), code="invalid_value") from error
        except NotRouted as error:
            raise ApiError(404, str(error), "model_not_found", "model") from error
        told = [_thresholds(one) for one in found["models"]]
        _log.info("busy_threshold", thresholds=told)
        return JSONResponse(told[0] if len(told) == 1 else {"thresholds": told})

    async def health(self, _: Request) -> Response:
        """200 once some engine serves; else what is waited for."""
        models = {model.name: model.engines for model in self.fleet.models()}
        if not models:
            waits_for = dict(self.fleet.waits_for())
            missing = {"status": "no engine serves", "engines": {}, "waits_for": waits_for}
            return JSONResponse(missing, 503)
        by_load = [name for name in models if self.fleet.text(name) is None]
        return JSONResponse({"status": "ready", "engines": models, "routed_by_load": by_load})

    async def metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.meter.registry), media_type=CONTENT_TYPE_LATEST)


def _saying(response: Response) -> Callable[[Request], Awaitable[Response]]:
    async def say(_: Request) -> Response:
        return response

    return say


def _described(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "kvbm",
        "max_model_len": model.context_tokens,
    }


def _thresholds(limits: Mapping[str, Any]) -> dict[str, Any]:
    named = {theirs: limits[ours] for theirs, ours in _REFERENCES_NAMES.items()}
    return {"model": limits["model"], **named}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body(request.url.path), error.status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}"
    extra = tuple((k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items())
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return await _on_api_error(request, ApiError(error.status_code, said, code, extra=extra))


async def _on_bug(request: Request, _: Exception) -> Response:
    said = "The frontend failed; its log says why"
    return await _on_api_error(request, ApiError(500, said, "internal"))
