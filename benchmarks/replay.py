"""Time to first token by routing policy near saturation: a real trace on mock engines.

Virtual time, so the same run gives the same figures. Eight engines with the timing of an 8B model
on an H100 each. First the capacity: requests a second of round robin when all come far too fast.
Then the trace at shares of that capacity under each policy; at one of them the `kv` policy with
things taken from it, to see what each is worth; and with host memory and SSD on four nodes. Rows
say how much sooner first tokens come under `kv` than under another policy, as a ratio.

    python -m benchmarks.replay [--trace FILE] [--requests 3000] [--loads 0.7 0.9] [--plot FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.policy import TRACE
from kvbm.cli.figures import Row, tell
from mocker.compare import Scene, replay, table
from mocker.plot import plot
from mocker.routing import Routing
from mocker.trace import TraceEntry, faster, read_trace
from router.cost import BlocksCost, SecondsCost
from router.selector import PolicyName

LOADS: Final = (0.7, 0.8, 0.9, 0.95)
ABLATED_AT: Final = 0.9
PARTS: Final = ("load", "ablations", "tiers")
REQUESTS: Final = 3000  # of the trace, the first quarter of an hour
TOO_FAST: Final = 6.0  # times the trace's rate, for the capacity
POLICIES: Final[tuple[PolicyName, ...]] = (
    *("round-robin", "power-of-two", "least-loaded"),
    *("kv-blocks", "kv"),
)
SCENE: Final = Scene()
TIERS: Final = Scene(engines_per_node=2, g2_gb=64.0, g3_gb=512.0)
ABLATIONS: Final[tuple[tuple[str, Routing, bool], ...]] = (
    ("kv, no events", Routing(), False),
    ("kv-blocks, no events", Routing("kv-blocks"), False),
    ("kv, events 100 ms late", Routing(events_late_s=0.1), True),
    ("kv, events 1 s late", Routing(events_late_s=1.0), True),
    ("kv, events 10 s late", Routing(events_late_s=10.0), True),
    ("kv, waits do not pass", Routing(waits_pass=False), True),
    ("kv, output not told", Routing(hears_output=False), True),
    ("kv, decode not counted", Routing(seconds=SecondsCost(0.0)), True),
    ("kv, decode counted full", Routing(seconds=SecondsCost(1.0)), True),
    ("kv, prefill taken for x2", Routing(prefill_error=2.0), True),
    ("kv, prefill taken for x0.5", Routing(prefill_error=0.5), True),
    ("kv-blocks, prefill x2", Routing("kv-blocks", blocks=BlocksCost(prefill_scale=2)), True),
    ("kv-blocks, prefill x4", Routing("kv-blocks", blocks=BlocksCost(prefill_scale=4)), True),
)


@dataclass(frozen=True, slots=True)
class Job:
    group: str
    name: str
    routing: Routing
    trace: Path
    requests: int
    rate: float  # times the trace's
    events: bool = True
    scene: Scene = SCENE


@dataclass(frozen=True, slots=True)
class Done:
    job: Job
    figures: dict[str, Any]
    throughput: float
    ttfts: Sequence[float]
    cpu_s: float


def run(job: Job) -> Done:
    before = time.process_time()
    entries: list[TraceEntry] = faster(read_trace(job.trace)[: job.requests], job.rate)
    result = replay(job.scene, entries, job.routing, events=job.events)
    ttfts = [one["ttft_s"] for one in result.requests()]
    cpu_s = time.process_time() - before
    return Done(job, result.figures(), result.throughput(), ttfts, cpu_s)


def jobs(
    trace: Path,
    requests: int,
    loads: Sequence[float],
    rate_of: dict[float, float],
    parts: Sequence[str],
) -> list[Job]:
    """What is run once the capacity is known."""
    which = trace, requests
    made = [
        Job(f"load {load:g}", policy, Routing(policy), *which, rate_of[load])
        for load in loads
        for policy in POLICIES
    ]
    rate = rate_of[ABLATED_AT]
    made += [
        Job("ablations", name, routing, *which, rate, events) for name, routing, events in ABLATIONS
    ]
    made += [
        Job("tiers", policy, Routing(policy), *which, rate, scene=TIERS) for policy in POLICIES
    ]
    return [job for job in made if job.group.split()[0] in parts]


def rows(found: Sequence[Done], loads: Sequence[float]) -> list[Row]:
    made: list[Row] = []
    by = {(one.job.group, one.job.name): one.figures["ttft_s"] for one in found}
    groups = [*(f"load {load:g}" for load in loads), "tiers"]
    for group in [group for group in groups if (group, "kv") in by]:
        for other, target in (("round-robin", 1.2), ("kv-blocks", 1.0)):
            for figure in ("mean", "p90"):
                ours, theirs = by[group, "kv"][figure], by[group, other][figure]
                made.append(
                    {
                        "name": f"TTFT {figure}, kv, {group}",
                        "value": round(ours, 4),
                        "min": round(ours, 4),
                        "max": round(ours, 4),
                        "unit": "s",
                        "against": other,
                        "against_value": round(theirs, 4),
                        "ratio": round(theirs / ours, 3),
                        "target": target,
                        "ok": theirs / ours >= target,
                    }
                )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--plot", type=Path, default=Path("build/replay.svg"))
    given = parser.parse_args()
    if not given.trace.exists():
        parser.error(f"no trace at {given.trace}: put one there, or name it with --trace")
    entries = read_trace(given.trace)[: given.requests]
    own_rate = len(entries) / (entries[-1].timestamp_ms - entries[0].timestamp_ms) * 1000
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        which = given.trace, given.requests
        full = [Job("full", name, Routing(name), *which, TOO_FAST) for name in POLICIES[::4]]
        fullest = list(pool.map(run, full))
        for one in fullest:
            print(f"capacity, {one.job.name}: {one.throughput:.3f} requests/s")
        loads = sorted({*given.loads, ABLATED_AT})
        rate_of = {load: load * fullest[0].throughput / own_rate for load in loads}
        found = []
        for one in pool.map(run, jobs(*which, loads, rate_of, given.parts)):
            found.append(one)
            ttft = one.figures["ttft_s"]
            said = f"{one.job.group}, {one.job.name}: {ttft['mean']:.3f} s, {ttft['p90']:.3f} s"
            print(said, file=sys.stderr, flush=True)
    for group in dict.fromkeys(one.job.group for one in found):
        some = {one.job.name: one for one in found if one.job.group == group}
        rate = next(iter(some.values())).job.rate
        print(f"\n{group}: {rate:.3f} times the trace's rate, {rate * own_rate:.2f} requests/s")
        print(table({name: one.figures for name, one in some.items()}))
    cpu_s = sum(one.cpu_s for one in [*fullest, *found])
    print(
        f"\n{len(entries)} requests a run, {len(fullest) + len(found)} runs, {cpu_s:.0f} s of CPU"
    )
    given.plot.parent.mkdir(exist_ok=True)
    ttfts = {one.job.name: one.ttfts for one in found if one.job.group == f"load {ABLATED_AT:g}"}
    if ttfts:
        given.plot.write_text(plot(f"{given.trace.stem}, {ABLATED_AT:.0%} of capacity", ttfts))
    tell("replay", rows(found, loads))


if __name__ == "__main__":
    main()
