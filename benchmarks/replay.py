"""Time to first token by routing policy: a real trace on mock engines, in virtual time.

Eight engines with the timing of an 8B model on an H100 each, near saturation; every policy gets the
same requests. Told are the mean and the 90th percentile of the production `kv` policy against round
robin and against the reference's formula (`kv-blocks`), as ratios of times saved: above 1 it is
faster. Nothing here is measured on a clock but the CPU time of the simulation.

    python -m benchmarks.replay [--trace FILE] [--rate 1.0] [--plot FILE]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.policy import TRACE
from kvbm.cli.figures import Row, tell
from mocker.compare import POLICIES, Scene, replay, table
from mocker.plot import plot
from mocker.trace import faster, read_trace

ROUTED = ("kv-blocks", "kv")


def rows(ttfts: dict[str, dict[str, float]]) -> list[Row]:
    made: list[Row] = []
    for other, target in (("round-robin", None), ("kv-blocks", 1.0)):
        for figure in ("mean", "p90"):
            ours, theirs = ttfts["kv"][figure], ttfts[other][figure]
            made.append(
                {
                    "name": f"TTFT {figure}, kv",
                    "value": round(ours, 4),
                    "min": round(ours, 4),
                    "max": round(ours, 4),
                    "unit": "s",
                    "against": other,
                    "against_value": round(theirs, 4),
                    "ratio": round(theirs / ours, 3),
                    "target": target,
                    "ok": target is None or theirs / ours >= target,
                }
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--g2-gb", type=float, default=0.0, help="host memory of a node")
    parser.add_argument("--plot", type=Path, default=Path("build/replay.svg"))
    given = parser.parse_args()
    if not given.trace.exists():
        parser.error(f"no trace at {given.trace}: put one there, or name it with --trace")
    scene = Scene(g2_gb=given.g2_gb)
    entries = faster(read_trace(given.trace), given.rate)
    before = time.process_time()
    results = {policy: replay(scene, entries, policy) for policy in POLICIES}
    figures = {policy: result.figures() for policy, result in results.items()}
    for policy in ROUTED:
        figures[f"{policy}*"] = replay(scene, entries, policy, events=False).figures()
    print(table(figures))
    print("* without block events: by load alone")
    print(f"{len(entries)} requests a policy, {time.process_time() - before:.0f} s of CPU in all")
    given.plot.parent.mkdir(exist_ok=True)
    ttfts = {name: [one["ttft_s"] for one in some.requests()] for name, some in results.items()}
    given.plot.write_text(plot(f"{given.trace.stem}, {scene.engines} mock engines", ttfts))
    tell("replay", rows({name: one["ttft_s"] for name, one in figures.items()}))


if __name__ == "__main__":
    main()
