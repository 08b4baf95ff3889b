"""Which pool, given the grid's choice and what pools expect."""

from __future__ import annotations

from typing import Any

import pytest

from router.forecast import Forecast
from router.pools.feedback import Outlook, Settled, settle
from router.pools.grid import Axis, Features, GridChoice, Strategy

NAMES = ("fast", "mid", "slow")


def expects(first: float, step: float = 0.01, decode: float = 0.0) -> Outlook:
    return Outlook(Forecast(worker="1.0", wait_s=first, step_s=step, decode_s=decode))


AWAY = Outlook(away="no engine of 'm' serves in it")
SILENT = Outlook(unknown="its router did not answer")
BUSY = Outlook(Forecast(why="all are busy"), away="all are busy")


def settled(
    *outlooks: Outlook,
    pool: int = 1,
    override: int | None = None,
    ttft: float | None = 1000,
    itl: float | None = None,
    **more: Any,
) -> Settled:
    """Margin 0.5 s; the grid chose `pool`."""
    margin_s = more.pop("margin_s", 0.5)
    strategy = Strategy(
        more.pop("role", "aggregated"),
        NAMES[: len(outlooks)],
        tuple(range(len(outlooks))),
        (Axis("ttft_ms", 0, 3000, 1),),
        [0],
        retries=more.pop("retries", False),
    )
    choice = GridChoice(pool, (0,), override)
    features = Features(100, ttft, itl)
    return settle(strategy, choice, features, dict(enumerate(outlooks)), margin_s)


@pytest.mark.parametrize(
    ("outlooks", "order", "reason"),
    [
        ((expects(0.1), expects(0.5), expects(0.1)), (1,), "grid"),  # saves too little
        ((expects(0.6), expects(1.2), expects(0.9)), (0,), "target"),  # the cheaper that keeps it
        ((expects(1.1), expects(1.2), expects(1.3)), (1,), "grid"),  # all miss it
        ((expects(1.1), expects(2.2), expects(1.3)), (0,), "saves"),
        ((expects(0.1), expects(0.9), expects(0.2)), (0,), "saves"),
        ((AWAY, expects(0.9), AWAY), (1,), "grid"),
        ((expects(0.6), AWAY, expects(0.2)), (2,), "away"),
        ((expects(1.6), BUSY, expects(0.9)), (2,), "away"),
        ((AWAY, AWAY, AWAY), (), "away"),
        ((expects(0.1), SILENT, expects(0.1)), (1,), "grid"),
        ((SILENT, expects(5.0), SILENT), (1,), "grid"),
    ],
)
def test_the_grid_s_choice_stands_unless_there_is_a_reason(
    outlooks: tuple[Outlook, ...], order: tuple[int, ...], reason: str
) -> None:
    found = settled(*outlooks)
    assert (found.order, found.reason) == (order, reason)
    assert found.reason != "target" or "mid would miss its target" in found.why


def test_nothing_is_saved_at_the_price_of_a_target() -> None:
    cheap_but_slow = expects(0.0, step=0.2)
    mine = expects(0.9, step=0.01, decode=3.0)
    assert settled(cheap_but_slow, mine, itl=50).reason == "grid"
    assert settled(cheap_but_slow, mine, itl=None).reason == "saves"
    both_miss = expects(0.9, step=0.3, decode=3.0)
    assert settled(cheap_but_slow, both_miss, itl=50).reason == "saves"


def test_each_role_has_its_own_target() -> None:
    late, slow = expects(1.4, step=0.01), expects(1.0, step=0.09)
    assert settled(slow, late, role="prefill", itl=50).reason == "target"
    assert settled(late, slow, role="decode", itl=50).reason == "target"
    assert settled(slow, late, role="decode", itl=50).reason == "grid"
    assert settled(slow, late, role="prefill", ttft=None).reason == "grid"


def test_an_override_is_an_order_as_long_as_it_can_be_followed() -> None:
    assert settled(expects(0.1), expects(9.0), override=0).reason == "override"
    assert settled(expects(0.1), AWAY, override=0).order == (0,)


def test_without_feedback_only_those_away_are_skipped() -> None:
    here = Outlook()
    assert settled(here, here, here, pool=2, margin_s=None, retries=True).order == (2, 1, 0)
    assert settled(here, AWAY, here, pool=2, margin_s=None, retries=True).order == (2, 0)
    found = settled(here, here, AWAY, pool=2, margin_s=None)
    assert (found.order, found.reason, found.why) == ((), "away", AWAY.away)


def test_retries_follow_the_pool_that_was_taken_instead() -> None:
    found = settled(expects(0.2), expects(3.0), expects(0.1), pool=1, retries=True)
    assert found.order == (2, 1, 0)
    assert settled(expects(0.2), AWAY, expects(0.1), pool=1, retries=True).order == (2, 0)
