"""What nodes measured of their workers, in place of assumptions, field by field.

A worker that joins is given what is known of it (`Speeds.of`); one that is in the table already is
changed when its node speaks. What a node has not measured stays as it was.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, Protocol

from router.index import WorkerId
from router.workers import Speed, Worker
from runtime.events.envelope import WireError
from runtime.events.node_stream import NodeSpeeds, WorkerSpeed, decode_speeds

NODES_MAX: Final = 4096
WORKERS_MAX: Final = 1024
"""Of one node."""
SECONDS_MAX: Final = 3600.0
"""More than that for a token, a block or a request was not measured."""


class Table(Protocol):
    """Where workers are: `Workers`, or several of them."""

    def get(self, worker: WorkerId) -> Worker | None: ...
    def change(self, worker: Worker) -> None: ...


class Speeds:
    """All methods are called from one event loop."""

    def __init__(self, workers: Table) -> None:
        self.heard_total = 0
        self.refused_total = 0
        self._workers = workers
        self._nodes: dict[str, NodeSpeeds] = {}
        self._measured: dict[WorkerId, WorkerSpeed] = {}

    def __len__(self) -> int:
        """Workers that something is known of."""
        return len(self._measured)

    def hear(self, payload: bytes) -> None:
        """One message of a node; what makes no sense is counted and changes nothing."""
        try:
            said = decode_speeds(payload)
        except WireError:
            self.refused_total += 1
            return
        full = said.node not in self._nodes and len(self._nodes) >= NODES_MAX
        if full or len(said.workers) > WORKERS_MAX or not all(map(_is_sane, said.workers)):
            self.refused_total += 1
            return
        self.heard_total += 1
        self.forget(said.node)
        self._nodes[said.node] = said
        for one in said.workers:
            worker = WorkerId(one.worker_id, one.dp_rank)
            self._measured[worker] = one
            known = self._workers.get(worker)
            if known is not None:
                speed = measured(one, known.speed)
                if speed != known.speed:
                    self._workers.change(replace(known, speed=speed))

    def of(self, worker: WorkerId, assumed: Speed) -> Speed:
        """For a worker that joins."""
        found = self._measured.get(worker)
        return assumed if found is None else measured(found, assumed)

    def has_prefill(self, worker: WorkerId) -> bool:
        """Whether its node measured how long prompts take."""
        found = self._measured.get(worker)
        return found is not None and found.prefill_s_per_token > 0.0

    def forget(self, node: str) -> None:
        """It has left: its workers, if they come again, are not known."""
        said = self._nodes.pop(node, None)
        for one in said.workers if said is not None else ():
            self._measured.pop(WorkerId(one.worker_id, one.dp_rank), None)


def measured(found: WorkerSpeed, assumed: Speed) -> Speed:
    """Each field of `found` that is not 0, the others as they were assumed."""
    return replace(
        assumed,
        prefill_s_per_token=found.prefill_s_per_token or assumed.prefill_s_per_token,
        prefill_s_per_token2=found.prefill_s_per_token2 or assumed.prefill_s_per_token2,
        load_s_per_block=_each(found.load_s_per_block, assumed.load_s_per_block),
        load_latency_s=_each(found.load_latency_s, assumed.load_latency_s),
    )


def _each(
    found: tuple[float, float, float], assumed: tuple[float, float, float]
) -> tuple[float, float, float]:
    first, second, third = (a or b for a, b in zip(found, assumed, strict=True))
    return first, second, third


def _is_sane(found: WorkerSpeed) -> bool:
    numbers = (
        *(found.prefill_s_per_token, found.prefill_s_per_token2),
        *(*found.load_s_per_block, *found.load_latency_s),
    )
    return all(math.isfinite(number) and 0.0 <= number <= SECONDS_MAX for number in numbers)
