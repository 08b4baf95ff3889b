"""How many blocks does each eviction policy find again, and what does it cost to ask it?

Replays request traces through the policies, beside LRU, an LFU with dynamic aging and Belady's
bound, in one run: a trace file in Mooncake's format (`timestamp` in ms, `hash_ids` of 512-token
blocks) and those of `workloads`. A hit counts when the block and all before it in its request are
resident; Belady's bound does not know of prefixes. Every block costs the same here. Then hits and
writes with each admission. Prints a table, and one JSON object as its last line.

    python -m benchmarks.policy [--trace FILE]... [--no-synthetic] [--sensitivity] [--json]
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workloads import Request, synthetic
from storage_tiers import survival, value
from storage_tiers.admission import Admission, AdmitSeenTwice, AdmitValue
from storage_tiers.leaves import NONE
from storage_tiers.policy import EvictionPolicy, LruPolicy, S3FifoPolicy
from storage_tiers.value import ValuePolicy

TRACE = Path("build/traces/conversation_trace.jsonl")
CAPACITIES = (1_000, 3_000, 10_000, 30_000)
ADMISSION_CAPACITIES = (3_000, 10_000)
POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LruPolicy,
    "s3-fifo": S3FifoPolicy,
    "value": ValuePolicy,
}
RESIDENTS = 1_000_000
OFFERS_REMEMBERED = 1 << 16
HIT_NS_MAX = 3_000
INSERT_NS_MAX = 10_000
CONSTANTS = (
    (survival, "OBSERVATIONS_PRIOR"),
    (survival, "REUSE_PRIOR"),
    (survival, "OBSERVATIONS_KEPT"),
    (value, "RANKED_PER"),
)


class AdmitAll:
    """Everything is stored."""

    def admits(
        self, key: int, now_s: float, *, parent: int, cost_s: float, size_bytes: int, full: bool
    ) -> bool:
        return True


def fingerprint(number: int) -> int:
    """64 even bits for a block's number (splitmix64)."""
    mask = (1 << 64) - 1
    x = (number + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


@dataclass(frozen=True, slots=True)
class Replayed:
    """Shares of all blocks asked for."""

    found: float
    written: float


def replay(requests: list[Request], capacity: int, evict: EvictionPolicy) -> float:
    """The share of blocks found, of all asked for, if all are stored."""
    return replay_admitted(requests, capacity, evict, AdmitAll()).found


def replay_admitted(
    requests: list[Request], capacity: int, evict: EvictionPolicy, admission: Admission
) -> Replayed:
    """As `replay`, but a block that is refused is not stored, nor what follows it."""
    record_of: dict[int, int] = {}
    block_of: list[int] = []
    free: list[int] = []
    found = asked = written = 0
    for now_s, blocks in requests:
        asked += len(blocks)
        depth = 0
        while depth < len(blocks) and blocks[depth] in record_of:
            depth += 1
        found += depth
        for block in reversed(blocks[:depth]):
            evict.hit(record_of[block], fingerprint(block), now_s)
        pinned = {record_of[block] for block in blocks[:depth]}
        parent = record_of[blocks[depth - 1]] if depth else NONE
        for index in range(depth, len(blocks)):
            block = blocks[index]
            full = len(record_of) >= capacity
            if not admission.admits(
                fingerprint(block), now_s, parent=parent, cost_s=0.1, size_bytes=1 << 20, full=full
            ):
                for later in blocks[index + 1 :]:  # all of them are offered
                    admission.admits(
                        fingerprint(later), now_s, parent=NONE, cost_s=0.1, size_bytes=1, full=True
                    )
                break
            if full:
                victim = next((v for v in evict.victims() if v not in pinned), NONE)
                if victim == NONE:
                    break  # the request alone is larger than the cache
                evict.removed(victim, fingerprint(block_of[victim]))
                del record_of[block_of[victim]]
                free.append(victim)
            record = free.pop() if free else len(block_of)
            if record == len(block_of):
                block_of.append(block)
            block_of[record] = block
            record_of[block] = record
            pinned.add(record)
            written += 1
            evict.inserted(
                record, fingerprint(block), now_s, parent=parent, cost_s=0.1, size_bytes=1 << 20
            )
            parent = record
    evict.check_integrity()
    return Replayed(found / asked, written / asked)


def bound(requests: list[Request], capacity: int) -> float:
    """Belady's: evict what is used again last; what is never used again is not kept at all."""
    blocks = [block for _, request in requests for block in request]
    never = len(blocks)
    following = [never] * len(blocks)
    last: dict[int, int] = {}
    for index in range(len(blocks) - 1, -1, -1):
        following[index] = last.get(blocks[index], never)
        last[blocks[index]] = index
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    found = 0
    for block, after in zip(blocks, following, strict=True):
        found += block in kept
        if after == never:
            kept.pop(block, None)
            continue
        kept[block] = after
        heapq.heappush(furthest, (-after, block))
        while len(kept) > capacity:
            key, victim = heapq.heappop(furthest)
            if kept.get(victim) == -key:
                del kept[victim]
    return found / len(blocks)


def lfu_aging(requests: list[Request], capacity: int) -> float:
    """LFU with dynamic aging and a count for every block there ever was: not a bounded policy."""
    uses: dict[int, int] = {}
    kept: dict[int, tuple[int, int]] = {}
    least: list[tuple[int, int, int]] = []
    age = clock = found = asked = 0
    for _, blocks in requests:
        asked += len(blocks)
        found += sum(block in kept for block in blocks)
        for block in reversed(blocks):
            clock += 1
            uses[block] = uses.get(block, 0) + 1
            kept[block] = (uses[block] + age, clock)
            heapq.heappush(least, (*kept[block], block))
        while len(kept) > capacity:
            count, stamp, victim = heapq.heappop(least)
            if kept.get(victim) == (count, stamp):
                age = count
                del kept[victim]
    return found / asked


def read_trace(path: Path) -> list[Request]:
    with path.open() as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["timestamp"] / 1000, row["hash_ids"]) for row in rows]


# -- what it costs ---------------------------------------------------------------------------


def speeds(make: Callable[[], EvictionPolicy], residents: int) -> dict[str, float]:
    """ns for a hit and for an insert with its eviction, in a full cache of runs of 20 chunks."""
    evict = make()
    keys = array("Q", (fingerprint(i) for i in range(residents + residents // 10)))
    for record in range(residents):
        parent = record - 1 if record % 20 else NONE
        evict.inserted(
            record, keys[record], record / 100, parent=parent, cost_s=0.1, size_bytes=1 << 20
        )
    now_s = residents / 100
    began = time.perf_counter_ns()
    hits = 0
    for start in range(0, residents // 2, 200):
        for record in range(start + 19, start - 1, -1):
            evict.hit(record, keys[record], now_s + hits / 100)
            hits += 1
    hit_ns = (time.perf_counter_ns() - began) / hits
    now_s += hits / 100
    parent = NONE
    began = time.perf_counter_ns()
    for index in range(residents // 10):
        victim = next(evict.victims())
        evict.removed(victim, keys[victim])
        key = keys[victim] = keys[residents + index]
        if not index % 20 or victim == parent:
            parent = NONE
        evict.inserted(
            victim, key, now_s + index / 100, parent=parent, cost_s=0.1, size_bytes=1 << 20
        )
        parent = victim
    insert_ns = (time.perf_counter_ns() - began) / (residents // 10)
    assert isinstance(evict, LruPolicy | S3FifoPolicy | ValuePolicy)
    return {"hit": hit_ns, "insert+evict": insert_ns, "bytes": held_bytes(evict) / residents}


def held_bytes(evict: LruPolicy | S3FifoPolicy | ValuePolicy) -> float:
    """Columns, and what the containers that name the rings take; without ghosts and probes."""
    rings = evict._ring
    ticks = evict._ticks
    return (
        evict.state_bytes()
        + sys.getsizeof(rings)
        + sum(sys.getsizeof(at) + sys.getsizeof(head) for at, head in rings.items())
        + sys.getsizeof(ticks)
        + sum(sys.getsizeof(row) for row in ticks.values())
    )


# -- the report ------------------------------------------------------------------------------


def compare(name: str, requests: list[Request], capacity: int) -> list[dict[str, object]]:
    lru = replay(requests, capacity, LruPolicy())
    best = bound(requests, capacity)
    rates = {
        "lru": lru,
        "lfu-aging": lfu_aging(requests, capacity),
        **{
            policy_name: replay(requests, capacity, make())
            for policy_name, make in POLICIES.items()
            if policy_name != "lru"
        },
    }
    return [
        {
            "name": f"{name} {capacity} {policy_name}",
            "value": round(rate, 4),
            "unit": "block hit rate",
            "against": "Belady's bound",
            "against_value": round(best, 4),
            "ratio": round(rate / best, 3) if best else None,
            "lru": round(lru, 4),
            "way_from_lru_to_bound": round((rate - lru) / (best - lru), 3) if best > lru else None,
            "target": None,
            "ok": True,
        }
        for policy_name, rate in rates.items()
    ]


def admission_rows(name: str, requests: list[Request], capacity: int) -> list[dict[str, object]]:
    """Hits and writes of each admission under each eviction, against storing all by the same."""
    rows: list[dict[str, object]] = []
    for policy_name, make in POLICIES.items():
        everything = replay_admitted(requests, capacity, make(), AdmitAll())
        for admission_name in ("seen-twice", "value"):
            evict = make()
            admission: Admission = AdmitSeenTwice(OFFERS_REMEMBERED)
            if admission_name == "value":
                if not isinstance(evict, ValuePolicy):
                    continue
                admission = AdmitValue(evict)
            result = replay_admitted(requests, capacity, evict, admission)
            for what, figure, against in (
                ("hits", result.found, everything.found),
                ("writes", result.written, everything.written),
            ):
                rows.append(
                    {
                        "name": f"{name} {capacity} {policy_name}, admit {admission_name}: {what}",
                        "value": round(figure, 4),
                        "unit": "of blocks asked",
                        "against": "admit all",
                        "against_value": round(against, 4),
                        "ratio": round(figure / against, 3) if against else None,
                        "target": None,
                        "ok": True,
                    }
                )
    return rows


def cost_rows(residents: int) -> list[dict[str, object]]:
    limits = {"hit": HIT_NS_MAX, "insert+evict": INSERT_NS_MAX, "bytes": 24}
    rows: list[dict[str, object]] = []
    for name, make in POLICIES.items():
        for what, figure in speeds(make, residents).items():
            rows.append(
                {
                    "name": f"{name} {what} at {residents} residents",
                    "value": round(figure, 1),
                    "unit": "bytes per resident" if what == "bytes" else "ns",
                    "against": "limit",
                    "against_value": limits[what],
                    "ratio": round(figure / limits[what], 2),
                    "target": 1.0,
                    "ok": figure <= limits[what],
                }
            )
    return rows


def sensitivity(traces: dict[str, list[Request]]) -> list[dict[str, object]]:
    """The default's hit rate at 3000 blocks with each constant halved and doubled."""
    rows: list[dict[str, object]] = []
    for name, requests in traces.items():
        usual = replay(requests, 3000, ValuePolicy())
        for module, constant in CONSTANTS:
            kept = getattr(module, constant)
            for factor in (0.5, 2):
                setattr(module, constant, type(kept)(kept * factor))
                rate = replay(requests, 3000, ValuePolicy())
                rows.append(
                    {
                        "name": f"{name} 3000 value, {constant} x{factor}",
                        "value": round(rate, 4),
                        "unit": "block hit rate",
                        "against": "as it is",
                        "against_value": round(usual, 4),
                        "ratio": round(rate / usual, 3),
                        "target": None,
                        "ok": True,
                    }
                )
            setattr(module, constant, kept)
    return rows


def show(row: dict[str, object]) -> None:
    way = row.get("way_from_lru_to_bound")
    print(
        f"{row['name']:<58} {row['value']:>9} {row['unit']:<18} {row['against']} "
        f"{row['against_value']}"
        + (f", {way:+.0%} of the way from LRU" if way is not None else ""),
        flush=True,
    )


def asked_for(
    paths: list[Path] | None, parser: argparse.ArgumentParser
) -> dict[str, list[Request]]:
    """The trace files named, or the usual one if it is there."""
    traces: dict[str, list[Request]] = {}
    for path in paths or [TRACE]:
        if path.exists():
            traces[path.stem] = read_trace(path)
        elif paths:
            parser.error(f"no trace at {path}")
        else:
            print(f"no trace at {path}: put one there, or name it with --trace", file=sys.stderr)
    return traces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, action="append", help=f"default {TRACE}")
    parser.add_argument("--no-synthetic", action="store_true")
    parser.add_argument("--sensitivity", action="store_true", help="only half and double constants")
    parser.add_argument("--residents", type=int, default=RESIDENTS, help="for the speeds; 0: none")
    parser.add_argument("--json", action="store_true", help="no table, only the JSON line")
    arguments = parser.parse_args()
    traces = asked_for(arguments.trace, parser)
    if not arguments.no_synthetic:
        traces |= synthetic()
    results: list[dict[str, object]] = []

    def add(rows: list[dict[str, object]]) -> None:
        results.extend(rows)
        if not arguments.json:
            for row in rows:
                show(row)

    if arguments.sensitivity:
        add(sensitivity(traces))
    else:
        for name, requests in traces.items():
            for capacity in CAPACITIES:
                add(compare(name, requests, capacity))
            for capacity in ADMISSION_CAPACITIES:
                add(admission_rows(name, requests, capacity))
        if arguments.residents:
            add(cost_rows(arguments.residents))
    print(json.dumps({"benchmark": "policy", "results": results}))


if __name__ == "__main__":
    main()
