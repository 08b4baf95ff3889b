"""The frontend's HTTP application: OpenAI's routes, and what operators and probes ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route

from frontend.errors import UNSUPPORTED, ApiError, model_not_found
from frontend.exchange import Exchange, Handler
from frontend.fleet import Fleet, ModelInfo
from frontend.gate import Gate, Receive, Scope, Send
from frontend.meter import Measured, Meter
from frontend.relay import Relay
from frontend.request import decode, model_decoder
from frontend.respond import Reply
from frontend.routes import readers
from frontend.token_routes import TokenRoutes
from frontend.upstream import Upstream


def make_exchanges(
    fleet: Fleet,
    gate: Gate,
    meter: Meter,
    upstream: Upstream,
    tokens: TokenRoutes | None = None,
    *,
    migrations_max: int,
) -> dict[str, Exchange]:
    """What answers each path. `tokens` does for models whose engines take tokens; all others are
    passed through."""
    own: dict[str, Handler] = {}
    if tokens is not None:
        own = {"/v1/chat/completions": tokens.chat, "/v1/completions": tokens.completions}
    made = {}
    for path, reader in readers(fleet).items():
        handler: Handler = Relay(reader, fleet, upstream, migrations_max=migrations_max)
        if path in own:
            handler = ByModel(fleet, own[path], handler)
        made[path] = Exchange(path, handler, gate, meter)
    return made


def make_app(
    exchanges: Mapping[str, Exchange], fleet: Fleet, gate: Gate, meter: Meter
) -> Application:
    app = FastAPI(title="kvbm frontend", docs_url=None, redoc_url=None)
    for path, exchange in exchanges.items():
        app.router.routes.append(Route(path, exchange, methods=["POST"]))
    _add_models(app, fleet, gate)
    _add_probes(app, fleet, meter)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    return Application(exchanges, app)


class Application:
    """ASGI: requests that engines answer go straight to their exchange, all others to `pages`.

    The framework's middleware would be some microseconds for each request and each event.
    """

    def __init__(self, exchanges: Mapping[str, Exchange], pages: FastAPI) -> None:
        self._exchanges = exchanges
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchanges.get(scope.get("path", ""))
        if exchange is not None and scope.get("method") == "POST":
            await exchange(scope, receive, send)
        else:
            await self._pages(scope, receive, send)


class ByModel:
    """A handler that leaves models whose engines take tokens to another.

    What that one cannot make is passed through if the engines have servers too.
    """

    def __init__(self, fleet: Fleet, of_tokens: Handler, others: Handler) -> None:
        self._fleet = fleet
        self._of_tokens = of_tokens
        self._others = others

    async def __call__(self, body: bytes, scope: Scope, reply: Reply, measured: Measured) -> None:
        model = decode(model_decoder, body).model
        if self._fleet.takes_tokens(model):
            try:
                await self._of_tokens(body, scope, reply, measured)
                return
            except ApiError as error:
                if error.code != UNSUPPORTED or not self._fleet.has_servers(model):
                    raise
        await self._others(body, scope, reply, measured)


def _add_models(app: FastAPI, fleet: Fleet, gate: Gate) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        gate.check_key(request.scope["headers"])
        return {"object": "list", "data": [_described(model) for model in fleet.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        gate.check_key(request.scope["headers"])
        known = {model.name: model for model in fleet.models()}
        if name not in known:
            raise model_not_found(name, list(known))
        return _described(known[name])


def _add_probes(app: FastAPI, fleet: Fleet, meter: Meter) -> None:
    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health")
    async def health() -> Response:
        """200 once some engine serves; else what is waited for."""
        models = {model.name: model.engines for model in fleet.models()}
        if not models:
            missing = {"status": "no engine serves", "engines": {}, "waits_for": fleet.waits_for()}
            return JSONResponse(missing, 503)
        by_load = [name for name in models if fleet.text(name) is None]
        return JSONResponse({"status": "ready", "engines": models, "routed_by_load": by_load})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(meter.registry), media_type=CONTENT_TYPE_LATEST)


def _described(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "kvbm",
        "max_model_len": model.context_tokens,
    }


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body, error.status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return await _on_api_error(request, ApiError(error.status_code, detail, "not_found"))
