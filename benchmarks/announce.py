"""What a node's stream for routers costs the daemon: telling a chunk, and telling everything.

Run by `make bench-announce`. Everything in one process, onto a plane that keeps nothing: what is
measured is the work on the daemon's event loop.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time

import numpy as np
import numpy.typing as npt

from kvbm.announce.catch_up import BLOCKS_AT_ONCE, CatchUpHandler
from kvbm.announce.engines import EngineFollowers
from kvbm.announce.stream import Stream
from kvbm.announce.tiers import TierAnnouncer
from kvbm.note import Note
from runtime.events.memory import NullPlane
from runtime.events.node_stream import CatchUp, encode_catch_up
from runtime.hashing import sequence_hashes
from runtime.requests import RequestContext
from storage_tiers.base import Key, TierName

BLOCKS = 1 << 20
BLOCKS_PER_CHUNK = 4
CHUNKS_PER_SEQUENCE = 64
COMMIT_CHUNKS = 16
ROUNDS = 5
SNAPSHOT_S_MAX = 0.3
CHUNK_US_MAX = 25.0

Keys = list[Key]


class Nobody:
    def stored(self, tier: TierName, keys: object) -> None:
        pass

    def removed(self, tier: TierName, keys: object) -> None:
        pass


def sequences(dice: np.random.Generator) -> list[tuple[Keys, list[bytes]]]:
    found = []
    blocks = BLOCKS_PER_CHUNK * CHUNKS_PER_SEQUENCE
    for _ in range(BLOCKS // blocks):
        local: npt.NDArray[np.uint64] = dice.integers(1, 1 << 63, blocks).astype(np.uint64)
        chain = sequence_hashes(local).tolist()
        keys, notes = [], []
        for at in range(0, blocks, BLOCKS_PER_CHUNK):
            parent = chain[at - 1] if at else None
            keys.append(Key(dice.bytes(16)))
            notes.append(Note(1, parent, local[at : at + BLOCKS_PER_CHUNK]).encode())
        found.append((keys, notes))
    return found


async def tell(tiers: TierAnnouncer, given: list[tuple[Keys, list[bytes]]]) -> tuple[float, float]:
    """Seconds to learn, and to store and tell, all chunks, as commits bring them."""
    learn_s = store_s = 0.0
    for keys, notes in given:
        for at in range(0, len(keys), COMMIT_CHUNKS):
            part = slice(at, at + COMMIT_CHUNKS)
            began = time.perf_counter()
            tiers.learn(keys[part], notes[part])
            learnt = time.perf_counter()
            tiers.stored(TierName.DRAM, keys[part])
            tiers.flush()
            store_s += time.perf_counter() - learnt
            learn_s += learnt - began
    return learn_s, store_s


async def snapshot(handler: CatchUpHandler) -> tuple[float, float, int]:
    """Seconds for everything, the longest step among them, and the bytes."""
    question = encode_catch_up(CatchUp())
    began = last = time.perf_counter()
    longest, size = 0.0, 0
    async for item in handler.answer(question, RequestContext("", {}, 0.0)):
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        size += len(item)
    return time.perf_counter() - began, longest, size


async def run() -> dict[str, list[float]]:
    stream = Stream(NullPlane(), "default", 1, ring_bytes_max=32 << 20)
    tiers = TierAnnouncer(stream, "node", Nobody(), linger_s=3600.0)
    handler = CatchUpHandler(stream, tiers, EngineFollowers(stream))
    given = sequences(np.random.default_rng(1))
    chunks = sum(len(keys) for keys, _ in given)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for _ in range(ROUNDS):
        learn_s, store_s = await tell(tiers, given)
        note("learn_us", learn_s / chunks * 1e6)
        note("tell_us", store_s / chunks * 1e6)
        note("bytes_per_chunk", tiers.status().used_bytes / chunks)
        whole_s, longest_s, size = await snapshot(handler)
        note("snapshot_s", whole_s)
        note("longest_step_s", longest_s)
        note("snapshot_bytes_per_block", size / BLOCKS)
        began = time.perf_counter()
        for keys, _ in given:
            tiers.removed(TierName.DRAM, keys)
            tiers.flush()
        note("remove_us", (time.perf_counter() - began) / chunks * 1e6)
    return found


def main() -> None:
    found = asyncio.run(run())
    rows = [
        ("learn_us", "us per chunk", None),
        ("tell_us", "us per chunk", CHUNK_US_MAX),
        ("remove_us", "us per chunk", CHUNK_US_MAX),
        ("bytes_per_chunk", "bytes", 64.0 + 8 * BLOCKS_PER_CHUNK),
        ("snapshot_s", f"s for {BLOCKS} blocks", SNAPSHOT_S_MAX),
        ("longest_step_s", f"s for at most {BLOCKS_AT_ONCE} blocks", 0.005),
        ("snapshot_bytes_per_block", "bytes", None),
    ]
    results = []
    for name, unit, target in rows:
        values = found[name]
        value = statistics.median(values)
        results.append(
            {
                "name": name,
                "value": value,
                "min": min(values),
                "max": max(values),
                "unit": unit,
                "target": target,
                "ok": target is None or value <= target,
            }
        )
        print(f"{name:28} {value:12.4g} {unit}")
    print(json.dumps({"benchmark": "announce", "results": results}))


if __name__ == "__main__":
    main()
