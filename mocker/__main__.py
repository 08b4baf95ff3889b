"""`python -m mocker`: a trace replayed in virtual time, policies side by side; `serve`: engines.

The first is what `kvbm bench replay` starts. It prints a table, and as the last line one JSON
object; `--plot` writes a picture. A trace that cannot be read ends it with status 2 and one line
of why.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from mocker.compare import POLICIES, Scene, replay, table
from mocker.plot import plot
from mocker.trace import TraceEntry, TraceError, faster, read_trace


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        from mocker.serve import main as serve

        serve(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="kvbm bench replay", description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="in Mooncake's format")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="default: all")
    parser.add_argument("--rate", type=float, default=1.0, help="of arrival, times the trace's")
    parser.add_argument("--requests", type=int, help="only so many of the first")
    parser.add_argument("--plot", type=Path, help="write an SVG there")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    for field in fields(Scene):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    given = parser.parse_args()
    scene = Scene(**{field.name: getattr(given, field.name) for field in fields(Scene)})
    try:
        entries: list[TraceEntry] = faster(read_trace(given.trace)[: given.requests], given.rate)
        scene.fleet()
        results = {name: replay(scene, entries, name) for name in given.policy or POLICIES}
    except (OSError, TraceError, ValueError) as error:
        parser.error(str(error))
    figures = {name: result.figures() for name, result in results.items()}
    if given.plot:
        title = f"{given.trace.name}, {scene.engines} engines, {scene.machine}, x{given.rate:g}"
        ttfts = {
            name: [row["ttft_s"] for row in result.requests() if row["ttft_s"] is not None]
            for name, result in results.items()
        }
        given.plot.write_text(plot(title, ttfts))
    if not given.json:
        sys.stdout.write(table(figures) + "\n")
    whole = {"benchmark": "replay", "rate": given.rate, "policies": figures}
    sys.stdout.write(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
