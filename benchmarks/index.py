"""What hashing and the router's index cost, called from Python and measured to completion.

Hashing against the xxhash library called per block; events gathered and applied to an empty index
until it has a million blocks, growth included, against bare memory: as many reads and writes of
random words of a table as large; what the longest call takes meanwhile, and while a million
blocks of a cleared worker are swept out; searches in an index of two million blocks, in chains
just used and in chains not looked at before; memory as the resident bytes of fresh processes.
Blocks are called by their sequence hashes, as in a node's stream, or by names of an engine's own.

A Python that has another project's `RadixTree` (`dynamo.llm`) may be named: it is fed the same
blocks, in turns with ours.

    python -m benchmarks.index [--rounds 5] [--reference-python PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numba import types, uint64
from numpy.typing import NDArray

from kvbm.cli.figures import Row, bounded, compared, interleaved, tell
from router.changes import Changes
from router.index import Index, Outcome, Tier, WorkerId
from runtime.hashing import SEED, block_hashes, sequence_hashes
from runtime.native import READ_U64, kernel, load64, prefetch, store64

CHAIN = 2048
STORED = 1 << 20
MILLION = 488 * CHAIN
SEARCHED = 1 << 21
CAPACITY = 1 << 24
COLD_CHAINS = 200
HASH_MTOKENS_S_MIN = 300.0
STORED_M_S_MIN = 5.0
FIND_US_MAX = {(128, "hot"): 5.0, (128, "cold"): 15.0, (2048, "hot"): 40.0, (2048, "cold"): None}
BYTES_MAX = 40.0
BACK_MIN = 0.9
GATHERED = 4096  # blocks of events, for one call
PAUSE_MS_MAX = 5.0
ROWS_S_MAX = 0.3

U64 = NDArray[np.uint64]
Event = tuple[int | None, U64, U64]


def at_least(name: str, unit: str, values: Sequence[float], least: float) -> Row:
    row = bounded(name, unit, values, None)
    return row | {"target": least, "ok": row["value"] >= least}


def random_words(count: int, seed: int) -> U64:
    return np.random.default_rng(seed).integers(0, 2**63, count, dtype=np.uint64)


def hashing(block_tokens: int, rounds: int) -> list[Row]:
    tokens = np.random.default_rng(1).integers(0, 1 << 17, 1 << 20).astype(np.uint32)
    data, size = tokens.tobytes(), 4 * block_tokens

    def ours() -> float:
        began = time.perf_counter()
        block_hashes(tokens, block_tokens)
        return len(tokens) / (time.perf_counter() - began) / 1e6

    def theirs() -> float:
        digest = xxhash.xxh3_64_intdigest
        began = time.perf_counter()
        hashes = [digest(data[n : n + size], seed=SEED) for n in range(0, len(data), size)]
        assert len(hashes) == len(tokens) // block_tokens
        return len(tokens) / (time.perf_counter() - began) / 1e6

    values = interleaved(rounds, ours, theirs)
    name = f"hashing, {block_tokens} tokens a block"
    row = compared(name, "Mtok/s", values[0], "xxhash per block", values[1])
    row |= {"target": HASH_MTOKENS_S_MIN, "ok": row["value"] >= HASH_MTOKENS_S_MIN}
    return [row]


def chains(count: int) -> tuple[U64, U64]:
    """Sequence hashes and tokens' hashes, in chains of `CHAIN`."""
    tokens = random_words(count, 3)
    return np.concatenate(
        [sequence_hashes(tokens[n : n + CHAIN]) for n in range(0, count, CHAIN)]
    ), tokens


def events(count: int, batch: int, own: bool = False) -> list[Event]:
    names, tokens = chains(count)
    if own:
        names = random_words(count, 2)
    return [
        (
            None if n % CHAIN == 0 else int(names[n - 1]),
            names[n : n + batch],
            tokens[n : n + batch],
        )
        for n in range(0, count, batch)
    ]


def store(index: Index, worker: WorkerId, given: Sequence[Event]) -> float:
    """Millions of blocks a second of this thread's processor time: other programs do not count."""
    began = time.thread_time()
    for parent, names, tokens in given:
        index.stored(worker, Tier.G1, parent, names, tokens)
    took_s = time.thread_time() - began
    assert index.outcomes_total[Outcome.DONE] >= len(given)
    return sum(len(names) for _, names, _ in given) / took_s / 1e6


def apply(index: Index, workers: tuple[WorkerId, ...], given: Sequence[Event]) -> float:
    """The same, as a reader of events does it: gathered, then applied."""
    together = max(1, GATHERED // len(given[0][1]))
    began = time.thread_time()
    for first in range(0, len(given), together):
        changes = Changes()
        for parent, names, tokens in given[first : first + together]:
            changes.stored(workers, Tier.G1, parent, names, tokens)
        assert not index.apply(changes).any()
    took_s = time.thread_time() - began
    return sum(len(names) for _, names, _ in given) / took_s / 1e6


@kernel(types.void(types.int64, types.int64, READ_U64))
def touch(table, words, places):  # type: ignore[no-untyped-def]
    """Read and write a random word for each place; asked for before, as the index does."""
    for n in range(len(places)):
        if n + 32 < len(places):
            prefetch(table + 8 * types.int64(places[n + 32] % uint64(words)))
        at = types.int64(places[n] % uint64(words))
        store64(table, at, load64(table, at) + uint64(1))


def memory_limit(count: int) -> float:
    """Millions a second, in a table as large as a million blocks' is, touched before."""
    table = np.ones((10 * count) // 8, dtype=np.uint64)
    places = random_words(count, 9)
    began = time.thread_time()
    touch(table.ctypes.data, len(table), places)
    return count / (time.thread_time() - began) / 1e6


def storing(batch: int, rounds: int) -> list[Row]:
    columns: list[list[float]] = [[], [], [], [], [], []]
    given, own = events(STORED, batch), events(STORED, batch, own=True)
    for _ in range(rounds):
        index, named, single = Index(CAPACITY), Index(CAPACITY), Index(CAPACITY)
        columns[0].append(apply(index, (WorkerId(1),), given))
        columns[1].append(memory_limit(STORED))
        columns[2].append(apply(index, (WorkerId(2),), given))
        columns[3].append(apply(index, tuple(WorkerId(n) for n in range(3, 11)), given))
        columns[4].append(apply(named, (WorkerId(1),), own))
        columns[5].append(store(single, WorkerId(1), given))
    new, limit, known, eight, named_own, alone = columns
    row = compared(f"applied, {batch} a batch, new blocks", "M/s", new, "bare memory", limit)
    return [
        row | {"target": STORED_M_S_MIN, "ok": row["value"] >= STORED_M_S_MIN},
        at_least(f"applied, {batch} a batch, known ones", "M/s", known, STORED_M_S_MIN),
        bounded(f"applied, {batch} a batch, known ones, 8 workers at once", "M/s", eight, None),
        at_least(f"applied, {batch} a batch, names of its own", "M/s", named_own, STORED_M_S_MIN),
        bounded(f"stored, {batch} a call, new blocks", "M/s", alone, None),
    ]


def rows_at_once(rounds: int) -> list[Row]:
    """A snapshot: a million blocks in any order."""
    names, tokens = chains(STORED)
    parents = np.zeros(STORED, dtype=np.uint64)
    parents[1:] = names[:-1]
    parents[::CHAIN] = 0
    order = np.random.default_rng(7).permutation(STORED)
    shuffled = parents[order], tokens[order]
    rows = []
    for workers in (1, 8):
        group = [WorkerId(n) for n in range(workers)]
        took: list[float] = []
        for _ in range(rounds):
            index = Index(CAPACITY)
            began = time.thread_time()
            assert index.stored_rows(group, Tier.G2, *shuffled) is Outcome.DONE
            took.append(time.thread_time() - began)
            assert int(index.find(tokens[:CHAIN]).reach[Tier.G2].min()) == CHAIN
        name = f"rows of 2^20 blocks, any order, {workers} workers"
        rows.append(bounded(name, "s", took, ROWS_S_MAX))
    return rows


def pauses(rounds: int) -> list[Row]:
    """By processor time of the calls: how long one that comes at a bad moment takes."""
    kinds: dict[str, list[list[float]]] = {}

    def timed(kind: str, calls: Sequence[Callable[[], object]]) -> None:
        took = []
        for call in calls:
            began = time.thread_time()
            call()
            took.append(1e3 * (time.thread_time() - began))
        kinds.setdefault(kind, []).append(took)

    def storing_of(index: Index, worker: WorkerId, event: Event) -> Callable[[], object]:
        return lambda: index.stored(worker, Tier.G1, *event)

    def removing_of(index: Index, worker: WorkerId, event: Event) -> Callable[[], object]:
        return lambda: index.removed(worker, Tier.G1, event[1])

    given, own = events(STORED, 128), events(STORED, 128, own=True)
    more = [(None, random_words(128, 100 + n), random_words(128, 100 + n)) for n in range(2000)]
    for _ in range(rounds):
        index, named = Index(CAPACITY), Index(CAPACITY)
        timed("growing", [storing_of(index, WorkerId(1), event) for event in given])
        timed("growing, names of its own", [storing_of(named, WorkerId(1), e) for e in own])
        timed("clearing", [lambda index=index: index.cleared(WorkerId(1))])  # type: ignore[misc]
        assert len(index) == 0 and not index.find(given[0][2]).reach.any()
        timed("after clearing", [storing_of(index, WorkerId(1), event) for event in more])
        timed("removing", [removing_of(named, WorkerId(1), event) for event in own])
    rows = []
    for kind, rounds_of in kinds.items():
        longest = [max(took) for took in rounds_of]
        rows.append(bounded(f"longest call, 2^20 blocks, {kind}", "ms", longest, PAUSE_MS_MAX))
        if kind != "clearing":
            rare = [sorted(took)[-1 - len(took) // 1000] for took in rounds_of]
            rows.append(bounded(f"p99.9 of calls, 2^20 blocks, {kind}", "ms", rare, PAUSE_MS_MAX))
    return rows


def find_us(index: Index, chain: U64, expected: int) -> float:
    began = time.perf_counter()
    matches = index.find(chain)
    took_us = 1e6 * (time.perf_counter() - began)
    assert int(matches.reach[Tier.G1].max()) == expected
    return took_us


def finding(workers: int) -> list[Row]:
    """Every worker holds the chains, each to a depth of its own where there are several."""
    index = Index(CAPACITY)
    base = events(SEARCHED, CHAIN)
    for parent, names, tokens in base:
        index.stored(WorkerId(0), Tier.G1, parent, names, tokens)
    for number in range(1, workers):
        depth = CHAIN * (number % 16 + 1) // 16
        for parent, names, tokens in base[:: 1 if workers <= 8 else 16]:
            index.stored(WorkerId(number), Tier.G1, parent, names[:depth], tokens[:depth])
    rows = []
    chains = [tokens.copy() for _, _, tokens in base[:: 1 if workers <= 8 else 16]]
    order = np.random.default_rng(4).permutation(len(chains))
    trash = np.ones(8 << 20)
    for length in (128, 2048):
        hot = [find_us(index, chains[0][:length], length) for _ in range(400)]
        trash += 1  # 64 MiB: what was in the caches is not there any more
        cold = [find_us(index, chains[n][:length], length) for n in order[:COLD_CHAINS]]
        for kind, values in (("hot", hot[100:]), ("cold", cold)):
            name = f"find {length}, {kind}, {workers} workers"
            rows.append(bounded(name, "us", values, FIND_US_MAX[length, kind]))
    return rows


def finding_fragments() -> list[Row]:
    """Chains stored block by block, 256 of them in turns: no block lies beside its parent."""
    index, chains = Index(CAPACITY), 256
    names = random_words(chains * CHAIN, 5).reshape(chains, CHAIN)
    tokens = random_words(chains * CHAIN, 6).reshape(chains, CHAIN)
    for n in range(CHAIN):
        for chain in range(chains):
            parent = int(names[chain, n - 1]) if n else None
            one = slice(n, n + 1)
            index.stored(WorkerId(1), Tier.G1, parent, names[chain, one], tokens[chain, one])
    return [
        bounded(
            f"find {length}, cold, stored in single blocks",
            "us",
            [find_us(index, chain[:length].copy(), length) for chain in tokens],
            None,
        )
        for length in (128, 2048)
    ]


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024


def memory_child(workers: int, own: bool) -> None:
    """Prints bytes before, with a million blocks on each of `workers`, and without them."""
    warm = Index(CAPACITY)
    store(warm, WorkerId(1), events(CHAIN, 128, own))
    warm.remove_worker(WorkerId(1))
    warm.find(random_words(1, 1))
    given = events(MILLION, 128, own)
    before = resident_bytes()
    index = Index(CAPACITY)
    for number in range(workers):
        store(index, WorkerId(number), given)
    full = resident_bytes()
    for number in range(workers):
        for _, names, _ in given:
            index.removed(WorkerId(number), Tier.G1, names)
    while index.upkeep():
        pass
    print(json.dumps([before, full, resident_bytes(), len(index)]))


def memory(workers: int, own: bool) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.index", "--memory-of", str(workers)]
    command += ["--own"] if own else []
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    before, full, after, left = json.loads(told)
    assert left == 0
    each = (full - before) / (MILLION * workers)
    back = (full - after) / (full - before)
    of = f"{workers} workers, names of their own" if own else f"{workers} workers"
    return [
        bounded(f"resident a block and worker, 1 M blocks on {of}", "B", [each], BYTES_MAX),
        at_least(f"given back, of {of}", "part", [back], BACK_MIN),
    ]


_REFERENCE = """
import json, random, sys, time
from dynamo.llm import RadixTree
batch, chain, count = (int(a) for a in sys.argv[1:4])
draw = random.Random(1)
names = [draw.getrandbits(63) for _ in range(count)]
tokens = [draw.getrandbits(63) for _ in range(count)]
given = []
for n in range(0, count, batch):
    blocks = [{"block_hash": names[i], "tokens_hash": tokens[i], "mm_extra_info": None}
              for i in range(n, n + batch)]
    parent = names[n - 1] if n % chain else None
    data = {"stored": {"parent_hash": parent, "start_position": None, "blocks": blocks}}
    given.append(json.dumps({"event_id": n, "data": data, "dp_rank": 0}).encode())
tree = RadixTree()
began = time.perf_counter()
for event in given:
    tree.apply_event(1, event)
assert list(tree.find_matches(tokens[:128]).scores.values()) == [128]
stored_s = time.perf_counter() - began
took = {}
for length in (128, 2048):
    times = []
    for _ in range(300):
        began = time.perf_counter()
        tree.find_matches(tokens[:length])
        times.append(1e6 * (time.perf_counter() - began))
    took[length] = sorted(times)[150]
print(json.dumps([count / stored_s / 1e6, took[128], took[2048]]))
"""


def against_reference(python: str, rounds: int) -> list[Row]:
    """Both with one worker and 2^18 blocks; theirs includes decoding its events from JSON."""
    count, rows = 1 << 18, []
    for batch in (16, 128):
        given = events(count, batch)
        ours: list[list[float]] = []
        theirs: list[list[float]] = []
        for _ in range(rounds):
            index = Index(CAPACITY)
            figures = [apply(index, (WorkerId(1),), given)]
            whole = np.concatenate([tokens for _, _, tokens in given[: CHAIN // batch]])
            for length in (128, 2048):
                times = [find_us(index, whole[:length], length) for _ in range(300)]
                figures.append(statistics.median(times))
            ours.append(figures)
            command = [python, "-c", _REFERENCE, str(batch), str(CHAIN), str(count)]
            told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            theirs.append(json.loads(told.stdout))
        units: list[tuple[str, str, Callable[[float], float]]] = [
            (f"applied, {batch} a batch", "M/s", lambda value: value),
            (f"find 128, hot, batches of {batch}", "us", lambda value: value),
            (f"find 2048, hot, batches of {batch}", "us", lambda value: value),
        ]
        for n, (name, unit, _) in enumerate(units):
            mine, other = [f[n] for f in ours], [f[n] for f in theirs]
            rows.append(compared(name, unit, mine, "RadixTree", other))
    return rows


def run(rounds: int, reference: str | None) -> list[Row]:
    rows = [row for size in (16, 64, 512) for row in hashing(size, rounds)]
    rows += [row for batch in (16, 64, 128) for row in storing(batch, rounds)]
    rows += [row for workers in (1, 8, 64, 256) for row in finding(workers)]
    rows += finding_fragments()
    rows += pauses(rounds)
    rows += rows_at_once(rounds)
    rows += [row for own in (False, True) for workers in (1, 8) for row in memory(workers, own)]
    if reference is None:
        print("RadixTree: not compared; --reference-python names none", file=sys.stderr)
    else:
        rows += against_reference(reference, rounds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference-python", help="an interpreter that has dynamo.llm")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of is not None:
        memory_child(arguments.memory_of, arguments.own)
    else:
        tell("index", run(arguments.rounds, arguments.reference_python))


if __name__ == "__main__":
    main()
