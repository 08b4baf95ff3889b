"""The kernels of a decision: what each worker finds of a prompt, what it would cost, the cheapest.

Importing this module compiles (a second or two, once a machine).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import boolean, float64, int32, int64, intp, types, void

from runtime.native import kernel

WAIT, ROOM, LOAD, COMPUTE, DECODE, TOTAL = range(6)
"""Rows of what `seconds` fills."""

_FLOATS: Final = types.Array(float64, 1, "C", readonly=True)
_FLOAT_ROWS: Final = types.Array(float64, 2, "C", readonly=True)
_BOOLS: Final = types.Array(boolean, 1, "C", readonly=True)
_REACH: Final = types.Array(int32, 2, "C", readonly=True)
_COLUMNS: Final = types.Array(intp, 1, "C", readonly=True)
_COVERED: Final = types.Array(int64, 2, "C", readonly=True)


@kernel(void(_REACH, _COLUMNS, types.Array(int64, 2, "C")))
def cover(reach, column_of, covered):  # type: ignore[no-untyped-def]
    """Raise `covered`, by tier and row, to what `reach` says by tier and column; -1: no column."""
    for row in range(len(column_of)):
        column = column_of[row]
        if column >= 0:
            for tier in range(len(covered)):
                covered[tier, row] = max(covered[tier, row], reach[tier, column])


@kernel(
    void(
        *(_COVERED, float64, float64, float64, float64, float64, boolean, float64),
        *([_FLOATS] * 2 + [_FLOAT_ROWS] * 3 + [_FLOATS] * 6),
        types.Array(float64, 2, "C"),
    )
)
def seconds(  # type: ignore[no-untyped-def]  # noqa: PLR0917 (unboxing a table of all costs more)
    covered,
    tokens,
    block_tokens,
    blocks,
    output_tokens,
    decode_weight,
    decode_only,
    now_s,
    prefill_a,
    prefill_q,
    step,
    load_s_per_block,
    load_latency_s,
    kv_blocks,
    prefill_s,
    head_s,
    head_since_s,
    active_blocks,
    requests,
    out,
):
    """See `router.cost.SecondsCost`, and `router.workers.Workers` for the columns."""
    last = max(tokens - 1.0, 0.0)
    for row in range(covered.shape[1]):
        # Prompts are computed one after another, so what has passed since the latest first token
        # went into the one that is first; at most as much as it was expected to take, and nothing
        # where prompts wait for memory.
        begun = min(now_s - head_since_s[row], head_s[row])
        if active_blocks[row] > kv_blocks[row]:
            begun = 0.0
        wait = prefill_s[row] - max(begun, 0.0)
        wanted = active_blocks[row] + blocks
        step_s = step[0, row] + step[1, row] * (requests[row] + 1.0)
        answer_s = output_tokens * (step_s + step[2, row] * wanted)
        # Rows that are free have no memory; workers that have not said are never over theirs.
        over = max(wanted / max(kv_blocks[row], 1.0) - 1.0, 0.0)
        best = loading = 0.0
        if not decode_only:
            a, q = prefill_a[row], prefill_q[row]
            whole = a * tokens + (q / 2) * tokens * tokens
            end = min(covered[0, row] * block_tokens, last)
            best = whole - (a * end + (q / 2) * end * end)
            # Loading through a tier costs all loads up to it; the tier with the least sum is taken.
            loads = 0.0
            for tier in range(1, len(covered)):
                added = covered[tier, row] - covered[tier - 1, row]
                if added > 0:
                    loads += added * load_s_per_block[tier - 1, row] + load_latency_s[tier - 1, row]
                end = min(covered[tier, row] * block_tokens, last)
                option = loads + (whole - (a * end + (q / 2) * end * end))
                if option < best:
                    best, loading = option, loads
        out[WAIT, row] = wait
        out[ROOM, row] = over * answer_s
        out[LOAD, row] = loading
        out[COMPUTE, row] = best - loading
        out[DECODE, row] = decode_weight * answer_s
        out[TOTAL, row] = wait + over * answer_s + best + decode_weight * answer_s


@kernel(int64(_FLOATS, _BOOLS, types.Array(int64, 1, "C")))
def cheapest(costs, eligible, rows):  # type: ignore[no-untyped-def]
    """Fill `rows` with the eligible ones of the least cost; how many."""
    count = 0
    least = np.inf
    for row in range(len(costs)):
        if eligible[row] and (count == 0 or costs[row] <= least):
            if count == 0 or costs[row] < least:
                least, count = costs[row], 0
            rows[count] = row
            count += 1
    return count
