"""How a benchmark tells its figures: ours against a limit or a peer, from interleaved rounds."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def compared(
    name: str,
    unit: str,
    ours: Sequence[float],
    against: str,
    theirs: Sequence[float],
    target: float | None = None,
) -> Row:
    """Medians with their range, and the median ratio ours / theirs of the rounds.

    `target`: the least ratio that is good enough.
    """
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "name": name,
        "value": round(statistics.median(ours), 3),
        "min": round(min(ours), 3),
        "max": round(max(ours), 3),
        "unit": unit,
        "against": against,
        "against_value": round(statistics.median(theirs), 3),
        "against_min": round(min(theirs), 3),
        "against_max": round(max(theirs), 3),
        "ratio": round(ratio, 3),
        "target": target,
        "ok": target is None or ratio >= target,
    }


def bounded(name: str, unit: str, ours: Sequence[float], most: float | None) -> Row:
    """A figure that should be at most `most`."""
    value = statistics.median(ours)
    return {
        "name": name,
        "value": round(value, 3),
        "min": round(min(ours), 3),
        "max": round(max(ours), 3),
        "unit": unit,
        "target": most,
        "ok": most is None or value <= most,
    }


def tell(benchmark: str, rows: Sequence[Row], *, table: bool = True) -> None:
    """A table to standard error for people, one JSON line to standard output."""
    for line in lines(rows) if table else ():
        print(line, file=sys.stderr)
    print(json.dumps({"benchmark": benchmark, "results": list(rows)}))


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table for people."""
    for row in rows:
        against = (
            f"{row['against_value']:>9g} {row['against']}, ratio {row['ratio']:.2f}"
            if "against" in row
            else ""
        )
        target = "" if row["target"] is None else f" (target {row['target']:g})"
        mark = "" if row["ok"] else "  MISSED"
        yield f"{row['name']:<34} {row['value']:>9g} {row['unit']:<6} {against}{target}{mark}"


def markdown(rows: Sequence[Row]) -> str:
    """The same as a Markdown table: medians, ranges in brackets."""
    told = ["| row | ours | against | ratio | target | |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours = f"{row['value']:g} [{row['min']:g}, {row['max']:g}] {row['unit']}"
        against = ratio = ""
        if "against" in row:
            spread = f"[{row['against_min']:g}, {row['against_max']:g}]"
            against = f"{row['against_value']:g} {spread} {row['against']}"
            ratio = f"{row['ratio']:.2f}"
        target = "" if row["target"] is None else f"{row['target']:g}"
        mark = "" if row["target"] is None else "met" if row["ok"] else "missed"
        told.append(f"| {row['name']} | {ours} | {against} | {ratio} | {target} | {mark} |")
    return "\n".join(told)


def interleaved(
    rounds: int, first: Callable[[], float], second: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Both measured in each round, in turns of who is first; a round before them warms up."""
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(rounds + 1):
        if number % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        if number:
            ours.append(a)
            theirs.append(b)
    return ours, theirs
