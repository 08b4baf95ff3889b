"""The place of an application that is not there yet: its server answers from the first moment on.

/live (and /healthz) say that the process is there; all else is 503 with what is waited for, in
words of the program's own. Once the application is set, everything goes to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec

RETRY_AFTER_S: Final = 5
_ALIVE: Final = frozenset({"/live", "/healthz"})

Body = Callable[[str, str], bytes]
"""Of a path, and of what is waited for: JSON."""


class Starting:
    """ASGI."""

    def __init__(self, why: str, body: Body | None = None) -> None:
        self.why = why
        self.app: Callable[[Any, Any, Any], Awaitable[None]] | None = None
        self._body = _problem if body is None else body

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope.get("path") in _ALIVE:
            await _answer(send, HTTPStatus.OK, b'{"status":"alive"}')
        else:
            body = self._body(scope.get("path", ""), self.why)
            await _answer(send, HTTPStatus.SERVICE_UNAVAILABLE, body)


async def _answer(send: Any, status: HTTPStatus, body: bytes) -> None:
    # Its body is not read, so that the connection is of no more use.
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _problem(path: str, why: str) -> bytes:
    """As `runtime.web.problems` has it."""
    return msgspec.json.encode(
        {
            "type": "about:blank",
            "title": HTTPStatus.SERVICE_UNAVAILABLE.phrase,
            "status": int(HTTPStatus.SERVICE_UNAVAILABLE),
            "detail": why,
            "instance": path,
            "kind": "not-ready",
            "checks": {"start": why},
        }
    )
