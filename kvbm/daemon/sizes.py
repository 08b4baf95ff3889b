"""The admin API's routes about sizes: what tiers would find at others than they have."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.exceptions import HTTPException

from kvbm.daemon.view import BusyError, CurveStatus, NodeView, SizeAnswer, UnanswerableError
from runtime.units import parse_size
from runtime.web.problems import described
from storage_tiers.base import TierName

SIZE_CHARS_MAX = 40

AskedTier = Annotated[TierName, Query(description="The tier.")]
Size = Annotated[
    str | None, Query(max_length=SIZE_CHARS_MAX, description="What it would have, as `320GiB`.")
]
More = Annotated[
    str | None,
    Query(
        max_length=SIZE_CHARS_MAX,
        description="What it would have more than now, as `256GiB`; `-64GiB`: less.",
    ),
]


def sizes_router(view: NodeView) -> APIRouter:
    router = APIRouter(tags=["sizes"])

    @router.get("/curve", responses={404: described("Lookups are not watched.")})
    async def curve() -> CurveStatus:
        """What an LRU cache of each size would find of what is asked for, and what was found."""
        found = view.curve()
        if found is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "what_if.enabled is false")
        return found

    @router.get(
        "/what-if",
        responses={
            409: described("It cannot be told, and why."),
            503: described("Another such question is being answered."),
        },
    )
    async def what_if(tier: AskedTier, size: Size = None, add: More = None) -> SizeAnswer:
        """What a tier of another size would change, by the latest lookups. Takes seconds."""
        if (size is None) == (add is None):
            raise HTTPException(HTTPStatus.BAD_REQUEST, "give one of size and add")
        try:
            return await view.what_if(tier, None if size is None else parse_size(size), _more(add))
        except ValueError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
        except UnanswerableError as error:
            raise HTTPException(HTTPStatus.CONFLICT, str(error)) from None
        except BusyError as error:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None

    return router


def _more(add: str | None) -> int:
    """Raises ValueError."""
    given = (add or "0").strip()
    return -parse_size(given[1:]) if given.startswith("-") else parse_size(given.lstrip("+"))
