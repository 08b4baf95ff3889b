"""`kvbm drain`, `resume`, `flush` and `scrub`: what an operator has a node do."""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from typing import Annotated, Final

import typer

from kvbm.cli.client import AdminClient, Json
from kvbm.cli.options import DEFAULT_URL, AsJson, Token, Url
from kvbm.cli.output import console, print_json, size

POLL_S: Final = 0.5
ASK_S: Final = 5.0  # one request of a longer wait


class Scrubbed(StrEnum):
    """Tiers that can be scrubbed."""

    G2 = "G2"
    G3 = "G3"


Wait = Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the end.")]


def drain(
    url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False, wait_s: Wait = 60.0
) -> None:
    """Stop taking stores and write down what is in host memory alone, the hottest first.

    Exit status 1 if it is not done in time; it goes on, and asking again tells how far it is.
    """
    with AdminClient(url, token) as client:
        end = time.monotonic() + wait_s
        answer = client.post("/v1/drain")
        while not answer["done"] and time.monotonic() < end:
            time.sleep(POLL_S)
            answer = client.get("/v1/drain")
            _talk(f"{answer['left_chunks']} chunks to write", as_json)
    text = (
        f"drained: {'done' if answer['done'] else 'not done yet'}; {answer['left_chunks']} chunks "
        f"to write, engines hold {size(answer['leased_bytes'])} of slots"
    )
    _end(answer, text, as_json, failed=not answer["done"])


def resume(url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """End a drain: engines store again."""
    with AdminClient(url, token) as client:
        answer = client.post("/v1/resume")
    _end(answer, "engines store again", as_json, failed=bool(answer["draining"]))


def flush(
    url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False, wait_s: Wait = 30.0
) -> None:
    """Wait until nothing is on its way to SSD and S3. Exit status 1 if that takes longer."""
    with AdminClient(url, token) as client:
        began = time.monotonic()
        answer = client.post("/v1/flush", wait_s=min(wait_s, ASK_S))
        while not answer["done"] and (left_s := began + wait_s - time.monotonic()) > 0:
            _talk(f"{answer['left_chunks']} chunks to write", as_json)
            answer = client.post("/v1/flush", wait_s=min(left_s, ASK_S))
        answer["seconds"] = time.monotonic() - began
    text = f"{answer['left_chunks']} chunks left after {answer['seconds']:.1f} s"
    _end(answer, text, as_json, failed=not answer["done"])


def scrub(
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
    wait_s: Wait = 600.0,
    tier: Annotated[
        Scrubbed, typer.Option("--tier", help="G2: host memory; G3: the SSD.")
    ] = Scrubbed.G2,
) -> None:
    """Check every chunk of a tier now. Exit status 1 if one is damaged, or it takes longer.

    It goes on after --wait; asking again joins it.
    """
    with AdminClient(url, token) as client:
        end = time.monotonic() + wait_s
        answer = client.post("/v1/scrub", {"tier": tier.value}, wait_s=min(wait_s, ASK_S))
        while not answer["done"] and time.monotonic() < end:
            time.sleep(POLL_S)
            answer = client.get("/v1/scrub", {"tier": tier.value})["latest"]
            _talk(f"{answer['checked_chunks']} of {answer['total_chunks']} chunks", as_json)
    text = (
        f"{answer['checked_chunks']} of {answer['total_chunks']} chunks checked in "
        f"{answer['seconds']:.1f} s, {answer['damaged_chunks']} damaged, "
        f"{answer['unreadable_chunks']} could not be read"
    )
    bad = answer["damaged_chunks"] + answer["unreadable_chunks"]
    failed = not answer["done"] or bad > 0
    _end(answer, text, as_json, failed=failed)


def _talk(text: str, as_json: bool) -> None:
    if not as_json:
        sys.stderr.write(f"{text}\n")


def _end(answer: Json, text: str, as_json: bool, *, failed: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        console().print(text, soft_wrap=True)
    if failed:
        raise typer.Exit(1)
