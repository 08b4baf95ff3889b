"""`kvbm why`: what of a request was loaded from where, and why the rest was computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Final
from urllib.parse import quote

import typer

from kvbm.cli.client import AdminClient, Json
from kvbm.cli.options import DEFAULT_URL, AsJson, Token, Url
from kvbm.cli.output import age, console, moment, print_json, size, table

_TIERS: Final = {
    "G2": "host memory",
    "G3": "the SSD",
    "G4": "S3",
    "peer": "another node's host memory",
}
_REMOVED: Final = {
    "capacity": "were evicted from {} to make room",
    "age": "were deleted from {} because of their age",
    "corrupt": "were taken out of {} because they were damaged",
    "quota": "were removed from {} because their tenant had used up its quota",
    "requested": "were removed from {} on request",
}
_LATE: Final = {
    "answer": "It did not wait for the daemon's answer any longer.",
    "onboard": "It did not wait any longer for what was still on its way.",
}

Request = Annotated[
    str | None,
    typer.Argument(help="The request's id, its beginning or a part of it; without: the latest."),
]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many to list.")]


def why(
    request: Request = None,
    limit: Limit = 20,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Why a request hit or missed; without a request, the latest ones."""
    with AdminClient(url, token) as client:
        if request is None:
            found = client.get("/v1/receipts", {"limit": limit})
        else:
            found = client.get(f"/v1/receipts/{quote(request, safe='')}")
    if as_json:
        print_json(found)
    elif request is None:
        _list(found)
    else:
        receipts = found["receipts"]
        out = console()
        for number, receipt in enumerate(receipts):
            if number:
                out.print(f"\nBefore that, {len(receipts) - number} of {len(receipts)}:")
            for line in sentences(receipt, time.time()):
                out.print(line, soft_wrap=True, markup=False)


def sentences(receipt: Json, now: float) -> Iterator[str]:
    """What a receipt says, a line each."""
    asked_at = receipt["asked_at"]
    yield (
        f"{receipt['request'] or 'a request without a name'}, of engine {receipt['engine']}, "
        f"asked at {moment(asked_at)} ({age(max(0.0, now - asked_at))} ago), "
        f"answered within {_duration(receipt['answered_s'])}."
    )
    if receipt["refused"]:
        yield f"Nothing was looked up: {receipt['refused']}. All of it is computed."
    yield from _outcome(receipt)
    yield from _verdict(receipt)
    several = len(receipt["groups"]) > 1
    for number, group in enumerate(receipt["groups"]):
        if several:
            window = f", a window of {group['window']} chunks" if group["window"] else ""
            yield f"Cache group {number}{window}:"
        for line in _chunks(group, now):
            yield f"  {line}"
    yield from _arrivals(receipt)


# -- parts of it ------------------------------------------------------------------------


def _outcome(receipt: Json) -> Iterator[str]:
    outcome = receipt["outcome"]
    if outcome is None:
        open_still = receipt["closed_s"] is None
        yield (
            "The engine has not said yet what it made of it."
            if open_still
            else "The engine was gone before it said what it made of it."
        )
        return
    own, loaded = outcome["local_tokens"], outcome["loaded_tokens"]
    waited, load = _duration(outcome["waited_s"]), _duration(outcome["load_s"])
    had = f"The engine had {own} tokens itself" if own else "The engine had nothing of it itself"
    if outcome["state"] == "loaded":
        yield f"{had}, and loaded {loaded} tokens in {load}, after {waited} in its queue."
    elif outcome["state"] == "failed":
        yield f"{had}; the load of {loaded} tokens failed after {load}, so they were not used."
    elif outcome["state"] == "computed":
        yield f"{had}, and loaded nothing; it was {waited} in its queue."
    else:
        yield f"The request ended before it was scheduled, after {waited}."
    if outcome["late"]:
        yield _LATE[outcome["late"]]


def _verdict(receipt: Json) -> Iterator[str]:
    verdict = receipt["verdict"]
    usable, taken = verdict["usable_tokens"], verdict["tokens"]
    asked = max((g["asked"] * g["tokens_per_chunk"] for g in receipt["groups"]), default=0)
    if not usable:
        if asked:
            yield f"Of the {asked} tokens asked for, none can be loaded here."
        return
    yield f"Of the {asked} tokens asked for, the first {usable} can be loaded here."
    if verdict["why"] == "always_load":
        yield "All of them are, because governor.mode is always_load."
    elif verdict["why"] == "unmeasured":
        yield "All of them are: the engine has not measured yet how fast it computes."
    else:
        everything, chosen = verdict["everything"], verdict["chosen"]
        load, compute = _duration(everything["load_s"]), _duration(verdict["compute_all_s"])
        loading = (
            f"Loading them was estimated at {load}{_lines(verdict)}"
            if everything["load_s"]
            else "Loading them was not measured yet and counts as nothing"
        )
        yield f"{loading}; computing them was estimated at {compute}."
        if taken < usable:
            part = f"the first {taken} are loaded" if taken else "nothing is loaded"
            yield (
                f"So {part}, and the other {usable - taken} computed, because that is sooner: "
                f"{_duration(chosen['load_s'])} and {_duration(chosen['compute_s'])}."
            )
        yield from _measured(receipt)


def _measured(receipt: Json) -> Iterator[str]:
    chosen, outcome = receipt["verdict"]["chosen"], receipt["outcome"]
    if chosen["tokens"] and outcome is not None and outcome["state"] == "loaded":
        arrived = receipt["last_arrival_s"]
        came = "" if arrived is None else f"; the last chunk came up after {_duration(arrived)}"
        took = _duration(outcome["waited_s"] + outcome["load_s"])
        estimated = f", estimated were {_duration(chosen['load_s'])}" if chosen["load_s"] else ""
        yield f"They were loaded {took} after they were asked for{estimated}{came}."


def _lines(verdict: Json) -> str:
    """The lower tiers it depends on, in brackets."""
    parts: list[str] = []
    for line in verdict["tiers"]:
        if not line["usable_bytes"]:
            continue
        speed = line["bytes_per_s"]
        told = f"at {size(speed)}/s" if speed else "not measured yet"
        behind = f" behind {size(line['queued_bytes'])}" if line["queued_bytes"] else ""
        stuck = f", busy for {_duration(line['stuck_s'])}" if line["stuck_s"] else ""
        bytes_up = size(line["usable_bytes"])
        parts.append(f"{bytes_up} from {_place(line['tier'])} {told}{behind}{stuck}")
    return f" ({'; '.join(parts)})" if parts else ""


def _chunks(group: Json, now: float) -> Iterator[str]:
    asked, per_chunk = group["asked"], group["tokens_per_chunk"]
    yield f"{asked} chunks of {per_chunk} tokens asked for:"
    if group["here"]:
        yield f"- {group['here']} were in host memory, and held for the request"
    if group["coming"]:
        yield f"- {group['coming']} were brought up for it"
    for tier, count in group["skipped"].items():
        yield f"- {count} are in {_place(tier)}, but sooner computed than loaded"
    if group["missing"]:
        yield from _missing(group, now)
    if group["behind_gap"]:
        yield f"- {group['behind_gap']} are kept, but of no use behind one that is not"
    if group["outside_window"]:
        yield f"- {group['outside_window']} are kept, but not needed: the window begins behind them"
    if group["queue_full"]:
        yield f"- {group['queue_full']} are kept, but too many chunks waited to be brought up"


def _missing(group: Json, now: float) -> Iterator[str]:
    yield f"- {group['missing']} are in no tier, the first of them chunk {group['first_missing']}:"
    known = 0
    for removed in group["removed"]:
        known += removed["chunks"]
        fate = _REMOVED[removed["reason"]].format(_place(removed["tier"]))
        ago = age(max(0.0, now - removed["last_at"]))
        yield f"    {removed['chunks']} {fate}, the last {ago} ago"
    if group["missing"] > known:
        yield f"    {group['missing'] - known} were never stored here, as far as is remembered"


def _arrivals(receipt: Json) -> Iterator[str]:
    coming = sum(group["coming"] for group in receipt["groups"])
    if not coming:
        return
    landed = [f"{count} came from {_place(t)}" for t, count in receipt["landed"].items()]
    others = {
        "failed": "could not be read, or were damaged",
        "crowded": "found no room in host memory",
        "late": "had not come when the request went on",
    }
    told = landed + [f"{receipt[name]} {what}" for name, what in others.items() if receipt[name]]
    yield f"Of the {coming} brought up: {', '.join(told) or 'none has come yet'}."


def _list(found: Json) -> None:
    shown = table("when", "request", ">tokens", ">usable", ">loaded", "outcome", "why not more")
    for receipt in found["receipts"]:
        verdict, outcome = receipt["verdict"], receipt["outcome"]
        asked = max((g["asked"] * g["tokens_per_chunk"] for g in receipt["groups"]), default=0)
        shown.add_row(
            *(moment(receipt["asked_at"]), receipt["request"] or "-", str(asked)),
            str(verdict["usable_tokens"]),
            "-" if outcome is None else str(outcome["loaded_tokens"]),
            "open" if outcome is None else outcome["state"],
            _short_reason(receipt),
        )
    out = console()
    out.print(shown)
    out.print(f"{found['kept']} lookups are kept; kvbm why REQUEST explains one")


def _short_reason(receipt: Json) -> str:
    """The first thing that kept it from loading more."""
    verdict, outcome, groups = receipt["verdict"], receipt["outcome"], receipt["groups"]
    reasons = (
        (receipt["refused"], receipt["refused"]),
        (outcome is not None and outcome["state"] == "failed", "the load failed"),
        (outcome is not None and outcome["late"], "deadline"),
        (receipt["crowded"], "no room in host memory"),
        (receipt["failed"], "a tier failed"),
        (any(group["queue_full"] for group in groups), "queue full"),
        (verdict["tokens"] < verdict["usable_tokens"], "sooner computed"),
        (any(group["removed"] for group in groups), "evicted"),
        (any(group["missing"] for group in groups), "never stored"),
    )
    return next((text for holds, text in reasons if holds), "-")


def _place(tier: str) -> str:
    return _TIERS.get(tier, tier)


def _duration(seconds: float) -> str:
    """With two digits or so, in the unit that suits."""
    if seconds >= 60:
        return age(seconds)
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"
