"""The global router's HTTP API: where a request would go and why, what was decided, which pools.

Bodies are read by msgspec, as the router's are. Errors are RFC 9457 problems with a `kind`.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import Response
from msgspec import Meta

from router.app import JSON, TOKEN_SETTING, TooLarge, read_body
from router.asks import AskRefused, Count, Name, tokens_of
from router.pools.assembly import GlobalAssembly
from router.pools.relay import Relay
from router.pools.settings import PROGRAM
from runtime.generation import Generate, Hints, Sampling
from runtime.web.access import readers
from runtime.web.probes import add_probes
from runtime.web.problems import described, handle_problems, problem

DECISIONS_MAX: Final = 1024

Milliseconds = Annotated[float, Meta(ge=0.0)]


class ExplainAsk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A prompt, by its tokens (numbers, or base64 of them as little-endian unsigned 32 bit), and
    what a request with it would say."""

    tokens: list[int] | bytes
    model: Name | None = None  # may be left out where there is one
    ttft_target_ms: Milliseconds | None = None
    itl_target_ms: Milliseconds | None = None
    priority: int | None = None
    max_tokens: Count = 256
    cache_salt: str | None = None
    session: Name | None = None


class UnknownModel(Exception):
    """No engine of it was found in any pool."""


def create_app(assembly: GlobalAssembly) -> FastAPI:
    """The API over one global router; call it once for each.

    With a token in the settings, every request below /v1 must give it.
    """
    metrics, http = assembly.metrics, assembly.settings.http
    metrics.attach(assembly.samples)
    app = FastAPI(title=PROGRAM, version=metrics.version, docs_url=None, redoc_url=None)
    handle_problems(app, PROGRAM)
    _handle_refusals(app)
    add_probes(app, assembly.readiness, metrics.render, "docs/GLOBAL_ROUTER_METRICS.md")
    reading = [Depends(readers(http.token_text, TOKEN_SETTING))]
    errors: dict[int | str, dict[str, Any]] = {
        "default": described("Any error; `kind` says which.")
    }
    app.include_router(_reports(assembly), prefix="/v1", dependencies=reading, responses=errors)
    return app


def _reports(assembly: GlobalAssembly) -> APIRouter:
    router = APIRouter(tags=["reports"])
    most = assembly.settings.http.body_max

    @router.post("/route/explain", response_class=Response)
    async def explain(request: Request) -> Response:
        """Where it would go now, by role, and why: the grid's cell, what pools expect of it."""
        ask = _decoded(await read_body(request, most))
        relays = _relays(assembly, ask.model)
        asking = Generate(
            token_ids=tokens_of(ask.tokens).tolist(),
            sampling=Sampling(max_tokens=ask.max_tokens),
            cache_salt=ask.cache_salt,
            session=ask.session,
            hints=Hints(ask.ttft_target_ms, ask.itl_target_ms, ask.priority),
        )
        decided = {
            one.strategy.role: (await one.decide(one.asked(asking), "")).explain() for one in relays
        }
        return _json(decided)

    @router.get("/decisions", response_class=Response)
    async def decisions(
        count: Annotated[int, Query(ge=1, le=DECISIONS_MAX)] = 32, request: str | None = None
    ) -> Response:
        """The latest, newest first, and what came of them; those of one request if it is named."""
        latest = assembly.log.latest(count, request)
        return _json({"kept": len(assembly.log), "decisions": [one.report() for one in latest]})

    @router.get("/pools", response_class=Response)
    async def pools() -> Response:
        """Pools by role: engines that serve, requests under way, who chooses among the engines."""
        return _json(assembly.report())

    return router


def _handle_refusals(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        return problem(request, HTTPStatus.BAD_REQUEST, str(error), kind="bad-request")

    async def too_large(request: Request, error: Exception) -> Response:
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return problem(request, status, str(error), kind="too-large")

    async def unknown(request: Request, error: Exception) -> Response:
        return problem(request, HTTPStatus.NOT_FOUND, str(error), kind="unknown-model")

    app.add_exception_handler(AskRefused, refused)
    app.add_exception_handler(TooLarge, too_large)
    app.add_exception_handler(UnknownModel, unknown)


def _decoded(body: bytes) -> ExplainAsk:
    try:
        return _ask.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AskRefused(str(error) or "no JSON") from error


def _relays(assembly: GlobalAssembly, model: str | None) -> list[Relay]:
    models = {name for _, name in assembly.relays}
    if model is None and len(models) > 1:
        raise AskRefused(f"name one of {len(models)} models - at `$.model`")
    if not models or (model is not None and model not in models):
        known = ", ".join(sorted(models)) or "none"
        raise UnknownModel(f"no engine of {model or 'any model'} was found; known: {known}")
    return [one for (_, name), one in assembly.relays.items() if model in {None, name}]


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)


_ask = msgspec.json.Decoder(ExplainAsk)
