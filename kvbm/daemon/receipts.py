"""The admin API's routes about requests: their receipts, and what loading is judged by."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, Query
from fastapi import Path as InPath
from starlette.exceptions import HTTPException

from kvbm.daemon.receipt_reports import Governor, ReceiptReport, Receipts
from kvbm.daemon.view import NodeView
from kvbm.protocol import REQUEST_CHARS_MAX
from runtime.web.problems import described

LIMIT_MAX: Final = 1000
NAMES_SHOWN: Final = 5

Limit = Annotated[int, Query(ge=1, le=LIMIT_MAX, description="How many, at most.")]
RequestName = Annotated[
    str,
    InPath(
        min_length=1,
        max_length=REQUEST_CHARS_MAX,
        description="The request's id, or what it begins with, or a part of it.",
    ),
]


def receipts_router(view: NodeView) -> APIRouter:
    router = APIRouter(tags=["requests"])

    @router.get("/governor")
    async def governor() -> Governor:
        """What tiers and engines were measured to take, by which loads are judged."""
        return Governor.of(view.governor())

    @router.get("/receipts")
    async def receipts(limit: Limit = 20) -> Receipts:
        """The latest lookups, newest first: what hit where, and why the rest missed."""
        return _report(view, None, limit)

    @router.get(
        "/receipts/{request_id:path}",
        responses={404: described("No receipt."), 409: described("More than one request.")},
    )
    async def receipt(request_id: RequestName) -> Receipts:
        """One request's lookups, newest first: a request that was preempted has several."""
        found = _report(view, request_id, LIMIT_MAX)
        names = list(dict.fromkeys(receipt.request for receipt in found.receipts))
        if not names:
            raise HTTPException(
                HTTPStatus.NOT_FOUND,
                f"no receipt of a request named {request_id!r}: the latest {found.kept} lookups "
                "are kept; /v1/receipts lists them",
            )
        if len(names) > 1:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            raise HTTPException(
                HTTPStatus.CONFLICT,
                f"{request_id!r} names {len(names)} requests: "
                f"{', '.join(names[:NAMES_SHOWN])}{more}",
            )
        return found

    return router


def _report(view: NodeView, request: str | None, limit: int) -> Receipts:
    found = view.receipts(request, limit)
    return Receipts(
        kept=found.kept,
        kept_bytes=found.kept_bytes,
        receipts=[ReceiptReport.of(receipt) for receipt in found.receipts[:limit]],
    )
