"""Who may ask the admin API: everybody on the node, or whoever has the token.

Without a token the settings allow only a loopback address. Actions then are for programs on the
node alone: not for a web page that a browser on it shows, even if its name leads to loopback.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from runtime.hosts import is_loopback

_bearer = HTTPBearer(auto_error=False, description="The value of the setting `admin.token`.")
_Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]

Rule = Callable[..., Awaitable[None]]


def readers(token: str | None) -> Rule:
    """A dependency that lets pass who may read: with a token, who gives it."""

    async def check(given: _Given) -> None:
        if token is not None:
            _check_token(token, given)

    return check


def operators(token: str | None) -> Rule:
    """A dependency that lets pass who may act: with a token, who gives it, else local programs."""

    async def check(request: Request, given: _Given) -> None:
        if token is not None:
            _check_token(token, given)
        elif not _is_local(request):
            detail = (
                "without admin.token only programs on the node itself may do this, "
                "by its loopback address"
            )
            raise HTTPException(HTTPStatus.FORBIDDEN, detail)

    return check


def _check_token(token: str, given: HTTPAuthorizationCredentials | None) -> None:
    if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
        said = "no token was given" if given is None else "the token is not the daemon's"
        raise HTTPException(
            HTTPStatus.UNAUTHORIZED,
            f"{said}: send `Authorization: Bearer TOKEN` with the value of admin.token",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_local(request: Request) -> bool:
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    return (
        request.client is not None
        and is_loopback(request.client.host)
        and is_loopback(urlsplit(f"//{host}").hostname or "")
        and (origin is None or urlsplit(origin).netloc == host)
    )
