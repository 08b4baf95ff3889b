"""A page that shows a program live, without a build step, and the stream that feeds it.

The page is static (`page/`); what it shows comes as server-sent events from `/v1/dashboard`: once
`hello`, with the figures of the last minutes, then a `state` each second. Figures are counters and
gauges by name; the page makes rates of them. A state is put together only while somebody watches,
once for all who do, and a watcher that is slow misses states instead of collecting them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec
import structlog
from fastapi import APIRouter, FastAPI
from fastapi.responses import RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

INTERVAL_S: Final = 1.0
HISTORY_S: Final = 600
WATCHERS_MAX: Final = 16

_PAGE: Final = Path(__file__).parent / "page"
_HEADERS: Final = {
    # Everything the page needs comes from here: it works without any other network.
    "content-security-policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'self'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

_log = structlog.get_logger("runtime.web")


class Source(Protocol):
    """What a page is about. All is called on the event loop, and costs what a scrape may."""

    @property
    def kind(self) -> Literal["node", "fleet"]: ...

    @property
    def name(self) -> str: ...

    def figures(self) -> Mapping[str, float]:
        """What is drawn over time: counters as they are, and gauges."""
        ...

    def state(self) -> Mapping[str, Any]:
        """What is shown as it is now: values that JSON has, dataclasses, pydantic's models."""
        ...

    def failed(self) -> None:
        """It could not be shown, by a fault of ours: to be counted."""
        ...


class Dashboard:
    """`run` until cancelled, or be `running`; then those who watch are sent away."""

    def __init__(
        self,
        source: Source,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._source = source
        self._interval_s = interval_s
        self._clock = clock
        self._kept: deque[tuple[float, Mapping[str, float]]] = deque(
            maxlen=max(1, round(HISTORY_S / interval_s))
        )
        self._watchers = 0
        self._latest = b""
        self._is_new = asyncio.Event()  # set, and replaced, with each state
        self._is_over = False

    @property
    def is_watched(self) -> bool:
        return self._watchers > 0

    async def run(self) -> None:
        try:
            while True:
                self._tick()
                await asyncio.sleep(self._interval_s)
        finally:
            self._is_over = True
            self._is_new.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.run(), name="dashboard")
        try:
            yield
        finally:
            task.cancel()

    def add_to(self, app: FastAPI, dependencies: Sequence[Any]) -> None:
        """The page at `/dashboard/`; its stream below /v1, under the app's rules for readers."""
        app.mount("/dashboard", _Page(directory=_PAGE, html=True), name="dashboard")

        @app.get("/", include_in_schema=False)
        async def home() -> Response:
            return RedirectResponse("dashboard/")  # relative: it may be served below a path

        router = APIRouter(tags=["dashboard"], dependencies=list(dependencies))

        @router.get("/dashboard", response_class=StreamingResponse)
        async def stream() -> Response:
            """What the dashboard shows, as server-sent events: `hello`, then a `state` a second."""
            if self._watchers >= WATCHERS_MAX:
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, f"{WATCHERS_MAX} watch already")
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            return StreamingResponse(self.watch(), 200, headers, "text/event-stream")

        app.include_router(router, prefix="/v1")

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Events, as they are sent."""
        self._watchers += 1
        try:
            yield _event("hello", self._hello())
            yield _event("state", self._state())
            while True:
                await self._is_new.wait()
                if self._is_over:
                    return
                yield self._latest
        finally:
            self._watchers -= 1

    def _tick(self) -> None:
        try:
            self._kept.append((self._clock(), self._source.figures()))
            if not self._watchers:
                return
            self._latest = _event("state", self._state())
        except Exception:  # noqa: BLE001 - what a page shows is not worth the program
            _log.exception("dashboard_failed")
            self._source.failed()
            return
        is_new, self._is_new = self._is_new, asyncio.Event()
        is_new.set()

    def _hello(self) -> dict[str, Any]:
        names = {name for _, figures in self._kept for name in figures}
        return {
            "kind": self._source.kind,
            "name": self._source.name,
            "interval_s": self._interval_s,
            "at": [at for at, _ in self._kept],
            "figures": {
                name: [figures.get(name) for _, figures in self._kept] for name in sorted(names)
            },
        }

    def _state(self) -> dict[str, Any]:
        at, figures = self._kept[-1] if self._kept else (self._clock(), self._source.figures())
        return {"at": at, "figures": figures, "state": self._source.state()}


class _Page(StaticFiles):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await super().__call__(scope, receive, with_headers)


def _event(name: str, data: object) -> bytes:
    encoded = msgspec.json.encode(data, enc_hook=_plain)  # infinities are null in it
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encoded)


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump()
    raise NotImplementedError(f"a {type(value).__name__} is not to be shown")
