"""The admin REST API: is the node alive and ready, what is in its tiers, who is connected.

Served from the daemon's own event loop, by default on loopback. Handlers here only read snapshots
of the `NodeView`, so a request never waits for a tier; `admin_actions` has those that act.
Errors are RFC 9457 problems.
"""

from __future__ import annotations

import platform
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from kvbm.daemon.admin_actions import (
    KEY_PATTERN,
    TOKEN_SETTING,
    ScrubbedTier,
    actions_router,
)
from kvbm.daemon.metrics import Metrics
from kvbm.daemon.receipts import receipts_router
from kvbm.daemon.reports import (
    ChunkReport,
    Node,
    Peers,
    Policies,
    QuarantinedReport,
    QuarantineReport,
    Ready,
    Recovery,
    Scrub,
    Sessions,
    Stream,
    TierReport,
    Tiers,
    Version,
)
from kvbm.daemon.sizes import sizes_router
from kvbm.daemon.view import DrainStatus, NodeActions, NodeView, NoScrubError
from runtime.metrics import CONTENT_TYPE
from runtime.web.access import readers
from runtime.web.dashboard import Dashboard
from runtime.web.problems import described, handle_problems, problem
from storage_tiers.base import KEY_BYTES, Key, TierName

NAME: Final = "kvbm-daemon"

KeyHex = Annotated[
    str,
    InPath(
        pattern=KEY_PATTERN,
        description=f"The chunk's key, {2 * KEY_BYTES} hexadecimal digits.",
    ),
]


def create_app(
    view: NodeView,
    actions: NodeActions,
    metrics: Metrics,
    token: str | None = None,
    dashboard: Dashboard | None = None,
) -> FastAPI:
    """The API over one node; attaches `view` to `metrics`, so call it once for each.

    With a token, every request below /v1 must give it.
    """
    metrics.attach(view)
    app = FastAPI(
        title=NAME, version=metrics.version, docs_url=None, redoc_url=None
    )  # the interactive pages would load scripts from elsewhere
    handle_problems(app, NAME)
    _add_probes(app, view, metrics)
    options: dict[str, Any] = {
        "dependencies": [Depends(readers(token, TOKEN_SETTING))],
        "responses": {
            "401": described("`admin.token` is set and was not given."),
            "default": described("Any other error."),
        },
    }
    routers = (
        _tiers(view, metrics),
        _node(view, metrics),
        receipts_router(view),
        sizes_router(view),
    )
    for router in (*routers, actions_router(actions, token)):
        app.include_router(router, prefix="/v1", **options)
    if dashboard is not None:
        dashboard.add_to(app, options["dependencies"])
    return app


def _add_probes(app: FastAPI, view: NodeView, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The event loop turns."""
        return {"status": "alive"}

    @app.get("/readyz", response_model=Ready, responses={503: described("Not ready, and why.")})
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

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus's text format; docs/METRICS.md lists the names."""
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    @app.get("/version")
    async def version() -> Version:
        """What runs, and on which node."""
        return Version(
            name=NAME,
            version=metrics.version,
            node=metrics.node,
            python=platform.python_version(),
        )


def _tiers(view: NodeView, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["tiers"])

    @router.get("/tiers")
    async def tiers() -> Tiers:
        """What each tier holds and has done, how fast, and what waits between them."""
        rates = view.rates()
        return Tiers(
            node=metrics.node,
            tiers=[TierReport.of(u, rates.get(u.tier, ()), metrics) for u in view.tiers()],
            queues=list(view.queues()),
        )

    @router.get("/recovery")
    async def recovery() -> Recovery:
        """What each tier found when it opened."""
        return Recovery(reports=list(view.recovery()))

    @router.get("/policies")
    async def policies() -> Policies:
        """What each tier takes in, and what it gives up first."""
        return Policies(policies=list(view.policies()))

    @router.get("/chunks/{key}", responses={404: described("No tier of this node has it.")})
    async def chunk(key: KeyHex) -> ChunkReport:
        """Where a chunk is kept, and what is known of it there."""
        wanted = Key(bytes.fromhex(key))
        found = view.chunk(wanted)
        if not found.residencies:
            coming = ", but it is on its way into host memory" if found.is_coming else ""
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no tier of this node has {key}{coming}")
        return ChunkReport.of(wanted, found)

    @router.get("/quarantine")
    async def quarantine() -> QuarantineReport:
        """Chunks taken out of use because their bytes were wrong: the latest of them."""
        found = view.quarantine()
        entries = [QuarantinedReport.of(entry) for entry in found.entries]
        return QuarantineReport(total=found.total, entries=entries)

    return router


def _node(view: NodeView, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["node"])

    @router.get("/node")
    async def node() -> Node:
        """The process and where it meets the rest of the machine."""
        return Node(
            name=NAME,
            version=metrics.version,
            node=metrics.node,
            process=view.status(),
            drain=view.drain_status(),
            handover=view.handover_status(),
        )

    @router.get("/sessions")
    async def sessions() -> Sessions:
        """The engines connected, one entry for each of their connections."""
        return Sessions(sessions=list(view.sessions()))

    @router.get("/stream")
    async def stream() -> Stream:
        """What routers are told: how far it is, what is announced, whose engines are heard."""
        return Stream(stream=view.stream())

    @router.get("/peers")
    async def peers() -> Peers:
        """Other nodes whose host memory may be read, and who reads this one's."""
        readers, lent_bytes = view.peer_readers()
        return Peers(peers=list(view.peer_list()), readers=list(readers), lent_bytes=lent_bytes)

    @router.get("/drain")
    async def drain() -> DrainStatus:
        """Whether the node is drained, and how far it is."""
        return view.drain_status()

    @router.get("/scrub")
    async def scrub(tier: ScrubbedTier = TierName.DRAM) -> Scrub:
        """How far the latest pass over a tier is that was asked for, and what it found."""
        try:
            return Scrub(latest=view.scrub_status(tier))
        except NoScrubError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from None

    return router
