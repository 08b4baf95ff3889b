"""Tables of workers and requests for the router's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router.cost import Request
from router.index import WorkerId
from router.workers import Capacity, Speed, Worker, Workers

BLOCK = 16


def worker(
    instance: int,
    *,
    dp_rank: int = 0,
    speed: Speed | None = None,
    kv_blocks: int | None = None,
    batch_tokens_max: int | None = None,
    taints: Sequence[str] = (),
) -> Worker:
    return Worker(
        WorkerId(instance, dp_rank),
        speed or Speed(),
        Capacity(kv_blocks, batch_tokens_max),
        frozenset(taints),
    )


def table(count: int) -> Workers:
    """Workers 1..count, in rows 0..count-1."""
    workers = Workers()
    for instance in range(1, count + 1):
        workers.add(worker(instance))
    return workers


def request(
    workers: Workers,
    blocks: int = 10,
    covered: Sequence[Sequence[int]] | None = None,
    *,
    tokens: int | None = None,
    output: int = 0,
) -> Request:
    """`covered`: for each tier, the blocks each worker finds in it or a better one."""
    tiers = np.zeros((4, workers.rows), dtype=np.int64)
    if covered is not None:
        tiers[:] = covered
    return Request(tokens or blocks * BLOCK, BLOCK, tiers, output)
