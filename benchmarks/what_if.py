"""How near the truth are the daemon's miss-ratio curve and its answers to `kvbm what-if`?

A trace in Mooncake's format goes through `Curve` with different hashes of its keys, and beside it
without sampling: exact LRU stack distances, and each tier's policy with all keys at both sizes. A
bound is good if the truth lies inside it in 95 of 100 runs. Then what watching a lookup costs, and
memory. Prints a table, and one JSON object as its last line.

    python -m benchmarks.what_if [--trace FILE] [--seeds 20] [--keys 8192]

Keys and the most of all keys that is sampled are the daemon's defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.policy import POLICIES, TRACE, asked_for
from benchmarks.workloads import Request
from kvbm.cli.figures import Row, bounded, tell
from kvbm.curve import Curve
from kvbm.daemon.settings import WhatIfSettings
from kvbm.manager import Wanted
from kvbm.protocol import Pace
from kvbm.what_if import SizedTier, what_if
from storage_tiers.base import Key, TierName
from storage_tiers.miniature import USE, replay

CHUNK_BYTES = 1 << 20
TOKENS = 512
SIZES = (1_000, 3_000, 10_000, 20_000, 30_000, 60_000, 100_000)
CHANGES = ((3_000, 10_000), (10_000, 30_000))
DEFAULTS = WhatIfSettings()
WINDOW_S = 1e6  # a trace is over before anything fades
INSIDE_MIN = 0.95
KEY_US_MAX = 1.0
LOOKUP_KEYS = 512
MEMORY_MAX = 16.0

Bools = NDArray[np.bool_]


def exact_depths(requests: Sequence[Request]) -> NDArray[np.float64]:
    """Of every block asked for, in LRU's stack before its request, deepest first; infinite: new."""
    last: dict[int, int] = {}
    depths: list[float] = []
    counted = [0] * (sum(len(blocks) for _, blocks in requests) + 1)  # a Fenwick tree

    def add(at: int, by: int) -> None:
        while at < len(counted):
            counted[at] += by
            at += at & -at

    def before(at: int) -> int:
        found = 0
        while at:
            found += counted[at]
            at &= at - 1
        return found

    clock = 0
    for _, blocks in requests:
        for block in reversed(blocks):
            at = last.get(block)
            depths.append(np.inf if at is None else len(last) - before(at) + 1)
        for block in reversed(blocks):
            if block in last:
                add(last[block], -1)
            clock += 1
            last[block] = clock
            add(clock, 1)
    return np.array(depths)


def exact_hits(requests: Sequence[Request], policy: str, size: int) -> Bools:
    """Which blocks a tier of this many finds, with all keys."""
    uses = np.zeros(sum(len(blocks) for _, blocks in requests), dtype=USE)
    lengths = [len(blocks) for _, blocks in requests]
    uses["at_s"] = np.repeat([at_s for at_s, _ in requests], lengths)
    uses["chain"] = np.repeat(np.arange(len(requests)), lengths)
    uses["key"] = [
        int.from_bytes(key_of(0, block)[:8], "little") for _, blocks in requests for block in blocks
    ]
    uses["position"] = [index for length in lengths for index in range(length)]
    uses["bytes"] = CHUNK_BYTES
    return replay(uses, POLICIES[policy](), size * CHUNK_BYTES)


def key_of(seed: int, block: int) -> Key:
    return Key(hashlib.blake2b(f"{seed}.{block}".encode(), digest_size=15).digest() + b"\0")


def watched(requests: Sequence[Request], seed: int, keys: int) -> tuple[Curve, list[float]]:
    """A curve fed with all requests, and the microseconds that each took."""
    named: dict[int, Key] = {}
    now_s = 0.0
    curve = Curve(keys, 1 << 50, WINDOW_S, rate_max=DEFAULTS.rate, clock=lambda: now_s)
    took_us: list[float] = []
    for now_s, blocks in requests:  # noqa: B007 (the clock reads it)
        for block in blocks:
            if block not in named:
                named[block] = key_of(seed, block)
        wanted = [Wanted(TOKENS, 0, [named[block] for block in blocks], CHUNK_BYTES)]
        places = [np.zeros(len(blocks), dtype=np.uint8)]
        began = time.thread_time_ns()
        curve.asked(wanted, places, Pace(token_s=1e-4))
        took_us.append((time.thread_time_ns() - began) / 1e3)
    return curve, took_us


def judged(name: str, errors: Sequence[float], bounds: Sequence[float]) -> list[Row]:
    """Errors in percentage points, and how often the truth lay inside the bounds."""
    off = 100 * np.abs(errors)
    inside = float(np.mean(np.abs(errors) <= np.array(bounds) + 1e-12))
    return [
        {
            **bounded(f"{name}: error", "points", off.tolist(), None),
            "value": round(float(off.mean()), 3),
            "bound": round(100 * float(np.mean(bounds)), 3),
        },
        {
            **bounded(f"{name}: truth inside", "part", [inside], None),
            "target": INSIDE_MIN,
            "ok": inside >= INSIDE_MIN,
        },
    ]


def curve_rows(curves: Sequence[Curve], requests: Sequence[Request]) -> list[Row]:
    depths = exact_depths(requests)
    errors: list[float] = []
    bounds: list[float] = []
    for curve in curves:
        rates = curve.hit_rates([size * CHUNK_BYTES for size in SIZES])
        for size, rate in zip(SIZES, rates, strict=True):
            errors.append(rate.value - float((depths <= size).mean()))
            bounds.append(rate.error)
    return judged("LRU curve", errors, bounds)


def change_rows(curves: Sequence[Curve], requests: Sequence[Request], policy: str) -> list[Row]:
    """Hit rates' gain with a larger tier; beside it, the error of taking LRU's for the policy's."""
    rows: list[Row] = []
    sizes_asked = {size for change in CHANGES for size in change}
    hits = {size: exact_hits(requests, policy, size) for size in sizes_asked}
    for now, then in CHANGES:
        errors: list[float] = []
        bounds: list[float] = []
        by_lru: list[float] = []
        for curve in curves:
            recent = curve.uses()
            truth_now, truth_then = (
                float(hits[size][-recent.asked :].mean()) for size in (now, then)
            )
            tier = SizedTier(TierName.DRAM, now * CHUNK_BYTES, POLICIES[policy], None)
            sizes = [now * CHUNK_BYTES, then * CHUNK_BYTES]
            slack = curve.sideways(sizes[0]), curve.sideways(sizes[1])
            told = what_if(recent, [tier], TierName.DRAM, sizes[1], slack=slack)
            errors.append(told.gain.value - (truth_then - truth_now))
            bounds.append(told.gain.error)
            lru_now, lru_then = curve.hit_rates(sizes)
            by_lru.append(100 * abs(lru_then.value - lru_now.value - (truth_then - truth_now)))
        name = f"{policy} {now} to {then}"
        rows += judged(f"{name}, gain", errors, bounds)
        rows.append(bounded(f"{name}, error of LRU's gain", "points", by_lru, None))
    return rows


def cost_rows(requests: Sequence[Request], took_us: Sequence[float], keys: int) -> list[Row]:
    """Once the sample is full, as it is for ever after: of the trace, and of long lookups."""
    late = took_us[len(took_us) // 2 :]
    blocks = sum(len(blocks) for _, blocks in requests[len(requests) // 2 :])
    tracemalloc.start()
    curve, _ = watched(requests[:2000], 0, keys)
    mib = tracemalloc.get_traced_memory()[0] / (1 << 20)
    tracemalloc.stop()
    long = [
        (at_s, list(range(n * 1000, n * 1000 + LOOKUP_KEYS)))
        for n, (at_s, _) in enumerate(requests[:1000])
    ]
    _, long_us = watched(long, 1, keys)
    per_key = [us / LOOKUP_KEYS for us in long_us[500:]]
    del curve
    return [
        bounded("watching a lookup of the trace", "us", late, None),
        bounded("the same, a key", "us", [sum(late) / blocks], None),
        bounded(f"a lookup of {LOOKUP_KEYS} keys, a key", "us", per_key, KEY_US_MAX),
        bounded("memory", "MiB", [mib], MEMORY_MAX),
    ]


def run(requests: list[Request], seeds: int, keys: int) -> list[Row]:
    made = [watched(requests, seed, keys) for seed in range(seeds)]
    curves = [curve for curve, _ in made]
    rows = curve_rows(curves, requests)
    for policy in ("value", "lru"):
        rows += change_rows(curves, requests, policy)
    return rows + cost_rows(requests, made[-1][1], keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, action="append", help=f"default {TRACE}")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--keys", type=int, default=DEFAULTS.keys, help="in the sample, at most")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name, requests in asked_for(arguments.trace, parser).items():
        rows += [
            {**row, "name": f"{name}: {row['name']}"}
            for row in run(requests, arguments.seeds, arguments.keys)
        ]
    tell("what_if", rows)


if __name__ == "__main__":
    main()
