"""`kvbm what-if`: what another size of a tier would change."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvbm.cli.client import AdminClient, Json
from kvbm.cli.options import DEFAULT_URL, AsJson, Token, Url
from kvbm.cli.output import age, console, print_json, size, table
from storage_tiers.base import TierName

WAIT_S: Final = 60.0

Tier = Annotated[TierName, typer.Option("--tier", help="The tier that would have another size.")]
Add = Annotated[
    str | None, typer.Option("--add", metavar="SIZE", help="So much more than now, as 256GiB.")
]
Sized = Annotated[
    str | None, typer.Option("--size", metavar="SIZE", help="So much in all, as 320GiB.")
]


def what_if(
    tier: Tier = TierName.DRAM,
    add: Add = None,
    to: Sized = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """What a tier of another size would find, and save, by the latest lookups."""
    if (add is None) == (to is None):
        raise typer.BadParameter("give one of --add and --size")
    asked = {"add": add} if to is None else {"size": to}
    with AdminClient(url, token) as client:
        found = client.get("/v1/what-if", {"tier": tier.value, **asked}, wait_s=WAIT_S)
    if as_json:
        print_json(found)
        return
    out = console()
    for line in _lines(found):
        out.print(line, soft_wrap=True)
    for tenant, gain in found["answer"]["by_tenant"].items():
        out.print(f"  of it {tenant}: {_percent(gain, 'points', '+')}")
    flows = found["answer"]["flows"]
    if not flows:
        return
    shown = table("now from", "then from", ">chunks/s", ">tokens/s", ">bytes/s", ">saves s/s")
    for flow in flows:
        shown.add_row(
            *(flow["source"], flow["target"]),
            *(_around(flow[name]) for name in ("chunks", "tokens")),
            size(flow["bytes"]["value"]),
            "not measured" if flow["saved_s"] is None else _around(flow["saved_s"]),
        )
    out.print(shown)


def _lines(found: Json) -> list[str]:
    answer, sample = found["answer"], found["sample"]
    rate = sample["rate"]
    by = (
        f"by {answer['uses']} sampled lookups of the last {age(answer['seconds'])} "
        f"({answer['asked_per_s']:.3g} chunks/s asked for; 1 key in {1 / rate:.3g} is sampled)"
    )
    now, then = _percent(answer["hit_now"]), _percent(answer["hit_then"])
    lru = f"{_percent(found['lru_now'])} now, {_percent(found['lru_then'])} then"
    return [
        f"{answer['tier']} {size(answer['now_bytes'])} -> {size(answer['then_bytes'])}, {by}",
        f"found in any tier: {now} now, {then} then: {_percent(answer['gain'], 'points', '+')}",
        f"measured now: {100 * found['found']:.1f} %; an LRU cache would find {lru}",
    ]


def _percent(estimate: Json, unit: str = "%", sign: str = "") -> str:
    return f"{100 * estimate['value']:{sign}.1f} ± {100 * estimate['error']:.1f} {unit}"


def _around(estimate: Json) -> str:
    return f"{estimate['value']:.3g} ± {estimate['error']:.2g}"
