"""The frontend's HTTP application: OpenAI's routes, and what operators and probes ask."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Final

from starlette.middleware.cors import CORSMiddleware

from frontend import headers as names
from frontend.exchanges import Exchanges
from frontend.gate import Receive, Scope, Send
from frontend.pages import Pages
from runtime.web.server import Asgi

_EXPOSED: Final = ("x-request-id", "x-kvbm-worker", "x-kvbm-cached-tokens", "retry-after")


def make_app(exchanges: Exchanges, pages: Pages, cors_origins: Sequence[str] = ()) -> Asgi:
    """`cors_origins`: whose web pages browsers let ask."""
    app = Application(exchanges, pages)
    if not cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=cors_origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=_EXPOSED,
    )


class Application:
    """ASGI: requests that engines answer go straight to their exchange, all others to `pages`.

    The framework's middleware would be some microseconds for each request and each event.
    """

    def __init__(self, exchanges: Exchanges, pages: Pages) -> None:
        self._posted = exchanges.posted
        self._pages = pages.app(exchanges)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._posted.get(scope.get("path", ""))
        if exchange is not None and scope.get("method") == "POST":
            await exchange(scope, receive, send)
        else:
            await self._pages(scope, receive, _with_id(scope, send))


def _with_id(scope: Scope, send: Send) -> Send:
    """Gives back the request's id with what is not an exchange's answer."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = message["headers"]
            if names.first(headers, names.REQUEST_ID) is None:
                given = names.request_id(scope["headers"]).encode()
                message = {**message, "headers": [*headers, (names.REQUEST_ID, given)]}
        await send(message)

    return sending
