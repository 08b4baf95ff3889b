"""What operators have a node do over the admin API: drain, resume, flush, scrub, quarantine.

Each request is bounded in time, may be repeated, and leaves a line in the log.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Final

import structlog
from fastapi import APIRouter, Depends, Query, Request
from starlette.exceptions import HTTPException

from kvbm.daemon.view import (
    ClearStatus,
    DrainStatus,
    FlushStatus,
    NodeActions,
    NoScrubError,
    ScrubStatus,
)
from runtime.web.access import operators
from runtime.web.problems import described
from storage_tiers.base import KEY_BYTES, Key, TierName

DEADLINE_S_MAX: Final = 600.0
FLUSH_S: Final = 30.0
SCRUB_S: Final = 30.0
TOKEN_SETTING: Final = "admin.token"  # noqa: S105 (a name)

_log = structlog.get_logger("kvbm.admin")

KEY_PATTERN: Final = f"^[0-9A-Fa-f]{{{2 * KEY_BYTES}}}$"

ScrubbedTier = Annotated[TierName, Query(description="The tier to scrub.")]
Deadline = Annotated[
    float, Query(ge=0, le=DEADLINE_S_MAX, description="Seconds to wait for the end, at most.")
]


def actions_router(actions: NodeActions, token: str | None) -> APIRouter:
    """The POST routes; who may use them is checked here."""
    router = APIRouter(
        tags=["actions"],
        dependencies=[Depends(operators(token, TOKEN_SETTING))],
        responses={403: described("Without `admin.token`, for programs on the node alone.")},
    )

    @router.post("/drain")
    async def drain(request: Request) -> DrainStatus:
        """Lend engines no more slots to store into, and write down what is in host memory alone.

        The latest used goes first; engines go on loading. Asked again it tells how far it is; it
        ends with `/v1/resume` or the daemon.
        """
        _note(request)
        return actions.drain()

    @router.post("/resume")
    async def resume(request: Request) -> DrainStatus:
        """End a drain: engines may store again."""
        _note(request)
        return actions.resume()

    @router.post("/flush")
    async def flush(request: Request, deadline_s: Deadline = FLUSH_S) -> FlushStatus:
        """Wait until nothing is on its way to a lower tier."""
        _note(request)
        return await actions.flush(deadline_s)

    @router.post("/scrub")
    async def scrub(
        request: Request, tier: ScrubbedTier = TierName.DRAM, deadline_s: Deadline = SCRUB_S
    ) -> ScrubStatus:
        """Check every chunk in host memory (G2) or on the SSD (G3) against its checksum now.

        Joins a pass that was asked for before and goes on; a pass goes on after the deadline.
        """
        _note(request)
        try:
            return await actions.scrub(tier, deadline_s)
        except NoScrubError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from None

    @router.post("/quarantine/clear")
    async def clear(
        request: Request,
        key: Annotated[
            str | None, Query(pattern=KEY_PATTERN, description="By default all.")
        ] = None,
    ) -> ClearStatus:
        """Take chunks off the list of those with wrong bytes, and use their places again."""
        _note(request)
        return await actions.clear_quarantine(None if key is None else Key(bytes.fromhex(key)))

    return router


def _note(request: Request) -> None:
    client = request.client.host if request.client is not None else "unknown"
    _log.info("admin_action", path=request.url.path, client=client)
