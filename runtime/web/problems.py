"""Errors of an API as RFC 9457 problems, and how its schema describes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

MEDIA_TYPE: Final = "application/problem+json"
_REFERENCE: Final = {"$ref": "#/components/schemas/Problem"}


class Problem(BaseModel):
    """What every request that fails is answered with; some have members of their own."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str


def described(what: str) -> dict[str, Any]:
    """A problem as a response in the schema."""
    return {"description": what, "content": {MEDIA_TYPE: {"schema": _REFERENCE}}}


def handle_problems(app: FastAPI, program: str) -> None:
    """Have every error of the app answered with a problem, and the schema know its shape."""
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(Exception, partial(_on_bug, program))
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas["Problem"] = Problem.model_json_schema()
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def problem(
    request: Request,
    status: int,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Response:
    """An RFC 9457 problem of no type but its status."""
    body = {
        "type": "about:blank",
        "title": _phrase(status),
        "status": int(status),
        "detail": detail,
        "instance": request.url.path,
        **members,
    }
    return JSONResponse(body, int(status), headers=headers, media_type=MEDIA_TYPE)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # as 529, which no standard has
        return "Overloaded" if status >= 500 else "Refused"


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(request, error.status_code, error.detail, headers=error.headers)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
    return problem(request, HTTPStatus.BAD_REQUEST, "; ".join(faults))


async def _on_bug(program: str, request: Request, _: Exception) -> Response:
    detail = f"{program} failed to answer; its log says why"
    return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, detail)
