"""Run as a program by the soak: one engine that loads what is kept and stores what is not.

What a chunk holds follows from its name, so every byte that comes back is checked, whoever stored
it. Names move on with the time since the soak began: chains are used often while they are young,
ever more rarely later, and new ones come, so that nothing that grows with the number of chunks
ever seen stays hidden.

    python -m tests.soak.engine SOCKET CHUNK_BYTES SEED LIFE_S BEGAN

`BEGAN` in seconds since 1970. Prints one JSON line with what it did; status 1 on a wrong byte.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kvbm.stand_in import StandIn
from storage_tiers.base import StoreItem
from storage_tiers.testing import make_items

CHAIN_CHUNKS_MAX = 8
NEW_CHAINS_PER_S = 0.5
AGE_CHAINS = 150  # mean age of a chain that is used
PAUSE_S = 0.1


@dataclass(slots=True)
class Done:
    """Chunks that one engine moved."""

    stored: int = 0
    fetched: int = 0
    missed: int = 0


def chain_of(chunk_bytes: int, number: int) -> list[StoreItem]:
    name = f"soak {chunk_bytes} {number}"
    length = random.Random(name).randint(1, CHAIN_CHUNKS_MAX)
    return make_items(name, length, chunk_bytes)


def step(engine: StandIn, items: list[StoreItem], done: Done) -> None:
    """As an engine does: load the longest prefix there is, compute and store the rest."""
    found = engine.fetch([item.chunk.key for item in items])
    for got, item in zip(found, items, strict=True):
        assert got is None or got == bytes(item.data), f"wrong bytes for {item.chunk.key.hex()}"
    missing = [item for got, item in zip(found, items, strict=True) if got is None]
    engine.client.report_loaded(sum(len(got) for got in found if got is not None), failed=0)
    done.fetched += len(items) - len(missing)
    done.missed += len(missing)
    if missing:
        done.stored += engine.offer(missing)


def run(socket: Path, chunk_bytes: int, seed: int, life_s: float, began: float) -> Done:
    dice = random.Random(seed)
    done = Done()
    end = time.monotonic() + life_s
    with StandIn(socket, chunk_bytes, lease_chunks=2 * CHAIN_CHUNKS_MAX) as engine:
        while time.monotonic() < end:
            newest = int((time.time() - began) * NEW_CHAINS_PER_S)
            step(
                engine, chain_of(chunk_bytes, newest - int(dice.expovariate(1 / AGE_CHAINS))), done
            )
            time.sleep(PAUSE_S)
    return done


if __name__ == "__main__":
    where, size, number, life, start = sys.argv[1:]
    result = run(Path(where), int(size), int(number), float(life), float(start))
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
