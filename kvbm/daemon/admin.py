"""The admin REST API: is the node alive and ready, what is in its tiers, who is connected.

Read-only and served from the daemon's own event loop, by default on loopback. Errors are RFC 9457
problems. Handlers only read snapshots of the `NodeView`, so a request never waits for a tier.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import socket
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kvbm.daemon.metrics import CONTENT_TYPE, Metrics
from kvbm.daemon.view import NodeView, QueueStatus, SessionStatus
from storage_tiers.base import RecoveryReport, TierUsage

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 2
_CONNECTIONS_MAX: Final = 64
_POLL_S: Final = 0.005


class AdminError(Exception):
    """The admin server cannot listen; the message says where, why, and which setting to change."""


class Version(BaseModel):
    name: str
    version: str
    node: str
    python: str


class Ready(BaseModel):
    ready: bool
    checks: dict[str, str]  # "ok" or the reason


class TierReport(BaseModel):
    """Counters run from the tier's opening; lookups from the daemon's start."""

    tier: str
    mover: str
    capacity_bytes: int
    used_bytes: int
    chunks: int
    hits: int
    misses: int
    stored_bytes: int
    loaded_bytes: int
    evictions: dict[str, int]
    corrupt: int
    errors: dict[str, int]

    @classmethod
    def of(cls, usage: TierUsage, metrics: Metrics) -> TierReport:
        return cls(
            tier=usage.tier.value,
            mover=usage.mover,
            capacity_bytes=usage.capacity_bytes,
            used_bytes=usage.used_bytes,
            chunks=usage.chunks,
            hits=metrics.lookups(usage.tier, "hit"),
            misses=metrics.lookups(usage.tier, "miss"),
            stored_bytes=usage.stored_bytes_total,
            loaded_bytes=usage.loaded_bytes_total,
            evictions={str(reason): count for reason, count in usage.evictions_total.items()},
            corrupt=usage.corrupt_total,
            errors=usage.errors_total,
        )


class Tiers(BaseModel):
    node: str
    tiers: list[TierReport]
    queues: list[QueueStatus]


class Recovery(BaseModel):
    reports: list[RecoveryReport]


class Sessions(BaseModel):
    sessions: list[SessionStatus]


def create_app(view: NodeView, metrics: Metrics) -> FastAPI:
    """The API over one node; attaches `view` to `metrics`, so call it once for each."""
    metrics.attach(view)
    app = FastAPI(
        title="kvbm-daemon", version=metrics.version, docs_url=None, redoc_url=None
    )  # the interactive pages would load scripts from elsewhere
    _add_probes(app, view, metrics)
    _add_reports(app, view, metrics)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(Exception, _on_bug)
    return app


def _add_probes(app: FastAPI, view: NodeView, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The event loop turns."""
        return {"status": "alive"}

    @app.get("/readyz", response_model=Ready, responses={503: {"description": "Not ready."}})
    async def readyz(request: Request) -> Response:
        """Every check passes; otherwise 503 with the reasons."""
        found = view.readiness()
        checks = {name: reason or "ok" for name, reason in found.items()}
        failed = [f"{name}: {reason}" for name, reason in found.items() if reason is not None]
        if failed:
            return problem(
                request, HTTPStatus.SERVICE_UNAVAILABLE, "; ".join(failed), checks=checks
            )
        return JSONResponse(Ready(ready=True, checks=checks).model_dump())

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus's text format; docs/METRICS.md lists the names."""
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    @app.get("/version")
    async def version() -> Version:
        return Version(
            name="kvbm-daemon",
            version=metrics.version,
            node=metrics.node,
            python=platform.python_version(),
        )


def _add_reports(app: FastAPI, view: NodeView, metrics: Metrics) -> None:
    @app.get("/v1/tiers")
    async def tiers() -> Tiers:
        """What each tier holds and has done, and what waits between them."""
        return Tiers(
            node=metrics.node,
            tiers=[TierReport.of(usage, metrics) for usage in view.tiers()],
            queues=list(view.queues()),
        )

    @app.get("/v1/recovery")
    async def recovery() -> Recovery:
        """What each tier found when it opened."""
        return Recovery(reports=list(view.recovery()))

    @app.get("/v1/sessions")
    async def sessions() -> Sessions:
        """The engines connected, one entry for each of their connections."""
        return Sessions(sessions=list(view.sessions()))


# -- errors -------------------------------------------------------------------------------


def problem(
    request: Request,
    status: HTTPStatus,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Response:
    """An RFC 9457 problem of no type but its status."""
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": detail,
        "instance": request.url.path,
        **members,
    }
    return JSONResponse(body, status.value, headers=headers, media_type="application/problem+json")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(request, HTTPStatus(error.status_code), error.detail, headers=error.headers)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
    return problem(request, HTTPStatus.BAD_REQUEST, "; ".join(faults))


async def _on_bug(request: Request, _: Exception) -> Response:
    detail = "the daemon failed to answer; its log says why"
    return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, detail)


# -- serving ------------------------------------------------------------------------------


class _Uvicorn(uvicorn.Server):
    """Leaves the process's signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class AdminServer:
    """Serves an app in the running event loop, between `start` and `stop`."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                limit_concurrency=_CONNECTIONS_MAX,
                timeout_graceful_shutdown=STOP_TIMEOUT_S,
            )
        )

    @property
    def port(self) -> int:
        """The port it listens on, also when any free one was asked for."""
        return self._port

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def start(self) -> None:
        """Return when requests are answered; raises AdminError."""
        assert self._task is None, "started already"
        self._socket = await _listen(self._host, self._port)
        self._port = self._socket.getsockname()[1]
        self._task = asyncio.create_task(
            self._server.serve(sockets=[self._socket]), name="admin-server"
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                while not self._server.started and not self._task.done():
                    await asyncio.sleep(_POLL_S)
        if not self._server.started and not self._task.done():
            self._task.cancel()
            raise AdminError(f"the admin server on {self.url} did not start in {START_TIMEOUT_S} s")
        if self._task.done():
            await self._task
            raise AdminError(f"the admin server on {self.url} ended as it started")

    async def stop(self) -> None:
        """Answer what was asked already, briefly, and end. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        self._server.should_exit = True
        try:
            await task
        finally:
            if self._socket is not None:
                self._socket.close()


async def _listen(host: str, port: int) -> socket.socket:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise AdminError(
            f"the admin server cannot listen on {host} port {port}: {error.strerror or error}; "
            "change admin.host or admin.port (0 takes any free port)"
        ) from error
