"""What `kvbm bench tiers` does: chunks of random bytes through a daemon and back, timed, compared.

Figures are GB/s of the engine's side: storing ends when the daemon has what was asked for (in host
memory, or on the SSD with checksum and catalogue), loading when the bytes are copied out.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from kvbm.cli.client import AdminClient, Failure, Json
from kvbm.cli.figures import Row, bounded, compared
from kvbm.cli.limits import BareFile, aligned, copy
from kvbm.cli.temporary import TemporaryDaemon
from kvbm.stand_in import StandIn
from runtime.units import format_size, parse_size
from storage_tiers.base import KEY_BYTES, Chunk, Key, StoreItem

FLUSH_S = 120.0
# A stand-in that leaves is no news; the command says what went wrong itself.
logging.getLogger("kvbm").addHandler(logging.NullHandler())

CHUNK_BYTES_MAX = 64 << 20
TOTAL_BYTES_MAX = 16 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes; `count` chunks are moved each way in each round."""

    chunk: int
    count: int
    rounds: int

    @classmethod
    def of(cls, chunk: str, total: str, rounds: int) -> Self:
        """Raises Failure for sizes that cannot be measured."""
        try:
            size, whole = parse_size(chunk), parse_size(total)
        except ValueError as error:
            raise Failure(str(error)) from error
        if size % 4096 or not 4096 <= size <= CHUNK_BYTES_MAX:
            raise Failure(f"--chunk {chunk}: a multiple of 4KiB up to 64MiB can be measured")
        if not size <= whole <= TOTAL_BYTES_MAX:
            raise Failure(f"--total {total}: from one chunk up to 16GiB can be measured")
        return cls(size, whole // size, rounds)

    @property
    def total(self) -> int:
        return self.chunk * self.count


@dataclass(slots=True)
class _Speeds:
    """GB/s of one way, by round, beside the limit's."""

    name: str
    against: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


class _Bench:
    """Buffers and clocks of one run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sources = aligned(plan.count, plan.chunk)
        self.targets = aligned(plan.count, plan.chunk)
        label = format_size(plan.chunk)
        self.store_g2 = _Speeds(f"engine to G2, {label}", "memcpy")
        self.load_g2 = _Speeds(f"G2 to engine, {label}", "memcpy")
        self.store_g3 = _Speeds(f"engine to G3, {label}", "O_DIRECT")
        self.load_g3 = _Speeds(f"G3 to engine, {label}", "O_DIRECT")

    def items(self, tag: int) -> list[StoreItem]:
        """The same bytes under keys that nobody has, of the tenant with this tag."""
        keys = [Key(secrets.token_bytes(KEY_BYTES - 1) + bytes([tag])) for _ in self.sources]
        return [
            StoreItem(Chunk(key, self.plan.chunk, 0, keys[at - 1] if at else None, at), source)
            for at, (key, source) in enumerate(zip(keys, self.sources, strict=True))
        ]

    def rate(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return self.plan.total / (time.perf_counter() - began) / 1e9

    def store(self, engine: StandIn, items: list[StoreItem], client: AdminClient) -> None:
        """Into host memory, and down from there as far as it goes."""
        began = time.perf_counter()
        self.store_g2.ours.append(self.rate(lambda: engine.store(items)))
        answer = client.post("/v1/flush", wait_s=FLUSH_S)
        if not answer["done"]:
            raise Failure(f"after {FLUSH_S:g} s {answer['left_chunks']} chunks were not written")
        self.store_g3.ours.append(self.plan.total / (time.perf_counter() - began) / 1e9)

    def load(self, engine: StandIn, items: list[StoreItem], speeds: _Speeds) -> None:
        for target in self.targets:
            target[:8] = bytes(8)  # what does not come must not look as if it had
        keys = [item.chunk.key for item in items]
        speeds.ours.append(self.rate(lambda: engine.load(keys, self.targets)))
        wrong = sum(a != b for a, b in zip(self.sources, self.targets, strict=True))
        if wrong:
            raise Failure(f"{speeds.name}: {wrong} of {self.plan.count} chunks did not come back")

    def limits(self, bare: BareFile | None) -> None:
        for speeds in (self.store_g2, self.load_g2):
            speeds.theirs.append(self.rate(lambda: copy(self.sources, self.targets)))
        if bare is not None:
            size = self.plan.chunk
            self.store_g3.theirs.append(self.rate(lambda: bare.write(self.sources, size)))
            self.load_g3.theirs.append(self.rate(lambda: bare.read(self.targets, size)))

    def rows(self) -> list[Row]:
        """What was measured; beside its limit where that was measured too."""
        every = (self.store_g2, self.load_g2, self.store_g3, self.load_g3)
        return [
            compared(s.name, "GB/s", s.ours, s.against, s.theirs)
            if s.theirs
            else bounded(s.name, "GB/s", s.ours, None)
            for s in every
            if s.ours
        ]


def measure_temporary(plan: Plan, folder: Path) -> list[Row]:
    """With a daemon of its own, whose files lie in `folder` meanwhile. Raises Failure."""
    try:
        with tempfile.TemporaryDirectory(prefix=".kvbm-bench-", dir=folder) as inside:
            bare = BareFile(Path(inside) / "bare", plan.total)
            bench = _Bench(plan)
            try:
                _rounds(bench, TemporaryDaemon(Path(inside), _settings(plan, Path(inside))), bare)
            finally:
                bare.close()
            return bench.rows()
    except TimeoutError as error:
        raise Failure(f"the temporary daemon is too slow: {error}") from error
    except OSError as error:
        raise Failure(f"cannot measure in {folder.absolute()}: {error}; see --folder") from error


def measure_running(plan: Plan, client: AdminClient) -> list[Row]:
    """With the daemon that `client` asks, which has to be this user's on this node."""
    process: Json = client.get("/v1/node")["process"]
    if process["uid"] != os.getuid():
        raise Failure(
            f"the daemon runs as user {process['uid']}: run this as that user, on its node"
        )
    if process["host_memory_bytes"] < 2 * plan.total:
        raise Failure(f"host memory has to hold twice --total {format_size(plan.total)}")
    bench = _Bench(plan)
    try:
        with _engine(Path(process["socket"]), plan) as engine:
            for _ in range(plan.rounds):
                items = bench.items(engine.client.tag)
                bench.store(engine, items, client)
                bench.load(engine, items, bench.load_g2)
                bench.limits(None)
    except TimeoutError as error:
        raise Failure(f"{error}; its log says more. Tenants' daemons serve tenants only") from error
    bench.store_g3.name = f"engine to all tiers, {format_size(plan.chunk)}"
    return bench.rows()


def _rounds(bench: _Bench, daemon: TemporaryDaemon, bare: BareFile) -> None:
    plan = bench.plan
    with daemon:
        for _ in range(plan.rounds):
            with _engine(daemon.socket, plan) as engine:
                items = bench.items(engine.client.tag)
                bench.store(engine, items, daemon.client)
                bench.load(engine, items, bench.load_g2)
            daemon.restart()  # host memory is empty then: what comes, comes from the SSD
            with _engine(daemon.socket, plan) as engine:
                bench.load(engine, items, bench.load_g3)
            bench.limits(bare)


def _engine(socket: Path, plan: Plan) -> StandIn:
    return StandIn(socket, plan.chunk, lease_chunks=plan.count)


def _settings(plan: Plan, folder: Path) -> dict[str, object]:
    room = 2 * plan.total + (64 << 20)
    return {
        "dram.capacity": room,
        "lease.fraction": 0.5,  # all chunks of a round find a slot at once
        "onboard.max_bytes_in_flight": room // 4,
        "offload.queue_chunks": max(4096, plan.count),
        "ssd.path": folder / "ssd",
        "ssd.capacity": (plan.rounds + 1) * plan.total + (64 << 20),
    }
