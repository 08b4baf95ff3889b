"""The workers a router chooses from, as columns: what each can do and what it is busy with.

A worker is one data-parallel rank of one engine. It has a row here, which is used again after the
worker has gone. Costs are computed over whole columns.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from router.index import WorkerId

ROWS_MIN: Final = 16

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a worker takes. Assumptions until it has been measured.

    Prefill from token `a` to `b` of a sequence takes
    `prefill_s_per_token * (b - a) + prefill_s_per_token2 * (b**2 - a**2) / 2` seconds: a linear
    part, and attention, which each token pays for all before it. A decode step takes
    `step_s + step_s_per_request * requests + step_s_per_block * blocks`.
    """

    prefill_s_per_token: float = 1e-4
    prefill_s_per_token2: float = 0.0
    step_s: float = 1e-2
    step_s_per_request: float = 0.0
    step_s_per_block: float = 0.0
    load_s_per_block: tuple[float, float, float] = (1e-4, 1e-3, 2e-3)  # from g2, g3, g4
    load_latency_s: tuple[float, float, float] = (1e-3, 5e-3, 5e-2)


@dataclass(frozen=True, slots=True)
class Capacity:
    """None where a worker has not said."""

    kv_blocks: int | None = None
    batch_tokens_max: int | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    id: WorkerId
    speed: Speed = field(default_factory=Speed)
    capacity: Capacity = field(default_factory=Capacity)
    taints: frozenset[str] = frozenset()
    accepting: bool = True  # no: it finishes what it has and is sent nothing more
    healthy: bool = True  # no: it serves, but its health check has not passed


def parse_worker(text: str) -> WorkerId:
    """Of `INSTANCE.RANK`, as a worker is printed, or `INSTANCE` for rank 0; raises ValueError."""
    instance, dot, rank = text.partition(".")
    if not re.fullmatch(r"[0-9a-f]{1,16}", instance) or (dot and not re.fullmatch("[0-9]+", rank)):
        raise ValueError(f"{text!r} is no worker; accepted: INSTANCE.RANK, as in 1f2e.0")
    return WorkerId(int(instance, 16), int(rank or 0))


class WorkerError(Exception):
    """A worker that is not here, or is here already."""


class Workers:
    """One thread calls it. Columns are read by the cost functions and never kept: they grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._rows: dict[WorkerId, int] = {}
        self._free: list[int] = []
        self._workers: list[Worker | None] = []
        self._generation = 0
        self._unwell = 0
        self._allocate(ROWS_MIN)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._rows

    def __iter__(self) -> Iterator[Worker]:
        return (worker for worker in self._workers if worker is not None)

    @property
    def rows(self) -> int:
        """Of the columns; some may be free."""
        return len(self._workers)

    @property
    def generation(self) -> int:
        """Changes whenever a worker comes or goes."""
        return self._generation

    def add(self, worker: Worker) -> int:
        """The worker's row. Raises WorkerError if it is there."""
        if worker.id in self._rows:
            raise WorkerError(f"worker {worker.id} is registered already")
        row = self._free.pop() if self._free else len(self._workers)
        if row == len(self._workers):
            if row == len(self.present):
                self._grow()
            self._workers.append(None)
        self._rows[worker.id] = row
        self._put(row, worker)
        self._generation += 1
        self.prefill_tokens[row] = self.prefill_s[row] = self.head_s[row] = 0.0
        self.blocks[row] = self.requests[row] = 0.0
        return row

    def change(self, worker: Worker) -> None:
        """What is known of it is different now. Raises WorkerError if it is not there."""
        self._put(self.row(worker.id), worker)

    def remove(self, worker: WorkerId) -> int:
        """The row it had. Raises WorkerError if it is not there."""
        row = self.row(worker)
        del self._rows[worker]
        self._workers[row] = None
        self._unwell -= not self.healthy[row]
        self.present[row] = self.accepting[row] = self.healthy[row] = False
        self._free.append(row)
        self._generation += 1
        return row

    def get(self, worker: WorkerId) -> Worker | None:
        row = self._rows.get(worker)
        return None if row is None else self._workers[row]

    def row(self, worker: WorkerId) -> int:
        try:
            return self._rows[worker]
        except KeyError:
            raise WorkerError(f"worker {worker} is not registered") from None

    def at(self, row: int) -> Worker:
        worker = self._workers[row]
        assert worker is not None, f"row {row} is free"
        return worker

    def mask(self, workers: frozenset[WorkerId] | None) -> Bools:
        """Rows of these workers, of all if None, as far as they are here and take requests."""
        if workers is None:
            return self.accepting[: self.rows].copy()
        mask = np.zeros(self.rows, dtype=np.bool_)
        for worker in workers:
            row = self._rows.get(worker)
            if row is not None:
                mask[row] = self.accepting[row]
        return mask

    def well(self, rows: Bools) -> Bools:
        """Those of these rows that are healthy; all, if none is."""
        if not self._unwell:
            return rows
        healthy = rows & self.healthy[: self.rows]
        return healthy if healthy.any() else rows

    def waits_s(self) -> Floats:
        """Seconds until all prompts are computed that were assigned: by the row, as of now.

        Prompts are computed one after another, so what has passed since the latest first token has
        gone into the one that is first; at most as much as it was expected to take, and nothing
        where prompts wait for memory.
        """
        rows = slice(self.rows)
        begun = np.minimum(self.clock() - self.head_since_s[rows], self.head_s[rows])
        begun[self.blocks[rows] > self.kv_blocks[rows]] = 0.0
        waits: Floats = self.prefill_s[rows] - np.maximum(begun, 0.0)
        return waits

    def check_integrity(self) -> None:
        taken = sorted(self._rows.values())
        assert taken == np.flatnonzero(self.present).tolist()
        assert sorted([*taken, *self._free]) == list(range(self.rows))
        for worker, row in self._rows.items():
            assert self.at(row).id == worker
            assert self.accepting[row] == self.at(row).accepting
            assert self.healthy[row] == self.at(row).healthy
        assert self._unwell == np.count_nonzero(self.present & ~self.healthy)

    def _put(self, row: int, worker: Worker) -> None:
        speed, capacity = worker.speed, worker.capacity
        self._workers[row] = worker
        self._unwell += (not worker.healthy) - bool(self.present[row] and not self.healthy[row])
        self.present[row] = True
        self.accepting[row] = worker.accepting
        self.healthy[row] = worker.healthy
        self.prefill_a[row] = speed.prefill_s_per_token
        self.prefill_q[row] = speed.prefill_s_per_token2
        self.step[:, row] = speed.step_s, speed.step_s_per_request, speed.step_s_per_block
        self.load_s_per_block[:, row] = speed.load_s_per_block
        self.load_latency_s[:, row] = speed.load_latency_s
        self.kv_blocks[row] = capacity.kv_blocks or np.inf
        self.batch_tokens_max[row] = capacity.batch_tokens_max or np.inf

    def _allocate(self, rows: int) -> None:
        self.present: Bools = np.zeros(rows, dtype=np.bool_)
        self.accepting: Bools = np.zeros(rows, dtype=np.bool_)
        self.healthy: Bools = np.zeros(rows, dtype=np.bool_)
        self.prefill_a: Floats = np.zeros(rows)
        self.prefill_q: Floats = np.zeros(rows)
        self.step: Floats = np.zeros((3, rows))
        self.load_s_per_block: Floats = np.zeros((3, rows))
        self.load_latency_s: Floats = np.zeros((3, rows))
        self.kv_blocks: Floats = np.zeros(rows)
        self.batch_tokens_max: Floats = np.zeros(rows)
        # What it is busy with; `router.load` keeps these.
        self.prefill_tokens: Floats = np.zeros(rows)  # assigned and not computed yet
        self.prefill_s: Floats = np.zeros(rows)  # the same, as time on this worker
        self.head_s: Floats = np.zeros(rows)  # of the prompt that is computed first,
        self.head_since_s: Floats = np.zeros(rows)  # and since when, by the clock
        self.blocks: Floats = np.zeros(rows)  # of running sequences, shared ones once
        self.requests: Floats = np.zeros(rows)

    def _grow(self) -> None:
        old: Mapping[str, npt.NDArray[np.generic]] = {
            name: column for name, column in vars(self).items() if isinstance(column, np.ndarray)
        }
        rows = len(self.present)
        self._allocate(2 * rows)
        for name, column in old.items():
            getattr(self, name)[..., :rows] = column
