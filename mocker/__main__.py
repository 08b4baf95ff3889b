"""`python -m mocker`: a trace replayed in virtual time, policies side by side; `serve`: engines.

The first is what `kvbm bench replay` starts. It prints a table, and as the last line one JSON
object; `--plot` writes a picture. A trace that cannot be read ends it with status 2 and one line
of why.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from mocker.compare import POLICIES, Scene, replay, table
from mocker.plot import plot
from mocker.results import ReplayResult
from mocker.trace import TraceEntry, TraceError, faster, read_trace
from router.selector import PolicyName
from runtime import telemetry


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
    parser.add_argument("--online", action="store_true", help="in wall time, on real processes")
    parser.add_argument("--speedup", type=float, default=4.0, help="online: of trace and engines")
    parser.add_argument("--daemon", action="store_true", help="online: a real one on each node")
    for field in fields(Scene):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    given = parser.parse_args()
    scene = Scene(**{field.name: getattr(given, field.name) for field in fields(Scene)})
    policies: Sequence[PolicyName] = given.policy or POLICIES
    try:
        entries: list[TraceEntry] = faster(read_trace(given.trace)[: given.requests], given.rate)
        scene.fleet()
        results: dict[str, ReplayResult] = {name: replay(scene, entries, name) for name in policies}
    except (OSError, TraceError, ValueError) as error:
        parser.error(str(error))
    if given.online:
        results |= _online(given, scene, entries, policies)
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


def _online(
    given: argparse.Namespace,
    scene: Scene,
    entries: Sequence[TraceEntry],
    policies: Sequence[PolicyName],
) -> dict[str, ReplayResult]:
    """The same in wall time; ends the command with status 1 where that fails."""
    from mocker.online import OnlineError, OnlineSettings, replay_online

    telemetry.configure("auto", "warning", sys.stderr, os.environ)
    settings = OnlineSettings(scene, given.speedup, given.daemon)
    found: dict[str, ReplayResult] = {}
    for name in policies:
        try:
            run = asyncio.run(replay_online(settings, entries, name))
        except* (OnlineError, OSError, TimeoutError) as errors:
            sys.stderr.write(f"the online replay failed: {errors.exceptions[0]}\n")
            raise SystemExit(1) from None
        found[f"{name} online"] = run.result
        feed = run.feed
        if not given.json:
            gaps = sum(node.gaps_total for node in feed.nodes)
            sys.stdout.write(
                f"{name}: {feed.events_total} events, {feed.blocks_total} blocks, {gaps} gaps; "
                f"requests sent at most {run.late_s:.3f} s late\n"
            )
    return found


if __name__ == "__main__":
    main()
