"""Who may ask a program's API: everybody on the node, or whoever has the token.

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

_bearer = HTTPBearer(auto_error=False, description="The token of the program's settings.")
_Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]

Rule = Callable[..., Awaitable[None]]


def readers(token: str | None, setting: str) -> Rule:
    """A dependency that lets pass who may read: with a token, who gives it.

    `setting` names the one the token is in, for what those are told who are not let pass.
    """

    async def check(given: _Given) -> None:
        if token is not None:
            _check_token(token, setting, given)

    return check


def operators(token: str | None, setting: str) -> Rule:
    """A dependency that lets pass who may act: with a token, who gives it, else local programs."""

    async def check(request: Request, given: _Given) -> None:
        if token is not None:
            _check_token(token, setting, given)
        elif not _is_local(request):
            detail = (
                f"without {setting} only programs on the node itself may do this, "
                "by its loopback address"
            )
            raise HTTPException(HTTPStatus.FORBIDDEN, detail)

    return check


def _check_token(token: str, setting: str, given: HTTPAuthorizationCredentials | None) -> None:
    if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
        said = "no token was given" if given is None else "the token is another"
        raise HTTPException(
            HTTPStatus.UNAUTHORIZED,
            f"{said}: send `Authorization: Bearer TOKEN` with the value of {setting}",
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
