"""What it would cost to send a request to each worker: in expected seconds, or in blocks.

Both take the whole table of workers at once and return one number a row, lower is better, with the
terms it is made of, so that a decision can be explained. Rows that are free or excluded have a
number too, which means nothing: the choice masks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from router.workers import Floats, Workers

Covered = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Request:
    """What a router knows of a request when it chooses."""

    tokens: int
    block_tokens: int
    # (tiers, rows): the n-th row of tiers says how many leading blocks the worker finds in the
    # first n+1 tiers, so that each row is at least the one before.
    covered: Covered
    expected_output_tokens: int = 0
    decode_only: bool = False  # its prompt is computed elsewhere

    @property
    def blocks(self) -> int:
        """Those of the prompt, the last one begun included."""
        return -(-self.tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class Costs:
    total: Floats
    terms: dict[str, Floats]  # in the unit of the total
    unit: str

    def load_s(self, row: int) -> float:
        """Seconds expected for loading from lower tiers; 0 where seconds are not counted."""
        return float(self.terms["load"][row]) if "load" in self.terms else 0.0


class Cost(Protocol):
    def __call__(
        self, request: Request, workers: Workers, eligible: npt.NDArray[np.bool_]
    ) -> Costs:
        """`eligible` says which rows take part in what is relative to the others."""
        ...


@dataclass(frozen=True, slots=True)
class SecondsCost:
    """Seconds until the first token, plus those that decoding takes there.

    wait: what is assigned to the worker and not computed yet. load: the blocks that lower tiers
    have, as far as loading is quicker than computing; a tier's blocks can be used only behind those
    of the tiers above. compute: the rest of the prompt; at least one token, as engines do. decode:
    `decode_weight` times the expected output times the step time with this request in the batch;
    below 1, because what is computed here holds up others as well, and decoding does not.
    room: until the worker's memory has room, where the blocks of all that was sent there and of
    this are more than it has; by Little's law it frees its blocks once in an answer's time.
    """

    decode_weight: float = 0.5

    def __post_init__(self) -> None:
        if not (np.isfinite(self.decode_weight) and self.decode_weight >= 0.0):
            raise ValueError(
                f"decode_weight is {self.decode_weight}; it must be finite and not negative"
            )

    def __call__(
        self, request: Request, workers: Workers, eligible: npt.NDArray[np.bool_]
    ) -> Costs:
        rows = slice(workers.rows)
        wait = workers.waits_s()
        decode, room = self._decode(request, workers)
        if request.decode_only:
            terms = {"wait": wait, "room": room, "decode": decode}
            return Costs(wait + room + decode, terms, "s")
        a, q = workers.prefill_a[rows], workers.prefill_q[rows]
        tokens = float(request.tokens)
        ends = np.minimum(request.covered * float(request.block_tokens), max(tokens - 1, 0))
        # Seconds of computing up to each end; what a tier saves is the difference of two.
        until = a * ends + (q / 2) * ends * ends
        whole = a * tokens + (q / 2) * tokens * tokens
        added = request.covered[1:] - request.covered[:-1]
        load = np.where(
            added > 0,
            added * workers.load_s_per_block[:, rows] + workers.load_latency_s[:, rows],
            0.0,
        )
        # Loading through tier n costs all loads up to it; take the n with the least sum, 0 = none.
        options = np.empty_like(until)
        options[0] = whole - until[0]
        loads = np.cumsum(load, axis=0)
        options[1:] = loads + (whole - until[1:])
        best = np.argmin(options, axis=0)
        every = np.arange(workers.rows)
        loading = np.where(best > 0, loads[np.maximum(best, 1) - 1, every], 0.0)
        prefill = options[best, every]
        terms = {"wait": wait, "room": room, "load": loading}
        terms |= {"compute": prefill - loading, "decode": decode}
        return Costs(wait + room + prefill + decode, terms, "s")

    def step_s(self, request: Request, workers: Workers, row: int) -> float:
        """From one token to the next at that worker, with this request in the batch."""
        step, per_request, per_block = workers.step[:, row]
        blocks = workers.blocks[row] + request.blocks
        return float(step + per_request * (workers.requests[row] + 1) + per_block * blocks)

    def _decode(self, request: Request, workers: Workers) -> tuple[Floats, Floats]:
        """Seconds of decoding, and of waiting for room."""
        rows = slice(workers.rows)
        step, per_request, per_block = workers.step[:, rows]
        wanted = workers.blocks[rows] + request.blocks
        step_s = step + per_request * (workers.requests[rows] + 1)
        answer_s = request.expected_output_tokens * (step_s + per_block * wanted)
        # Rows that are free have no memory; workers that have not said are never over theirs.
        over = np.maximum(wanted / np.maximum(workers.kv_blocks[rows], 1.0) - 1.0, 0.0)
        return self.decode_weight * answer_s, over * answer_s


@dataclass(frozen=True, slots=True)
class BlocksCost:
    """The formula of NVIDIA Dynamo 1.6's router, in blocks.

    Source: its router documentation ("Cost Calculation") and configuration reference:
        raw = active prefill blocks + prompt blocks
        credit = overlap_credit * decay * g1 + host * g2 + disk * (g3 + g4)
        decay = 1 / (1 + overlap_decay * excess), excess = active prefill above that of the least
            loaded eligible worker, in units of this request
        cost = prefill_scale * max(raw - credit, 0) + active blocks + prompt blocks
               + request_weight * active requests
    Fields carry its defaults. `g1` and so on are the blocks that a tier adds to the better ones.
    """

    overlap_credit: float = 1.0
    overlap_decay: float = 0.0
    host_credit: float = 0.75
    disk_credit: float = 0.25
    prefill_scale: float = 1.0
    request_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("overlap_credit", "host_credit", "disk_credit"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}; it must be from 0 to 1")
        for name in ("overlap_decay", "prefill_scale", "request_weight"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")

    def __call__(
        self, request: Request, workers: Workers, eligible: npt.NDArray[np.bool_]
    ) -> Costs:
        rows = slice(workers.rows)
        active = workers.prefill_tokens[rows] / request.block_tokens
        blocks = float(request.blocks)
        least = active[eligible].min() if eligible.any() else 0.0
        decay = 1 / (1 + self.overlap_decay * np.maximum(active - least, 0) / max(blocks, 1.0))
        added = np.diff(request.covered, axis=0, prepend=0)
        credit = (
            self.overlap_credit * decay * added[0]
            + self.host_credit * added[1]
            + self.disk_credit * (added[2] + added[3])
        )
        if request.decode_only:  # the reference's pass for decode workers tracks no prefill
            prefill = np.zeros(workers.rows)
        else:
            prefill = self.prefill_scale * np.maximum(active + blocks - credit, 0.0)
        decode = workers.blocks[rows] + blocks
        requests = self.request_weight * workers.requests[rows]
        return Costs(
            prefill + decode + requests,
            {"prefill": prefill, "decode": decode, "requests": requests},
            "blocks",
        )
