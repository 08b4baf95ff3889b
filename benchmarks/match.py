"""What a lookup costs with a million chunks resident, and what each of them costs the daemon.

A daemon process with host memory only; an engine's client fills it over the socket with chunks of
4 KiB, then asks for 512 keys at a time: half of the lookups hit everything, half nothing.

    python -m benchmarks.match [--chunks 1000000] [--rounds 200]
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from examples.demo.daemon import Daemon, DaemonConfig
from kvbm.cli.figures import Row, bounded, tell
from kvbm.client import Filled
from kvbm.protocol import MatchGroup
from kvbm.stand_in import StandIn
from storage_tiers.base import KEY_BYTES, Key

CHUNK_BYTES = 4096
KEYS = 512
MATCH_MS_MAX = 1.0
BYTES_PER_CHUNK_MAX = 128.0


def random_key() -> Key:
    return Key(secrets.token_bytes(KEY_BYTES - 1) + b"\0")  # of no tenant


def anonymous_bytes(pid: int) -> int:
    """The process's own memory, without the arena, which is shared memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def fill(engine: StandIn, count: int) -> list[list[Key]]:
    """Chains of `KEYS` chunks each, committed without writing a byte."""
    chains: list[list[Key]] = []
    while count > 0:
        chain = [random_key() for _ in range(KEYS)]
        parents: list[Key | None] = [None, *chain[:-1]]
        done = 0
        while done < KEYS:
            engine.client.pump()
            slots = engine.client.take_slots(0, KEYS - done)
            filled = [
                Filled(chain[done + i], parents[done + i], done + i, slot)
                for i, slot in enumerate(slots)
            ]
            if filled:
                engine.client.commit(filled)
                done += len(filled)
            else:
                time.sleep(0.001)
        chains.append(chain)
        count -= KEYS
    return chains


def ask_ms(engine: StandIn, keys: Sequence[Key]) -> float:
    """Milliseconds from asking to the answer applied."""
    group = MatchGroup(16, 0, b"".join(keys))
    began = time.perf_counter()
    lookup = engine.client.look_up([group], list(keys))
    assert lookup is not None
    while not lookup.answered:
        time.sleep(0.0001)  # the link has a thread of its own
        engine.client.pump()
    took_ms = 1e3 * (time.perf_counter() - began)
    engine.client.forget(lookup)
    return took_ms


def measure(daemon: Daemon, chunks: int, rounds: int) -> list[Row]:
    daemon.start()
    before = anonymous_bytes(daemon.process.pid)
    with StandIn(daemon.socket, CHUNK_BYTES, lease_chunks=4 * KEYS) as engine:
        chains = fill(engine, chunks)
        while daemon.kept_chunks()["G2"] < chunks:
            time.sleep(0.1)
        per_chunk = (anonymous_bytes(daemon.process.pid) - before) / chunks
        hits: list[float] = []
        misses: list[float] = []
        for number in range(rounds):
            hits.append(ask_ms(engine, chains[number * 7919 % len(chains)]))
            absent = [random_key() for _ in range(KEYS)]
            misses.append(ask_ms(engine, absent))
    return [
        bounded(f"match of {KEYS} keys, all there", "ms", hits, MATCH_MS_MAX),
        bounded(f"match of {KEYS} keys, none there", "ms", misses, MATCH_MS_MAX),
        bounded("daemon's memory a chunk", "B", [per_chunk], BYTES_PER_CHUNK_MAX),
    ]


def run(chunks: int, rounds: int) -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="kvbm-match-"))
    config = DaemonConfig(
        folder=folder,
        socket=folder / "s",
        logs=folder,
        records=folder,
        ssd=None,
        dram=f"{(chunks * CHUNK_BYTES * 3 // 2) >> 20}MiB",
    )
    daemon = Daemon(config)
    try:
        return measure(daemon, chunks, rounds)
    finally:
        daemon.process.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=1_000_000, help="resident")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    tell("match", run(arguments.chunks, arguments.rounds))


if __name__ == "__main__":
    main()
