"""How fast replay simulates a trace: requests, steps and blocks for each second of one core.

All requests of a Mooncake-format trace on a fleet of mock engines, CPU time, one run for each row.
Rows with tiers have G2 and G3 on one node, and a policy that takes block events.

    python -m benchmarks.mocker --trace FILE [--engines 8] [--rate 1.0] [--blocks 512 64]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvbm.cli.figures import Row, bounded, tell
from mocker.engine import EngineSettings
from mocker.replay import FleetSettings, Replay
from mocker.routing import RouterPolicy, Routing
from mocker.timing import PRESETS
from mocker.trace import TraceEntry, faster, read_trace, requests

CPU_S_MAX: Final = 60.0
G2_TOKENS: Final = 4_000_000
G3_TOKENS: Final = 20_000_000


def measure(
    entries: Sequence[TraceEntry], engines: int, block_size: int, *, tiers: bool
) -> tuple[list[Row], str]:
    machine = PRESETS["llama-8b-h100"]
    engine = EngineSettings(
        machine.step,
        num_blocks=machine.kv_tokens // block_size,
        block_size=block_size,
        kv_bytes_per_token=machine.kv_bytes_per_token,
    )
    fleet = FleetSettings(
        engine,
        engines=engines,
        engines_per_node=engines,
        g2_blocks=G2_TOKENS // block_size if tiers else 0,
        g3_blocks=G3_TOKENS // block_size if tiers else 0,
    )
    replay = Replay(
        fleet,
        RouterPolicy(fleet, Routing("least-loaded"), 1),
        requests(entries, block_size),
        listen=tiers,
    )
    began_s = time.process_time()
    result = replay.run()
    cpu_s = time.process_time() - began_s
    figures = result.figures()
    blocks = sum(entry.input_tokens // block_size for entry in entries)
    name = f"block {block_size}{', tiers and events' if tiers else ''}"
    rows = [
        bounded(f"whole trace, {name}", "s", [cpu_s], CPU_S_MAX),
        bounded(f"requests, {name}", "/s", [len(entries) / cpu_s], None),
        bounded(f"steps, {name}", "/s", [figures["steps"] / cpu_s], None),
        bounded(f"prompt blocks, {name}", "/s", [blocks / cpu_s], None),
    ]
    hits = ", ".join(f"{tier} {rate:.1%}" for tier, rate in figures["hit_rate"].items())
    ttft = figures["ttft_s"]
    said = f"{name}: TTFT mean {ttft['mean']:.3f} s, p90 {ttft['p90']:.3f} s; hits {hits}"
    return rows, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1.0, help="of arrival, times the trace's")
    parser.add_argument("--blocks", type=int, nargs="+", default=[512, 64], help="block sizes")
    parser.add_argument("--tiers", choices=("with", "without", "both"), default="both")
    arguments = parser.parse_args()
    entries = faster(read_trace(arguments.trace), arguments.rate)
    rows: list[Row] = []
    for block_size in arguments.blocks:
        for tiers in (False, True):
            if arguments.tiers in ("both", "with" if tiers else "without"):
                more, said = measure(entries, arguments.engines, block_size, tiers=tiers)
                rows += more
                print(said, file=sys.stderr)
    tell("mocker", rows)


if __name__ == "__main__":
    main()
