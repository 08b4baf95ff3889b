"""What probes and Prometheus ask of a program: whether it is alive, ready, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from runtime.metrics import CONTENT_TYPE
from runtime.web.problems import described, problem

Checks = Callable[[], Mapping[str, str | None]]
"""By name, why each does not pass."""


def add_probes(app: FastAPI, checks: Checks, render: Callable[[], bytes], page: str) -> None:
    """`/live`, `/ready` and `/health`, `/metrics`. `page` lists the metrics' names."""

    @app.get("/live")
    async def live() -> dict[str, str]:
        """The event loop turns."""
        return {"status": "alive"}

    async def ready(request: Request) -> Response:
        """Every check passes; otherwise 503 with the reasons."""
        found = checks()
        told = {name: why or "ok" for name, why in found.items()}
        failed = [f"{name}: {why}" for name, why in found.items() if why is not None]
        if failed:
            status = HTTPStatus.SERVICE_UNAVAILABLE
            return problem(request, status, "; ".join(failed), kind="not-ready", checks=told)
        return JSONResponse({"status": "ready", "checks": told})

    for path in ("/ready", "/health"):
        app.get(path, response_class=Response, responses={503: described("Not ready, and why.")})(
            ready
        )

    async def prometheus() -> Response:
        return Response(render(), headers={"content-type": CONTENT_TYPE})

    prometheus.__doc__ = f"Prometheus's text format; {page} lists the names."
    app.get("/metrics", response_class=PlainTextResponse)(prometheus)
